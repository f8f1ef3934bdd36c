"""Programs that know nothing of sdlisten, unchanged, under ``sdlisten run``: what twenty rolls cost clients.

Each has what it needs to be rolled without a loss: it takes the listener that was passed (LISTEN_FDS), and on
one signal stops accepting and finishes what it has accepted. uvicorn lacks the second half, and is shown with
what that costs. Most never say that they are ready; ``--ready SECONDS`` guesses. A guess that is too short
makes clients wait, and loses nothing: whoever is not accepting yet has the queue of the listener.

Of the two from Debian, lighttpd honours LISTEN_FDS. nginx does not; its own variable (``NGINX=3;``, meant for
its binary upgrade) would take a wrapper that nobody has who does not know of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sdlisten.load import LoadProcess
from sdlisten.supervisor import ctl
from sdlisten.testing import activate

from .engine import EngineUnavailableError, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdlisten.load import Result
    from sdlisten.testing import Activated

SECONDS = 30.0  # far beyond what anything here takes; nothing waits for it to pass
ROLLS = 20
CLIENTS = 24
# Requests that uvicorn loses in a restart, on average. Measured: 0.5 to 1 when it is stopped and started on a
# socket that somebody else holds, 0.3 to 0.8 here; a busy machine has more in its queue at the wrong moment.
KNOWN_LOSS = 3

HERE = Path(__file__).parent / "foreign"
LIGHTTPD = "/usr/sbin/lighttpd"  # not in everybody's PATH
SD_DAEMON = "/usr/include/systemd/sd-daemon.h"
GOPATH = Path("/usr/share/gocode")
GO_SYSTEMD = "github.com/coreos/go-systemd"
# What must be there, as a path or in PATH: the Debian package that has it.
PACKAGES = {
    "gcc": "gcc",
    "go": "golang-go",
    LIGHTTPD: "lighttpd",
    SD_DAEMON: "libsystemd-dev",
    f"{GOPATH}/src/{GO_SYSTEMD}": "golang-github-coreos-go-systemd-dev",
}


class Program(NamedTuple):
    """A foreign program.

    Attributes:
        command: Returns it, after it was built in a directory of its own.
        options: What `sdlisten run` has to be told about it.
        needs: What has to be there, of `PACKAGES`.
        module: The Python package that it is, or "".
        lossless: Whether a roll may lose no request.
    """

    command: Callable[[Path], Sequence[str]]
    options: Sequence[str] = ()
    needs: Sequence[str] = ()
    module: str = ""
    lossless: bool = True


def gunicorn(worker_class: str) -> Callable[[Path], Sequence[str]]:
    """Return how to start gunicorn with workers of a class."""

    def command(_directory: Path) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "gunicorn", "--chdir", str(HERE), "--log-level", "warning"),
            # By default all masters of a user share one, in the home directory.
            "--no-control-socket",
            *("--worker-class", worker_class, "--workers", "2", "wsgi:application"),
        ]

    return command


def lighttpd(directory: Path) -> Sequence[str]:
    """Return how to start lighttpd, with a page to deliver."""
    page = directory / "index.txt"
    page.write_text("0\n")
    return ["env", f"FOREIGN_ROOT={directory}", LIGHTTPD, "-D", "-f", str(HERE / "lighttpd.conf")]


def blocking(directory: Path) -> Sequence[str]:
    """Compile the program in C, and return how to start it."""
    program = directory / "blocking"
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program)]
    subprocess.run(["gcc", *options, str(HERE / "blocking.c"), "-lsystemd"], check=True)
    return [str(program)]


def go(directory: Path) -> Sequence[str]:
    """Compile the program in Go, without the network, and return how to start it."""
    # Debian may have it one directory deeper, under its major version.
    package = next((GOPATH / "src" / GO_SYSTEMD).rglob("activation")).relative_to(GOPATH / "src")
    source = directory / "activated.go"
    source.write_text((HERE / source.name).read_text().replace(f"{GO_SYSTEMD}/activation", str(package)))
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPATH": str(GOPATH),
        "GOCACHE": str(directory / "cache"),
    }
    program = directory / "activated"
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True)
    return [str(program)]


def uvicorn(_directory: Path) -> Sequence[str]:
    """Return how to start uvicorn on the first descriptor that was passed."""
    options = ["--lifespan", "off", "--no-access-log", "--log-level", "warning"]
    application = ["--app-dir", str(HERE), "asgi:application"]
    return [sys.executable, "-m", "uvicorn", "--fd", "3", *options, *application]


PROGRAMS = {
    # Its master says READY=1 when it listens, before it has workers: clients wait for those.
    "gunicorn-sync": Program(gunicorn("sync"), module="gunicorn"),
    "gunicorn-gthread": Program(gunicorn("gthread"), module="gunicorn"),
    # SIGTERM would make it end at once; SIGINT lets it finish.
    "lighttpd": Program(lighttpd, ("--ready", "0.1", "--stop-signal", "INT"), [LIGHTTPD]),
    "blocking-c": Program(blocking, needs=["gcc", SD_DAEMON]),
    "go": Program(go, ("--ready", "0.1"), ["gcc", "go", f"{GOPATH}/src/{GO_SYSTEMD}"]),
    "uvicorn": Program(uvicorn, ("--ready", "0.5"), module="uvicorn", lossless=False),
}


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Program:
    """The program of that name; what it needs is installed, which is not within the time limit of a test."""
    found = PROGRAMS[request.param]
    if found.module and importlib.util.find_spec(found.module) is None:
        pytest.skip(f"{found.module} is not installed: it is in the dependency group integration")
    missing = [thing for thing in found.needs if not (os.path.exists(thing) or shutil.which(thing))]
    try:
        install(missing, PACKAGES)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    return found


class Running(NamedTuple):
    """A supervisor of a foreign program."""

    daemon: Activated
    control: str
    lossless: bool

    def status(self) -> dict[str, Any]:
        """Return the facts of ``ctl status``."""
        facts = ctl.ask(self.control, {"do": "status"}, timeout=SECONDS)["status"]
        assert isinstance(facts, dict)
        return facts

    def wait_served(self, number: int) -> None:
        """Wait until a generation answers.

        Ready or taken for ready is not served: without this, a slow machine would roll from one generation
        that never accepted to the next.
        """
        deadline = time.monotonic() + SECONDS
        while (answered := generation_that_answers(self.daemon.listeners[0].sockname)) != number:
            assert answered or not self.lossless, "a request was lost"
            assert time.monotonic() < deadline, f"generation {answered} answers, not {number}"
            select.select([], [], [], 0.01)

    def wait_drained(self) -> dict[str, Any]:
        """Wait until one generation is left, and return the status: there is no other sign of it."""
        deadline = time.monotonic() + SECONDS
        while len((facts := self.status())["generations"]) != 1:
            assert time.monotonic() < deadline, facts
            select.select([], [], [], 0.01)
        return facts


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[Program], Running]]:
    """Give a function that runs a program, and returns when it answers; it is stopped after the test."""
    control = str(tmp_path / "control")
    directory = tmp_path / "program"
    directory.mkdir()

    def start(program: Program) -> Running:
        supervisor = [sys.executable, "-m", "sdlisten", "run", "--control", control, *program.options, "--"]
        command = [*supervisor, *program.command(directory)]
        daemon = stack.enter_context(activate(command, ["http=127.0.0.1:0"]))
        running = Running(daemon, control, program.lossless)
        running.daemon.wait_ready(SECONDS)
        running.wait_served(1)
        return running

    with contextlib.ExitStack() as stack:
        yield start


def roll(running: Running, rolls: int) -> Result:
    """Roll under load, then stop; all rolls must succeed, nobody crash, all drain by themselves.

    Returns:
        What the load counted.
    """
    backlog = running.status()["listeners"][0]["backlog"]
    address = running.daemon.listeners[0].address
    with LoadProcess(address, mode="short", clients=CLIENTS, quiet=True) as load:
        load.wait_started()
        for generation in range(2, rolls + 2):
            answer = ctl.ask(running.control, {"do": "roll", "wait": True}, timeout=SECONDS)
            assert answer["code"] == 0, answer
            running.wait_served(generation)
        result = load.stop()
    facts = running.wait_drained()
    counts = {name: facts[name] for name in ("rolls", "refused", "restarts", "killed")}
    assert counts == {"rolls": rolls, "refused": 0, "restarts": 0, "killed": 0}
    assert facts["listeners"][0]["backlog"] == backlog
    assert running.daemon.terminate() == 0
    return result


def generation_that_answers(address: Any) -> int:  # noqa: ANN401 - what getsockname() returns
    """Ask the program; it may be a while until somebody accepts. 0: the request was lost."""
    with socket.create_connection(address, timeout=SECONDS) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        try:
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except ConnectionResetError:
            return 0
    _, _, rest = answer.lower().partition(b"\r\ngeneration:")
    return int(rest.split()[0]) if rest else 0


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have."""
    children = [
        int(word)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]
    return [found for child in children for found in (child, *descendants(child))]


@pytest.mark.parametrize(
    "program", [name for name, known in PROGRAMS.items() if known.lossless], indirect=True
)
def test_a_roll_loses_nothing(
    run: Callable[[Program], Running], rounds: Callable[[int], int], program: Program
) -> None:
    """Twenty rolls of a program that drains on a signal fail no request of clients that connect anew."""
    result = roll(run(program), rounds(ROLLS))

    assert result.clean, result


@pytest.mark.parametrize("program", ["uvicorn"], indirect=True)
def test_a_roll_loses_what_is_not_read(
    run: Callable[[Program], Running], rounds: Callable[[int], int], program: Program
) -> None:
    """A roll of uvicorn loses connections that it has accepted and not read, and no others."""
    result = roll(run(program), rounds(ROLLS))

    assert result.ok, result
    assert result.failed == result.reset + result.empty, result
    assert result.failed <= KNOWN_LOSS * rounds(ROLLS), result


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
def test_nobody_outlives_the_supervisor(run: Callable[[Program], Running], program: Program) -> None:
    """When the supervisor is killed, a program that knows nothing of it ends, and all it has started."""
    running = run(program)
    pids = descendants(running.daemon.pid)
    assert pids
    with contextlib.ExitStack() as stack:
        alive = {os.pidfd_open(pid): pid for pid in pids}
        for pidfd in alive:
            stack.callback(os.close, pidfd)
        os.kill(running.daemon.pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while alive:
            ended, _, _ = select.select(alive, [], [], max(0, deadline - time.monotonic()))
            assert ended, f"{[command_line(pid) for pid in alive.values()]} run on"
            for pidfd in ended:
                del alive[pidfd]


def command_line(pid: int) -> str:
    """Return the words of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
