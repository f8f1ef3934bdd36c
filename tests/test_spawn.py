"""What a program finds that `sdlisten.spawn` started, seen by real programs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

import pytest

import sdlisten
from sdlisten.errors import ListenEnvironmentError
from sdlisten.spawn import Child, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Unpack

SECONDS = 20.0  # far beyond what anything here takes; nothing waits for it to pass

# Tells what it was given; os.environ would not do, for Python itself changes LC_CTYPE there.
LOOK = """
import fcntl, json, os
def descriptors():
    for fd in map(int, os.listdir("/proc/self/fd")):
        try: seen = os.fstat(fd)
        except OSError: continue  # listdir had it
        yield fd, [seen.st_dev, seen.st_ino, fcntl.fcntl(fd, fcntl.F_GETFD), fcntl.fcntl(fd, fcntl.F_GETFL)]
print(json.dumps({"pid": os.getpid(), "session": os.getsid(0), "fds": dict(descriptors())}))
"""
LOOKER = (sys.executable, "-I", "-S", "-c", LOOK)

# The parts of PATH in which the programs of these tests are.
PATH = "/usr/bin:/bin"


class Options(TypedDict, total=False):
    """What `spawn` takes beside command, descriptors, stdout and stderr."""

    environ: Mapping[str, str]
    stdin: int
    new_session: bool


def read_to_end(fd: int) -> bytes:
    """Read until EOF, or fail with what came so far."""
    deadline = time.monotonic() + SECONDS
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while selector.select(deadline - time.monotonic()):
            part = os.read(fd, 65536)
            if not part:
                return seen
            seen += part
    pytest.fail(f"no EOF within {SECONDS} s, only {seen!r}")


def read_until(fd: int, wanted: bytes) -> bytes:
    """Read until some bytes have come, or fail with what came instead."""
    deadline = time.monotonic() + SECONDS
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while wanted not in seen:
            part = os.read(fd, 65536) if selector.select(deadline - time.monotonic()) else b""
            if not part:
                pytest.fail(f"waited for {wanted!r}, saw {seen!r}")
            seen += part
    return seen


def ended(child: Child) -> int:
    """Wait for the end of a program and close what belongs to it."""
    with contextlib.closing(child):
        code = child.wait(SECONDS)
        if code is None:
            child.send_signal(signal.SIGKILL)
            child.wait()
            pytest.fail(f"pid {child.pid} did not end within {SECONDS} s")
        return code


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe; either end may be closed before."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for fd in ends:
            with contextlib.suppress(OSError):
                os.close(fd)


def output(
    command: Sequence[str | bytes | os.PathLike[str]],
    descriptors: Sequence[tuple[int, str]] = (),
    **options: Unpack[Options],
) -> tuple[int, bytes, bytes]:
    """Run a program to its end: exit code, stdout, stderr."""
    with pipe() as (out, out_end), pipe() as (err, err_end):
        child = spawn(command, descriptors, stdout=out_end, stderr=err_end, **options)
        os.close(out_end)
        os.close(err_end)
        seen = read_to_end(out), read_to_end(err)
        return ended(child), *seen


def look(descriptors: Sequence[tuple[int, str]] = (), **options: Unpack[Options]) -> dict[str, Any]:
    """Let a program tell what it finds."""
    code, out, err = output(LOOKER, descriptors, **options)
    assert (code, err) == (0, b"")
    found: dict[str, Any] = json.loads(out)
    return found


def environment(descriptors: Sequence[tuple[int, str]] = (), **options: Unpack[Options]) -> dict[str, str]:
    """Return the environment that a program gets, as the kernel has it."""
    code, out, err = output(["/bin/cat", "/proc/self/environ"], descriptors, **options)
    assert (code, err) == (0, b"")
    entries = [os.fsdecode(entry).partition("=") for entry in out.split(b"\0")[:-1]]
    assert len(entries) == len({name for name, _, _ in entries}), "a variable came twice"
    return {name: value for name, _, value in entries}


def open_files() -> dict[int, tuple[int, int]]:
    """Return the descriptors of this process, each with the identity of its file."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            seen = os.fstat(int(name))
            found[int(name)] = seen.st_dev, seen.st_ino
    return found


def has_children() -> bool:
    """Whether this process has children, dead or alive."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that descriptors, children and environment are the same after as before."""
    before = open_files(), has_children(), dict(os.environ)
    yield
    assert (open_files(), has_children(), dict(os.environ)) == before


@contextlib.contextmanager
def descriptor_limit(limit: int) -> Iterator[None]:
    """Let no new descriptor of this process have this number or a higher one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def memfds(count: int) -> Iterator[list[int]]:
    """Make files that are all different."""
    with contextlib.ExitStack() as stack:
        fds = []
        for number in range(count):
            fds.append(os.memfd_create(f"test{number}"))
            stack.callback(os.close, fds[-1])
        yield fds


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


def identity(pidfd: int) -> str | None:
    """Return what LISTEN_PIDFDID has to be for the process of a pidfd."""
    anonymous = os.eventfd(0)
    try:
        pidfs = os.fstat(pidfd).st_dev != os.fstat(anonymous).st_dev
    finally:
        os.close(anonymous)
    return str(os.fstat(pidfd).st_ino) if pidfs else None


def test_passes_open_files() -> None:
    """The program has exactly the given open files at 3, 4, ..., and they stay open over its own execs."""
    with socket.socket() as listener, memfds(2) as files:
        fds = [listener.fileno(), *files]
        found = look([(fd, "") for fd in fds])["fds"]
        given = [[seen.st_dev, seen.st_ino] for seen in map(os.fstat, fds)]

    assert set(found) == {"0", "1", "2", "3", "4", "5"}
    assert [found[place][:2] for place in ("3", "4", "5")] == given
    assert [found[place][2] & fcntl.FD_CLOEXEC for place in ("3", "4", "5")] == [0, 0, 0]


def test_says_whose_they_are() -> None:
    """LISTEN_PID and LISTEN_PIDFDID are those of the program, whose pid is the one that spawn returned."""
    with memfds(1) as (fd,), pipe() as (out, out_end):
        child = spawn(["/bin/cat", "/proc/self/environ"], [(fd, "web")], environ={}, stdout=out_end)
        expected = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web", "LISTEN_PID": str(child.pid)}
        inode = identity(child.pidfd)
        if inode is not None:
            expected["LISTEN_PIDFDID"] = inode
        os.close(out_end)
        seen = read_to_end(out)
        assert ended(child) == 0

    assert dict(entry.split("=", 1) for entry in seen.decode().split("\0")[:-1]) == expected


def test_caller_keeps_its_descriptors() -> None:
    """Descriptors are borrowed: those of the caller are the same after as before, and so are its flags."""
    with memfds(3) as fds, nothing_left():
        flags = [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds]
        assert ended(spawn(["true"], [(fd, "x") for fd in fds])) == 0

        assert [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds] == flags


@pytest.mark.parametrize("blocking", [True, False])
def test_leaves_nonblock_alone(*, blocking: bool) -> None:
    """O_NONBLOCK, which all holders share, arrives as it was."""
    with socket.socket() as listener:
        listener.setblocking(blocking)
        flags = look([(listener.fileno(), "")])["fds"]["3"][3]

        assert os.get_blocking(listener.fileno()) is blocking
    assert bool(flags & os.O_NONBLOCK) is not blocking


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_lifeline(names: list[str]) -> None:
    """It stands behind what LISTEN_FDS counts, its number is told, and its end is the end of the caller."""
    fd = "os.environ['SDLISTEN_LIFELINE_FD']"
    code = f"import os; print(os.environ.get('LISTEN_FDS'), {fd}, os.read(int({fd}), 1))"
    with pipe() as (reader, writer), pipe() as (seen, out):
        descriptors = [(reader, name) for name in names]
        child = spawn([sys.executable, "-I", "-S", "-c", code], descriptors, stdout=out, lifeline=reader)
        os.close(writer)
        assert ended(child) == 0
        os.close(out)
        count = len(names)
        assert read_to_end(seen) == f"{count or None} {3 + count} b''\n".encode()


def test_no_lifeline_of_somebody_else() -> None:
    """A number that our own parent told us is not told to a child."""
    code = "import os; print(os.environ.get('SDLISTEN_LIFELINE_FD'))"
    command = [sys.executable, "-I", "-S", "-c", code]

    assert output(command, environ={"SDLISTEN_LIFELINE_FD": "9"}) == (0, b"None\n", b"")


def test_closes_foreign_descriptors() -> None:
    """An inheritable descriptor of the caller that was not asked for does not reach the program."""
    with memfds(1) as (fd,):
        high = fcntl.fcntl(fd, fcntl.F_DUPFD, 200)
        low = os.dup(fd)
        os.set_inheritable(low, True)
        try:
            found = look([(fd, "")])["fds"]
        finally:
            os.close(high)
            os.close(low)

    assert set(found) == {"0", "1", "2", "3"}


def test_passes_300() -> None:
    """300 descriptors arrive in order."""
    with memfds(300) as fds:
        given = [os.fstat(fd).st_ino for fd in fds]
        found = look([(fd, f"name{fd}") for fd in fds])["fds"]

    assert [found[str(place)][1] for place in range(3, 303)] == given
    assert len(found) == 303


# Has its own 3, 4, 5 and 6, and passes each choice of them, in each order, also one twice.
SHUFFLE = """
import itertools, os
from sdlisten.spawn import spawn
inode = {fd: os.fstat(fd).st_ino for fd in (3, 4, 5, 6)}
out, out_end = os.pipe()
orders = [order for n in (1, 2, 3, 4) for order in itertools.permutations(inode, n)]
for order in [*orders, (3, 3), (4, 3, 4), (6, 6, 5, 5)]:
    names = [f"/proc/self/fd/{place}" for place in range(3, 3 + len(order))]
    child = spawn(["stat", "-L", "-c", "%i", *names], [(fd, "") for fd in order], stdout=out_end)
    assert child.wait() == 0, order
    child.close()
    seen = [int(word) for word in os.read(out, 4096).split()]
    assert seen == [inode[fd] for fd in order], (order, seen, inode)
print(len(orders))
"""


def test_sources_at_the_places_of_others() -> None:
    """Where given descriptors stand at each other's places, each still arrives at its own."""
    with memfds(4) as fds:
        seen = output([sys.executable, "-c", SHUFFLE], [(fd, "") for fd in fds])

    assert seen == (0, b"64\n", b"")


SWAP = """
from sdlisten.spawn import spawn
child = spawn(["sh", "-c", "echo out; echo err >&2"], stdout=2, stderr=1)
child.wait()
child.close()
"""


def test_standard_streams_swapped() -> None:
    """Stdout and stderr of the caller can be given to the program the other way round."""
    assert output([sys.executable, "-c", SWAP]) == (0, b"err\n", b"out\n")


def test_standard_input() -> None:
    """The program reads the given descriptor as its standard input."""
    with pipe() as (reading, writing):
        os.write(writing, b"words")
        os.close(writing)

        assert output(["cat"], stdin=reading) == (0, b"words", b"")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([""], ""),
        (["web"], "web"),
        (["web", "", "web"], "web::web"),
        (["a b.c-d/e"], "a b.c-d/e"),
        (["x" * 255], "x" * 255),
    ],
)
def test_names(names: list[str], text: str) -> None:
    """LISTEN_FDNAMES has a name for each descriptor, in order, also empty and equal ones."""
    with memfds(1) as (fd,):
        found = environment([(fd, name) for name in names])

    assert (found["LISTEN_FDS"], found["LISTEN_FDNAMES"]) == (str(len(names)), text)


@pytest.mark.parametrize("name", ["a:b", "x" * 256, "\n", "\x7f", "é"])
def test_impossible_names(name: str) -> None:
    """A name that LISTEN_FDNAMES cannot hold is refused, and nothing is left behind."""
    with (
        memfds(1) as (fd,),
        nothing_left(),
        pytest.raises(ListenEnvironmentError, match="FileDescriptorName"),
    ):
        spawn(["true"], [(fd, "good"), (fd, name)])


def test_nothing_passed() -> None:
    """Without descriptors the program has none of the four variables, also if the caller has."""
    stale = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_PIDFDID": "1", "LISTEN_FDNAMES": "x"}

    assert environment(environ={**stale, "LISTEN": "kept"}) == {"LISTEN": "kept"}


def test_systemd_socket_activate_writes_the_same(tmp_path: Path) -> None:
    """The LISTEN_* of systemd-socket-activate are ours, but for LISTEN_PIDFDID, which it has since 259."""
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        missing("systemd-socket-activate is not installed")
    words = [activate, "-l", str(tmp_path / "a"), "-l", str(tmp_path / "b"), "--fdname=web:api", "/bin/cat"]
    with pipe() as (out, out_end), pipe() as (err, err_end), socket.socket(socket.AF_UNIX) as client:
        child = spawn([*words, "/proc/self/environ"], stdout=out_end, stderr=err_end)
        os.close(out_end)
        os.close(err_end)
        read_until(err, b"as 4.")
        client.connect(str(tmp_path / "a"))
        theirs = dict(entry.split("=", 1) for entry in read_to_end(out).decode().split("\0")[:-1])
        assert theirs.pop("LISTEN_PID") == str(child.pid)
        assert ended(child) == 0
    with memfds(2) as (web, other):
        ours = environment([(web, "web"), (other, "api")])
    ours.pop("LISTEN_PID")
    expected, found = (
        {
            name: value
            for name, value in each.items()
            if name.startswith("LISTEN") and name != "LISTEN_PIDFDID"
        }
        for each in (theirs, ours)
    )

    assert found == expected


def test_libsystemd_agrees() -> None:
    """sd_listen_fds_with_names(3) of the installed libsystemd takes what is passed."""
    judge = """if True:
        import ctypes
        names = ctypes.POINTER(ctypes.c_char_p)()
        count = ctypes.CDLL("libsystemd.so.0").sd_listen_fds_with_names(1, ctypes.byref(names))
        print(count, [names[place] for place in range(count)])
    """
    with memfds(3) as fds:
        code, out, err = output(
            [sys.executable, "-I", "-S", "-c", judge], list(zip(fds, ["web", "", "a b"], strict=True))
        )
    if b"libsystemd.so.0: cannot open" in err:
        missing("libsystemd is not installed")

    assert (code, out, err) == (0, b"3 [b'web', b'', b'a b']\n", b"")


def test_python_systemd_agrees() -> None:
    """listen_fds_with_names() of python-systemd takes what is passed."""
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("systemd.daemon"):
            judge = "from systemd import daemon; print(daemon.listen_fds_with_names())"
            with memfds(2) as (web, other):
                seen = output([sys.executable, "-c", judge], [(web, "web"), (other, "")])

            assert seen == (0, b"{3: 'web', 4: ''}\n", b"")
            return
    missing("systemd-python is not installed")


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="empty"),
        pytest.param({"LC_CTYPE": "C"}, id="locale that Python would replace"),
        pytest.param({"LC_CTYPE": ""}, id="empty locale"),
        pytest.param({"LC_CTYPE": "ja_JP.SJIS", "LANG": "de_DE.ISO-8859-1"}, id="other locale"),
        pytest.param({"LC_ALL": "C"}, id="LC_ALL"),
        pytest.param({"PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere"}, id="where Python is not"),
        pytest.param(
            {"PYTHONHASHSEED": "bad", "PYTHONSTARTUP": "/nowhere", "PYTHONINSPECT": "1"}, id="Python"
        ),
        pytest.param({"LINES": "a\nb\n", "EQUALS": "a=b=c", "EMPTY": "", "with space": " "}, id="odd values"),
        pytest.param({"é": "ü", os.fsdecode(b"\xff\xfe"): os.fsdecode(b"\x80\xe9\n")}, id="not UTF-8"),
        pytest.param({"NOTIFY_SOCKET": "@x", "LONG": "x" * 100_000}, id="long"),
    ],
)
def test_environment_is_exact(environ: dict[str, str]) -> None:
    """The program has the given environment to the byte, and nothing more."""
    assert environment(environ=environ) == environ


def test_environment_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the program has the environment of the caller, which is not touched."""
    monkeypatch.setenv("LISTEN_FDS", "7")
    monkeypatch.setenv("SDLISTEN_TEST", "é")
    before = dict(os.environ)
    found = environment()

    assert found == {name: value for name, value in before.items() if name != "LISTEN_FDS"}
    assert dict(os.environ) == before


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "de_DE.ISO-8859-1"])
def test_words_are_exact(locale: str) -> None:
    """Arguments arrive to the byte, UTF-8 or not, in whatever locale."""
    words = [b"\xff\xe9", "ü €".encode(), b"", b" -c ", b"\n", b"\\\"'", b"-I"]
    command = [b"/bin/sh", b"-c", b"cat /proc/$$/cmdline", *words]
    code, out, err = output(command, environ={"LC_ALL": locale, "PATH": PATH})

    assert (code, out.split(b"\0")[:-1], err) == (0, command, b"")


def program(path: Path, text: str = "#!/bin/sh\necho $0\n", mode: int = 0o755) -> Path:
    """Write a script."""
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("kind", [os.fspath, os.fsencode, Path])
def test_program_whose_path_is_not_utf8(kind: Callable[[Path], str | bytes | Path], tmp_path: Path) -> None:
    """A program is given by str, bytes or Path, whatever bytes its path has."""
    path = program(tmp_path / os.fsdecode(b"\xff\xe9"))

    assert output([kind(path)], environ={}) == (0, os.fsencode(path) + b"\n", b"")


def test_looks_in_the_path_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is looked up in its own PATH, not in the caller's, past what cannot be executed."""
    parts = [tmp_path / name for name in ("absent", "empty", "refused", "here", "later")]
    for part in parts[1:]:
        part.mkdir()
    program(parts[2] / "tool", mode=0o644)
    program(parts[3] / "tool")
    program(parts[4] / "tool")
    file = program(tmp_path / "file")
    monkeypatch.setenv("PATH", os.fspath(parts[4]))
    path = ":".join(map(os.fspath, (file, *parts)))

    assert output(["tool"], environ={"PATH": path}) == (0, f"{parts[3]}/tool\n".encode(), b"")


def test_default_path() -> None:
    """Without PATH, programs are found where the system has them."""
    assert output(["true"], environ={}) == (0, b"", b"")


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("/absent", 127, "no such file"),
        ("/no-interpreter", 127, "its interpreter (see its first line) or loader is missing"),
        ("/file/below", 127, "no such file"),
        ("/no-permission", 126, "Permission denied"),
        ("", 126, "Permission denied"),
        ("/no-program", 126, "Exec format error"),
    ],
)
def test_program_that_cannot_be_executed(name: str, code: int, why: str, tmp_path: Path) -> None:
    """A program that cannot be executed ends with a shell's code and one line that says why."""
    program(tmp_path / "no-interpreter", "#!/nowhere/sh\n")
    program(tmp_path / "no-permission", mode=0o644)
    program(tmp_path / "no-program", "words\n")
    program(tmp_path / "file")
    path = f"{tmp_path}{name}"

    assert output([path, "-x"]) == (code, b"", f"sdlisten: cannot execute '{path}': {why}\n".encode())


def test_program_that_is_not_found() -> None:
    """A program that is not in PATH ends with 127 and says where it was looked for, in printable words."""
    expected = rb"sdlisten: cannot execute 'no\udcff\n': not found in PATH='/nowhere:'" + b"\n"

    assert output([b"no\xff\n"], environ={"PATH": "/nowhere:"}) == (127, b"", expected)


NUMBERS = [
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD),
    *(signal.SIGUSR1, signal.SIGTSTP, signal.SIGXFSZ, signal.SIGRTMIN, signal.SIGRTMAX),
]


def test_signals_are_as_at_a_start() -> None:
    """No signal is blocked or ignored in the program, whatever the caller blocks, ignores and handles."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        for place, number in enumerate(NUMBERS):
            # Were this one ignored, the kernel would leave no child to be waited for.
            ignored = place % 2 == 0 and number != signal.SIGCHLD
            signal.signal(number, signal.SIG_IGN if ignored else lambda *_: None)
        code, out, _ = output(["/bin/cat", "/proc/self/status"])
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(NUMBERS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    found = dict(line.split(":\t") for line in out.decode().splitlines() if line.startswith("Sig"))
    # 32 and 33 are glibc's own; its posix_spawn ignores them in every program (spawni.c).
    own = 0b11 << 31

    assert code == 0
    assert [int(found[name], 16) & ~own for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


def test_session() -> None:
    """With new_session the program leads a session, else it is in the caller's."""
    led, joined = look(new_session=True), look()

    assert led["session"] == led["pid"]
    assert joined["session"] == os.getsid(0)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        pytest.param("true", TypeError, id="string"),
        pytest.param(b"true", TypeError, id="bytes"),
        pytest.param([3], TypeError, id="number"),
        pytest.param([], ValueError, id="nothing"),
        pytest.param([""], ValueError, id="empty program"),
        pytest.param(["true", "a\0b"], ValueError, id="NUL"),
    ],
)
def test_impossible_commands(command: list[str], error: type[Exception]) -> None:
    """What cannot be a command is refused, and nothing is left behind."""
    with memfds(1) as (fd,), nothing_left(), pytest.raises(error):
        spawn(command, [(fd, "x")])


@pytest.mark.parametrize("environ", [{"A=B": "c"}, {"A": "b\0c"}])
def test_impossible_environments(environ: dict[str, str]) -> None:
    """What cannot be an environment is refused, and nothing is left behind."""
    with memfds(1) as (fd,), nothing_left(), pytest.raises(ValueError, match=r"environment|null"):
        spawn(["true"], [(fd, "x")], environ=environ)


def test_too_long_a_command() -> None:
    """A word that the kernel does not take is an error at once, and nothing is left behind."""
    with memfds(1) as (fd,), nothing_left(), pytest.raises(OSError, match="too long") as caught:
        spawn(["true", "x" * 131_072], [(fd, "x")])

    assert caught.value.errno == errno.E2BIG


def test_descriptor_that_is_not_open() -> None:
    """A closed descriptor is named, and nothing is left behind."""
    with memfds(1) as (fd,), nothing_left(), pytest.raises(OSError, match="Bad file") as caught:
        spawn(["true"], [(fd, "x"), (4321, "y")])

    assert caught.value.errno == errno.EBADF
    assert caught.value.__notes__ == ["Descriptor 4321 was to become 4 in a new program."]


def test_descriptor_that_is_none() -> None:
    """A negative number is refused, and nothing is left behind."""
    with nothing_left(), pytest.raises(ValueError, match="negative"):
        spawn(["true"], stdin=-1)


def test_no_descriptor_left() -> None:
    """Whichever duplicate finds no number left, the error is EMFILE and nothing is left behind."""
    with memfds(1) as (fd,):
        count = max(open_files())
        lowest = 3 + count  # nothing is open from here on
        for limit in range(lowest - 1, lowest + count):
            with nothing_left(), descriptor_limit(limit), pytest.raises(OSError, match="Too many") as caught:
                spawn(["true"], [(fd, "x")] * count)
            assert caught.value.errno == errno.EMFILE
            assert caught.value.__notes__ == [
                f"RLIMIT_NOFILE is {limit}: each descriptor to be passed needs a free number twice.",
                f"Descriptor {fd} was to become {3 + max(limit - lowest, 0)} in a new program.",
            ]
        with nothing_left(), descriptor_limit(lowest + count):
            assert ended(spawn(["true"], [(fd, "x")] * count)) == 0


def test_no_descriptor_left_for_the_pidfd() -> None:
    """If there is no number for the pidfd, the process is killed and reaped before the error comes."""
    with nothing_left():
        lowest = os.dup(0)
        os.close(lowest)
        with descriptor_limit(lowest), pytest.raises(OSError, match="Too many"):
            spawn(["sleep", "60"])


def test_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that is gone is an OSError that names it, and nothing is left behind."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with memfds(1) as (fd,), nothing_left(), pytest.raises(FileNotFoundError) as caught:
        spawn(["true"], [(fd, "x")])

    assert caught.value.filename == str(tmp_path / "python")


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("frozen", True)])
def test_frozen_program(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen program, which would start itself again and again, is refused."""
    monkeypatch.setattr(sys, name, value, raising=False)
    with nothing_left(), pytest.raises(RuntimeError, match=r"sys\.executable is "):
        spawn(["true"])


def test_package_that_is_no_directory(tmp_path: Path) -> None:
    """It works from inside a zip file, so that it does not depend on a file that an upgrade may replace."""
    source = Path(sdlisten.__file__).parent
    with zipfile.ZipFile(tmp_path / "sdlisten.zip", "w") as archive:
        for path in source.glob("*.py"):
            archive.write(path, f"sdlisten/{path.name}")
    code = "from sdlisten.spawn import spawn; print(spawn(['sh', '-c', 'exit 7']).wait())"
    environ = {"PATH": PATH, "PYTHONPATH": str(tmp_path / "sdlisten.zip"), "PYTHONSAFEPATH": "1"}

    assert output([sys.executable, "-S", "-c", code], environ=environ) == (0, b"7\n", b"")


# Starts a program with its own 3 and 4 as stdin and stdout, then waits for its own end.
PARENT = """
import os, sys
from sdlisten.spawn import spawn
spawn(["sh", "-c", "echo up; exec cat"], stdin=3, stdout=4, pdeathsig=eval(sys.argv[1]))
os.close(3)
os.close(4)
os.read(0, 1)
"""


@contextlib.contextmanager
def orphan(pdeathsig: str) -> Iterator[tuple[int, int]]:
    """Start a program whose parent is then killed; give its stdin and stdout, as its parent had them."""
    with pipe() as (reading, to_program), pipe() as (from_program, writing), pipe() as (nothing, held):
        parent = spawn(
            [sys.executable, "-c", PARENT, pdeathsig], [(reading, ""), (writing, "")], stdin=nothing
        )
        os.close(reading)
        os.close(writing)
        read_until(from_program, b"up\n")
        parent.send_signal(signal.SIGKILL)
        assert ended(parent) == -signal.SIGKILL
        assert held > 0
        yield to_program, from_program


def test_dies_with_its_parent() -> None:
    """With pdeathsig a program gets the signal when its parent is killed."""
    with orphan("15") as (_, from_program):
        assert read_to_end(from_program) == b""


def test_survives_its_parent() -> None:
    """Without pdeathsig a program goes on when its parent is killed."""
    with orphan("None") as (to_program, from_program):
        os.write(to_program, b"still here")
        read_until(from_program, b"still here")
        os.close(to_program)
        assert read_to_end(from_program) == b""


@pytest.fixture
def waiting() -> Iterator[tuple[Child, int]]:
    """Give a program that ends with 5 once the descriptor beside it is closed."""
    with pipe() as (reading, writing):
        child = spawn(["sh", "-c", "read word; exit 5"], stdin=reading)
        yield child, writing
        if child.returncode is None and child.pidfd >= 0:
            child.send_signal(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                child.wait()
        child.close()


def test_wait_with_limit(waiting: tuple[Child, int]) -> None:
    """While the program runs, wait returns None when its time is over, also if that was before the call."""
    child, _ = waiting

    assert [child.wait(0), child.wait(-1), child.wait(0.001), child.returncode] == [None, None, None, None]


def test_wait_for_the_end(waiting: tuple[Child, int]) -> None:
    """A selector sees the end; wait returns the exit code, the second time from memory."""
    child, writing = waiting
    with selectors.DefaultSelector() as selector:
        selector.register(child, selectors.EVENT_READ)
        assert not selector.select(0)
        os.close(writing)
        assert selector.select(SECONDS), "the end was not seen"

    assert [child.wait(0), child.wait(), child.returncode] == [5, 5, 5]


def test_wait_without_limit(waiting: tuple[Child, int]) -> None:
    """Without a limit wait stays until the end."""
    child, writing = waiting
    os.close(writing)

    assert child.wait() == 5


def test_signal(waiting: tuple[Child, int]) -> None:
    """A signal reaches the program, its number is what wait returns, and later ones go nowhere."""
    child, _ = waiting
    child.send_signal(signal.SIGTERM)

    assert child.wait(SECONDS) == -signal.SIGTERM
    child.send_signal(signal.SIGTERM)


def test_reaped_by_somebody_else(waiting: tuple[Child, int]) -> None:
    """If something else in the process reaped the program, wait says so instead of inventing a code."""
    child, writing = waiting
    os.close(writing)
    os.waitpid(child.pid, 0)

    with pytest.raises(ChildProcessError):
        child.wait(0)


def test_close(waiting: tuple[Child, int]) -> None:
    """Closing leaves the program running; closing twice is harmless; the pidfd was close-on-exec."""
    child, writing = waiting
    pidfd = os.dup(child.pidfd)
    assert not os.get_inheritable(child.fileno())
    child.close()
    child.close()

    assert child.fileno() == -1
    survivor = Child(child.pid, pidfd)
    assert survivor.wait(0) is None
    os.close(writing)
    assert ended(survivor) == 5
