"""The last step before the program, in this process and, where it would harm, in one of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import posix
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdlisten import exec_shim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SHIM = Path(exec_shim.__file__)
CHANGED = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
MANY = b"100000"


class Exec:
    """Stands in for execve, which does not return when it succeeds; keeps what it was asked."""

    def __init__(self, **failures: int) -> None:
        """Fail as told for a directory of this name, elsewhere with ENOENT."""
        self.failures = failures
        self.asked: list[tuple[bytes, list[bytes], dict[bytes, bytes]]] = []

    def __call__(self, program: bytes, command: Sequence[bytes], environ: Mapping[bytes, bytes]) -> None:
        """Fail."""
        self.asked.append((program, list(command), dict(environ)))
        number = self.failures.get(program.decode().split("/")[-2], errno.ENOENT)
        raise OSError(number, os.strerror(number))


def run(*words: str | bytes) -> subprocess.CompletedProcess[bytes]:
    """Run the shim as a program."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", SHIM, *words]
    return subprocess.run(command, capture_output=True, timeout=20, check=False)


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Exec]]:
    """Give `main` in this process, with an environment of its own; signals are put back afterwards."""
    before = {number: signal.getsignal(number) for number in CHANGED}

    def main(environ: dict[bytes, bytes], *words: str, code: int = 127) -> Exec:
        execve = Exec()
        monkeypatch.setattr(posix, "environ", environ)
        assert exec_shim.main(words, execve=execve) == code
        return execve

    yield main
    for number, handler in before.items():
        signal.signal(number, handler)


def test_text() -> None:
    """Its text can be an argument in any locale, and loads nothing that a bare interpreter has not loaded."""
    assert SHIM.read_bytes().isascii()
    code = (
        "import sys; before = set(sys.modules); "
        "exec(compile(open(sys.argv[1]).read(), 'shim', 'exec'), {'__name__': 'shim'}); "
        "print(*set(sys.modules) - before)"
    )
    seen = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", code, SHIM],
        capture_output=True,
        timeout=20,
        check=True,
    )

    assert seen.stdout.split() == [b"__future__"]


def test_stamp() -> None:
    """The two variables that name the process are replaced, the others stay."""
    environ = {b"LISTEN_PID": b"1", b"LISTEN_PIDFDID": b"2", b"LISTEN_FDS": b"3", b"A": b"b"}
    exec_shim.stamp(environ, 41, 2**63)

    assert environ == {
        b"LISTEN_PID": b"41",
        b"LISTEN_PIDFDID": b"9223372036854775808",
        b"LISTEN_FDS": b"3",
        b"A": b"b",
    }


def test_stamp_without_pidfdid() -> None:
    """Where pidfds identify nothing, LISTEN_PIDFDID of another process does not stay."""
    environ = {b"LISTEN_PIDFDID": b"2"}
    exec_shim.stamp(environ, 41, None)

    assert environ == {b"LISTEN_PID": b"41"}


def anonymous(_pid: int, _flags: int) -> int:
    """Give a pidfd as before Linux 6.9: one of the anonymous inode."""
    return os.eventfd(0)


def refused(_pid: int, _flags: int) -> int:
    """Give no pidfd, as a sandbox may."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_pidfdid() -> None:
    """It is the inode that others see on a pidfd of this process, and it leaves no descriptor open."""
    pidfd, other = os.pidfd_open(os.getpid()), os.eventfd(0)
    pidfs = os.fstat(pidfd).st_dev != os.fstat(other).st_dev
    expected = os.fstat(pidfd).st_ino if pidfs else None
    os.close(pidfd)
    os.close(other)
    before = os.listdir("/proc/self/fd")

    assert exec_shim.pidfdid() == expected
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("pidfd_open", [anonymous, refused])
def test_pidfdid_that_identifies_nothing(
    pidfd_open: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pidfd has no inode of its own, or there is none, there is no number; nothing stays open."""
    monkeypatch.setattr(posix, "pidfd_open", pidfd_open)
    before = os.listdir("/proc/self/fd")

    assert exec_shim.pidfdid() is None
    assert os.listdir("/proc/self/fd") == before


def test_pidfdid_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without pidfd_open has no number."""
    monkeypatch.delattr(posix, "pidfd_open")

    assert exec_shim.pidfdid() is None


def test_pidfdid_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 32 bits, where st_ino is cut off, there is no number."""
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)

    assert exec_shim.pidfdid() is None


def no_proc(_path: str) -> list[str]:
    """Fail as where /proc is not mounted."""
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def with_its_own(path: str) -> list[str]:
    """List a descriptor more, as where the one that listdir uses is the last."""
    return [*os.listdir(path), "399"]


@pytest.mark.parametrize("listdir", [os.listdir, no_proc, with_its_own])
def test_close_from(listdir: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from a number on is closed, nothing below it, with /proc or without."""
    monkeypatch.setattr(posix, "listdir", listdir)
    below, first, last = (fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, number) for number in (300, 301, 400))
    assert (below, first, last) == (300, 301, 400)
    exec_shim.close_from(first)
    try:
        os.fstat(below)
        for fd in (first, last):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    finally:
        os.close(below)


def test_death_signal_that_is_none() -> None:
    """A number that is no signal is the kernel's error."""
    with pytest.raises(OSError, match="Invalid argument") as caught:
        exec_shim.die_with_parent(4321, os.getppid())

    assert caught.value.errno == errno.EINVAL


def test_death_signal() -> None:
    """The request is accepted, also for a parent that is gone; signal 0, here, is none."""
    exec_shim.die_with_parent(0, os.getppid())
    exec_shim.die_with_parent(0, os.getpid())


def test_parent_that_died_before() -> None:
    """If the parent is not the one meant, the signal comes at once and the program never starts."""
    seen = run("", f"{signal.SIGTERM:d}:{os.getppid()}", "echo")

    assert (seen.returncode, seen.stdout, seen.stderr) == (-signal.SIGTERM, b"", b"")


def test_parent_that_lives() -> None:
    """If the parent is the one meant, the program starts."""
    seen = run("", f"{signal.SIGTERM:d}:{os.getpid()}", "echo", "here")

    assert (seen.returncode, seen.stdout, seen.stderr) == (0, b"here\n", b"")


def test_no_ctypes(
    stamped: Callable[..., Exec], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A program that must die with its parent does not start where that cannot be asked for."""
    monkeypatch.setitem(sys.modules, "ctypes", None)
    execve = stamped({}, "", "15:1", "program", code=126)

    assert execve.asked == []
    assert capfd.readouterr().err.startswith(
        "sdlisten: cannot execute 'program': PR_SET_PDEATHSIG: import of ctypes halted"
    )


def test_main_with_descriptors(stamped: Callable[..., Exec]) -> None:
    """The program gets its words unchanged, an environment with its own pid, and default signals."""
    # More descriptors than this process can have, so that none of its own is closed.
    execve = stamped({b"LISTEN_FDS": MANY, b"LISTEN_PID": b"1"}, "", "", "/bin/program", "\udcff", "")
    expected = {b"LISTEN_FDS": MANY}
    exec_shim.stamp(expected, os.getpid(), exec_shim.pidfdid())

    assert execve.asked == [(b"/bin/program", [b"/bin/program", b"\xff", b""], expected)]
    assert [signal.getsignal(number) for number in CHANGED] == [signal.SIG_DFL] * len(CHANGED)


def test_stamps_the_environment_of_a_wrapper() -> None:
    """A wrapper with a pid of its own, here a shell, can make what was passed the program's own."""
    code = (
        "import os; from sdlisten.exec_shim import *; "
        "reset_signals(); stamp(os.environb, os.getpid(), pidfdid()); "
        "execute([b'sh', b'-c', b'echo $$ $LISTEN_PID; grep SigIgn /proc/self/status'], os.environb)"
    )
    environ = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    command = ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-c", code]
    pids, ignored = subprocess.run(
        command, env=environ, capture_output=True, timeout=20, check=True
    ).stdout.splitlines()

    assert pids.split()[0] == pids.split()[1]
    assert int(ignored.split()[1], 16) & 1 << signal.SIGPIPE - 1 == 0


@pytest.mark.parametrize(
    ("word", "expected"), [("", {}), ("=", {b"LC_CTYPE": b""}), ("=\udce9=", {b"LC_CTYPE": b"\xe9="})]
)
def test_main_restores_locale(word: str, expected: dict[bytes, bytes], stamped: Callable[..., Exec]) -> None:
    """LC_CTYPE, which Python may have replaced, is as it was before."""
    found = {b"LC_CTYPE": b"C.UTF-8", b"LISTEN_FDS": MANY}
    ((_, _, environ),) = stamped(found, word, "", "/program").asked

    assert {name: value for name, value in environ.items() if not name.startswith(b"LISTEN")} == expected


def executed(path: bytes | None, execve: Exec) -> tuple[int, list[bytes]]:
    """Execute "tool" with a PATH: the exit code, and where it was looked for."""
    code = exec_shim.execute([b"tool", b"-x"], {} if path is None else {b"PATH": path}, execve=execve)
    return code, [program for program, _, _ in execve.asked]


@pytest.mark.parametrize(
    ("path", "programs"),
    [
        (None, [b"/bin/tool", b"/usr/bin/tool"]),
        (b"", [b"./tool"]),
        (b"/nowhere/a::/nowhere/b/", [b"/nowhere/a/tool", b"./tool", b"/nowhere/b//tool"]),
    ],
)
def test_path(path: bytes | None, programs: list[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    """PATH is read as by execvp(3): in order, an empty part is the current directory."""
    assert executed(path, Exec()) == (127, programs)
    assert "'tool': not found in PATH=" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("failures", "code", "tried", "line"),
    [
        ({"a": errno.EACCES}, 126, 3, "'/nowhere/a/tool': Permission denied"),
        ({"b": errno.EACCES, "c": errno.ENOTDIR}, 126, 3, "'/nowhere/b/tool': Permission denied"),
        ({"a": errno.EACCES, "c": errno.EACCES}, 126, 3, "'/nowhere/a/tool': Permission denied"),
        ({"b": errno.ENOEXEC, "c": errno.EACCES}, 126, 2, "'/nowhere/b/tool': Exec format error"),
        ({"a": errno.EACCES, "b": errno.E2BIG}, 126, 2, "'/nowhere/b/tool': Argument list too long"),
    ],
    ids=["first", "second", "two", "no program", "too long"],
)
def test_refusals(
    failures: dict[str, int], code: int, tried: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The search goes on after a file that may not be executed, and ends at any other failure."""
    seen, programs = executed(b"/nowhere/a:/nowhere/b:/nowhere/c", Exec(**failures))

    assert (seen, len(programs)) == (code, tried)
    assert capfd.readouterr().err == f"sdlisten: cannot execute {line}\n"


def test_missing_interpreter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is there, but whose interpreter is not, is told from one that is not there."""
    (tmp_path / "tool").touch()
    path = os.fsencode(tmp_path)

    assert executed(b"/nowhere:%b:%b" % (path, path), Exec())[0] == 127
    why = "its interpreter (see its first line) or loader is missing"
    assert capfd.readouterr().err == f"sdlisten: cannot execute '{tmp_path}/tool': {why}\n"


def closed(_fd: int, _text: bytes) -> int:
    """Fail as where stderr is closed."""
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stderr closed the exit code alone says it."""
    monkeypatch.setattr(posix, "write", closed)

    assert executed(b"/nowhere", Exec(nowhere=errno.EACCES))[0] == 126
