"""The last step before a program that finds descriptors at 3: say that they are its own, and become it.

LISTEN_PID and LISTEN_PIDFDID are known only in the process that will be the program. So `sdlisten.spawn`
starts the text of this file with ``python -I -S -X utf8 -c``, and that becomes the program by execve(2).

It has to cost little: it imports what is built in and loaded anyway (`os` costs 1 ms more, `signal` 4 ms).
It is plain ASCII, being an argument itself.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # the built-in half of signal, for which there are no stubs
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

__all__ = ("close_from", "die_with_parent", "execute", "main", "pidfdid", "reset_signals", "stamp")

# Exit codes of a shell that cannot start a program.
_CANNOT_EXECUTE = 126
_NOT_FOUND = 127

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(words: Sequence[str], *, execve: Callable[..., object] = posix.execve) -> int:
    """Become a program, as `sdlisten.spawn` ordered.

    Args:
        words: The value that LC_CTYPE shall have, after "=", or "" for no such variable; ``SIGNAL:PARENT``
            for `die_with_parent`, or ""; the command.
        execve: What replaces the process.

    Returns:
        The exit code of a shell that cannot start a program; a line on stderr says why.
    """
    reset_signals()
    ctype, death, *command = [word.encode("utf-8", "surrogateescape") for word in words]
    environ = posix.environ
    # Where the locale is C, Python puts LC_CTYPE=C.UTF-8 into the environment, under -I as well (PEP 538).
    environ.pop(b"LC_CTYPE", None)
    if ctype:
        environ[b"LC_CTYPE"] = ctype[1:]
    count = int(environ.get(b"LISTEN_FDS", b"0"))
    if count:
        stamp(environ, posix.getpid(), pidfdid())
    if death:
        number, parent = map(int, death.split(b":"))
        try:
            die_with_parent(number, parent)
        except (ImportError, OSError) as error:
            return _refuse(command[0], f"PR_SET_PDEATHSIG: {error}", _CANNOT_EXECUTE)
    # The lifeline of `sdlisten.spawn`, if there is one, stands behind what LISTEN_FDS counts.
    close_from(3 + count + (b"SDLISTEN_LIFELINE_FD" in environ))
    return execute(command, environ, execve=execve)


def reset_signals() -> None:
    """Undo what every Python does to signals at its start."""
    # SIGPIPE and SIGXFSZ are ignored, and stay so through exec. SIGINT would print a traceback.
    for number in (_signal.SIGINT, _signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def stamp(environ: MutableMapping[bytes, bytes], pid: int, pidfdid: int | None) -> None:
    """Mark a process as the one that LISTEN_FDS is meant for.

    Args:
        environ: Its environment; LISTEN_PID and LISTEN_PIDFDID are written into it.
        pid: Its pid.
        pidfdid: Its `pidfdid`; None removes the variable, for a wrong one makes libsystemd refuse everything.
    """
    environ[b"LISTEN_PID"] = b"%d" % pid
    environ.pop(b"LISTEN_PIDFDID", None)
    if pidfdid is not None:
        environ[b"LISTEN_PIDFDID"] = b"%d" % pidfdid


def pidfdid() -> int | None:
    """Return the inode of this process's pidfd, which no other process ever has; exec does not change it.

    None where it says nothing: before Linux 6.9 every pidfd has the anonymous inode that an eventfd has too,
    and with 32 bits st_ino is half of what libsystemd (pidfd_get_inode_id) reads by name_to_handle_at(2).
    """
    opened = []
    try:
        opened.append(posix.pidfd_open(posix.getpid(), 0))
        opened.append(posix.eventfd(0))
        pidfd, anonymous = map(posix.fstat, opened)
    except (AttributeError, OSError):  # not Linux; an older kernel; a sandbox; no descriptor left
        return None
    finally:
        for fd in opened:
            posix.close(fd)
    return pidfd.st_ino if pidfd.st_dev != anonymous.st_dev and sys.maxsize > 2**32 else None


def close_from(lowest: int) -> None:
    """Close every descriptor from a number on."""
    try:
        # Not closerange at once: where it has no close_range(2), it tries each number up to a limit, and some
        # containers set that to 2**30.
        fds = [int(name) for name in posix.listdir("/proc/self/fd")]
    except OSError:  # /proc is not mounted
        posix.closerange(lowest, posix.sysconf("SC_OPEN_MAX"))
        return
    for fd in fds:
        if fd >= lowest:
            try:  # noqa: SIM105 -- contextlib would have to be imported
                posix.close(fd)
            except OSError:  # listdir had it
                pass


def die_with_parent(number: int, parent: int) -> None:
    """Ask for a signal at the death of the thread that started this process (PR_SET_PDEATHSIG, prctl(2)).

    Args:
        number: The signal. It comes at once if the parent is gone.
        parent: Pid of the process which that thread belongs to.

    Raises:
        ImportError: This Python was built without ctypes.
        OSError: The kernel refused.
    """
    import ctypes  # noqa: PLC0415 -- 3 ms that only those pay who ask for this

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)):
        error = ctypes.get_errno()
        raise OSError(error, posix.strerror(error))
    # If it died before, prctl now waits for the death of whoever adopted us.
    if posix.getppid() != parent:
        posix.kill(posix.getpid(), number)


def execute(
    command: Sequence[bytes],
    environ: MutableMapping[bytes, bytes],
    *,
    execve: Callable[..., object] = posix.execve,
) -> int:
    """Become a program, looked up as execvp(3) does, but in the PATH that it will have itself.

    Args:
        command: The program and its arguments.
        environ: Its whole environment.
        execve: What replaces the process.

    Returns:
        Only if that failed, after a line on stderr: 127 if the program was not found, 126 for other reasons.
    """
    name = command[0]
    path = environ.get(b"PATH", b"/bin:/usr/bin")
    programs = [name] if b"/" in name else [b"%b/%b" % (part or b".", name) for part in path.split(b":")]
    refused: tuple[bytes, str | None, int] | None = None
    for program in programs:
        try:
            execve(program, command, environ)
        except (FileNotFoundError, NotADirectoryError):
            if refused is None and posix.access(program, posix.F_OK):
                refused = program, "its interpreter (see its first line) or loader is missing", _NOT_FOUND
        except PermissionError as error:
            refused = refused or (program, error.strerror, _CANNOT_EXECUTE)
        except OSError as error:
            return _refuse(program, error.strerror, _CANNOT_EXECUTE)
    where = "no such file" if b"/" in name else f"not found in PATH={_text(path)}"
    return _refuse(*refused or (name, where, _NOT_FOUND))


def _refuse(program: bytes, why: str | None, code: int) -> int:
    line = f"sdlisten: cannot execute {_text(program)}: {why}\n"
    try:  # noqa: SIM105 -- contextlib would have to be imported
        posix.write(2, line.encode())
    except OSError:  # nobody reads: the exit code has to do
        pass
    return code


def _text(name: bytes) -> str:
    return repr(name.decode("utf-8", "surrogateescape"))


if __name__ == "__main__":  # pragma: no cover -- under -I -S nothing can measure
    posix._exit(main(sys.argv[1:]))  # noqa: SLF001 -- public as os._exit, but os is not imported
