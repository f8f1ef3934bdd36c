"""What holds for all tests: hypothesis without a clock; README.md and docs/ are tests too.

A page is followed as a reader follows it, in a directory of its own:

``python``
    is run in this process; the blocks of a page share their names. A block that begins with ``# NAME.py`` is
    a file, for the commands below it.
``console``
    Each line behind ``$`` is a command for bash, and what is below it must be what it writes. After a comment
    ``<!-- keeps running -->`` the last command of the block is not expected to end: a terminal of its own. A
    block without ``$`` is what that terminal has written since, and ``^C`` ends it.
``pycon``
    is a Python of its own, which is passed the sockets of the units before it: blocks of ``ini`` that begin
    with ``# NAME.socket``.

Before one that cannot run here goes ``<!-- skip: next "reason" -->``. Other languages are left alone. What
runs uses free ports instead of 8080 and 9090, and a directory of the page instead of /run; what it writes is
read as if it had used those. In that may differ: white space, numbers of four digits and more, seconds and
milliseconds, how many requests and processes there were, and what stands at ``...``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import SkipTest

from hypothesis import HealthCheck, settings
from sybil import Document, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, SkipParser

from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.spawn import spawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sybil import Example

__all__ = ("pytest_collect_file",)

# Time never gates. On a new machine the first draw of a text takes seconds: hypothesis builds its tables.
settings.register_profile("sdlisten", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdlisten")

DEADLINE = 30.0  # seconds for a command to write what is expected
BASH = shutil.which("bash") or "/bin/bash"
NO_SKIP = os.environ.get("SDLISTEN_NO_SKIP") == "1"
# What surrounds the tests is none of the examples' business.
NOT_INHERITED = {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES"}

# What may differ in the text of a command, and what then stands for it.
WILD = {
    r"\.\.\.": r".*",
    r"sdlisten-demo-\w+": r"sdlisten-demo-\w+",
    r"\d+\.\d+(?= ?s\b)": r"\d+\.\d+",
    r"[\d,]+(?= requests answered)": r"[\d,]+",
    r"\d+(?= (?:ms|processes)\b)": r"\d+",
    r"\d{4,}": r"\d+",
    r"\s+": r"\s+",
}

# A dialogue, line by line; the first argument is its file, the second what `Page.places` has.
RUN_PYCON = """
import doctest, json, os, re, sdlisten, socket, sys
script, places = sys.argv[1], json.loads(sys.argv[2])

class Checker(doctest.OutputChecker):
    def check_output(self, want, got, flags):
        for word, place in places.items():
            got = got.replace(place, word)
        return super().check_output(want, got, flags)

names = {"os": os, "socket": socket, **{name: getattr(sdlisten, name) for name in sdlisten.__all__}}
test = doctest.DocTestParser().get_doctest(open(script, encoding="utf-8").read(), names, script, script, 0)
for example in test.examples:
    for word, place in places.items():
        example.source = re.sub(BEFORE + re.escape(word) + AFTER, place, example.source)
runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
sys.exit(runner.run(test).failed > 0)
"""

# Where a port or a directory is one: not within a longer number or path.
BEFORE, AFTER = r"(?<![\w./])", r"(?!\d)"
RUN_PYCON = RUN_PYCON.replace("BEFORE", repr(BEFORE)).replace("AFTER", repr(AFTER))


class Page(Document):
    """A page that is being followed."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text, path)
        self.namespace.update(missing=missing, _page=self)
        self.directory = Path(tempfile.mkdtemp(dir=scratch()))  # a short name: unix sockets have 107 bytes
        (self.directory / "run").mkdir()
        self.places = {"/run/": f"{self.directory}/run/", **free_ports()}
        self.units: list[tuple[str, list[tuple[str, str]]]] = []
        self.terminals: list[Terminal] = []
        self.skipped = ""  # why the last terminal of its own was not started

    def localised(self, text: str) -> str:
        """Return what to run for what the page says."""
        for word, place in self.places.items():
            text = re.sub(BEFORE + re.escape(word) + AFTER, place, text)
        return text

    def read(self, output: str) -> str:
        """Return what the page says for what was written."""
        for word, place in self.places.items():
            output = output.replace(place, word)
        return output

    def close(self) -> None:
        """End what keeps running."""
        while self.terminals:
            self.terminals.pop().kill()


class Terminal:
    """One command, and what it writes."""

    def __init__(self, command: str, page: Page) -> None:
        self._command = command
        self._page = page
        self._process = subprocess.Popen(
            [BASH, "-c", page.localised(command)],
            cwd=page.directory,
            env=environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._unread = b""
        self._ended = False

    def expect(self, expected: str, *, to_end: bool) -> None:
        """Wait until it has written what is expected and nothing else; `to_end`: and has ended."""
        pattern = re.compile(wild(expected.strip()), re.DOTALL)
        deadline = time.monotonic() + DEADLINE
        while True:
            text = self._page.read(self._unread.decode(errors="replace").strip())
            if (self._ended or not to_end) and pattern.fullmatch(text):
                self._unread = b""
                return
            left = deadline - time.monotonic()
            if self._ended or left <= 0:
                state = "ended" if self._ended else f"after {DEADLINE} s"
                raise AssertionError(f"$ {self._command}\n{state}, it wrote:\n{text}\nexpected:\n{expected}")
            self._read(left)

    def _read(self, timeout: float) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        if select.select([self._process.stdout], [], [], timeout)[0]:
            data = os.read(self._process.stdout.fileno(), 65536)
            self._unread += data
            self._ended = not data

    def kill(self) -> None:
        """End it and all that it started."""
        with self._process, contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def page_of(example: Example) -> Page:
    """Return the page that an example is on."""
    return example.namespace["_page"]  # type: ignore[no-any-return] # we put it there


def run_python(example: Example) -> None:
    """Run a block of Python, or write it to the file that its first line names."""
    if name := re.match(r"# (\w+\.py)\n", example.parsed):
        page = page_of(example)
        (page.directory / name[1]).write_text(page.localised(example.parsed), encoding="utf-8")
    else:
        PythonEvaluator()(example)


def run_console(example: Example) -> None:
    """Run commands and compare what they write."""
    page = page_of(example)
    more, *parts = re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)
    keeps_running = page.text[: example.start].rstrip().endswith("<!-- keeps running -->")
    if page.skipped and not keeps_running:
        raise SkipTest(page.skipped)
    page.skipped = ""
    if more.strip() == "^C":
        page.terminals.pop().kill()
    elif more.strip():
        page.terminals[-1].expect(more, to_end=False)
    for number, part in enumerate(parts, 1):
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        program = next(word for word in command.split() if "=" not in word)
        if missing(program) and shutil.which(program, path=environ()["PATH"]) is None:
            page.skipped = f"{program} is not installed" if keeps_running else ""
            raise SkipTest(f"{program} is not installed")
        stays = keeps_running and number == len(parts)
        terminal = Terminal(command, page)
        page.terminals.append(terminal)
        terminal.expect(expected, to_end=not stays)
        if not stays:
            page.terminals.pop().kill()


def read_units(example: Example) -> None:
    """Remember what .socket units say, for the next Python of its own."""
    page = page_of(example)
    units = page.units
    for line in page.localised(example.parsed).splitlines():
        key, equals, value = line.partition("=")
        if unit := re.match(r"# (\S+\.socket)$", line):
            units.append((unit[1], []))
        elif equals and units:
            units[-1][1].append((key, value))


def run_pycon(example: Example) -> None:
    """Run a dialogue in a Python that is passed what the units before it say."""
    page = page_of(example)
    units, page.units = page.units, []
    script = page.directory / f"line-{example.line}.txt"
    script.write_text(example.parsed, encoding="utf-8")
    with contextlib.ExitStack() as at_end:
        passed = [found for name, lines in units for found in opened(name, lines, at_end)]
        output = os.memfd_create("output")
        at_end.callback(os.close, output)
        command = [sys.executable, "-c", RUN_PYCON, str(script), json.dumps(page.places)]
        child = spawn(command, passed, environ=environ(), stdout=output, stderr=output)
        at_end.callback(child.close)
        code = child.wait(DEADLINE)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if code != 0:
            raise AssertionError(os.pread(output, 1 << 16, 0).decode(errors="replace"))


def opened(
    unit: str, lines: Iterable[tuple[str, str]], at_end: contextlib.ExitStack
) -> Iterator[tuple[int, str]]:
    """Open what a unit says as systemd does, and close it `at_end`; gives descriptors and their names."""
    options = dict(lines)
    name = options.get("FileDescriptorName", unit)
    for key, value in lines:
        if key == "ListenStream":
            for listener in at_end.enter_context(bind(parse_address(value))):
                os.set_blocking(listener.fileno(), True)
                if options.get("Accept") == "yes":
                    at_end.enter_context(socket.create_connection(listener.socket.getsockname()))
                    yield at_end.enter_context(listener.accept(DEADLINE)[0]).fileno(), "connection"
                else:
                    yield listener.fileno(), name
        elif key == "ListenDatagram":
            host, _, port = value.rpartition(":")
            datagram = at_end.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            datagram.bind((host, int(port)))
            yield datagram.fileno(), name
        elif key == "ListenFIFO":
            os.mkfifo(value)
            at_end.callback(os.unlink, value)
            fifo = at_end.enter_context(open(value, "r+b", buffering=0))  # noqa: SIM115 - the stack closes it
            yield fifo.fileno(), name


def wild(expected: str) -> str:
    """Return a regular expression for what a page says that a command writes."""
    for what, stand_in in WILD.items():
        if found := re.search(what, expected):
            before, after = expected[: found.start()], expected[found.end() :]
            return wild(before) + stand_in + wild(after)
    return re.escape(expected)


def missing(name: str) -> bool:
    """Whether a package or program is not installed. Where nothing may be skipped none is missing."""
    return not NO_SKIP and importlib.util.find_spec(name) is None and shutil.which(name) is None


@functools.cache
def scratch() -> Path:
    """Return where the directories of the pages are; ``python`` and ``sdlisten`` are in its bin/."""
    directory = Path(tempfile.mkdtemp(prefix="sdlisten-docs-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = os.environ.get("PYTHONPATH", "")
    (directory / "bin").mkdir()
    for program, words in (("python", "-u"), ("sdlisten", "-u -m sdlisten")):
        # A program of its own, because systemd-socket-activate hands on PATH and little else.
        lines = ("#!/bin/sh", f'export PYTHONPATH="{path}"', f'exec "{sys.executable}" {words} "$@"', "")
        script = directory / "bin" / program
        script.write_text("\n".join(lines), encoding="utf-8")
        script.chmod(0o755)
    return directory


def environ() -> dict[str, str]:
    """Return the environment of a reader."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.lower().endswith("_proxy")
    }
    return {**kept, "PATH": f"{scratch()}/bin:{kept.get('PATH', os.defpath)}"}


@functools.cache
def free_ports() -> dict[str, str]:
    """Return a port for each of the pages': free, and none that the kernel gives to who asks for any."""
    ports: dict[str, str] = {}
    candidates = iter(range(20000 + os.getpid() * 4 % 10000, 32768))
    for word in ("8080", "9090"):
        while word not in ports:
            with contextlib.suppress(OSError):
                port = next(candidates)
                bind(parse_address(port)).close()
                ports[word] = str(port)
    return ports


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser("console", run_console),
        CodeBlockParser("ini", read_units),
        CodeBlockParser("pycon", run_pycon),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    document_types={".md": Page},
    teardown=lambda namespace: namespace["_page"].close(),
).pytest()
