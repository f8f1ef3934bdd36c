"""Start a program with descriptors at 3, 4, ... as a manager does: the other side of sd_listen_fds(3).

LISTEN_PID is known only once the process exists, and Python code between fork and exec may deadlock where the
caller has threads. Hence three steps:

1. posix_spawn(3) puts the descriptors at their places, and signals back to how a program expects them;
2. a bare interpreter, `sdlisten.exec_shim`, completes the environment, and
3. becomes the program: same pid, execve(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import resource
import select
import signal
import sys

from sdlisten import exec_shim
from sdlisten.environment import LISTEN_FDS_START, VARIABLES, write_listen_environment
from sdlisten.lifeline import LIFELINE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ("Child", "spawn")

_RESETTABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class Child:
    """A program that `spawn` started.

    A selector can wait for its end: `fileno` becomes readable then.

    Attributes:
        pid: Its process.
        pidfd: A descriptor of the process (pidfd_open(2)), close-on-exec; this object owns it until `close`.
        returncode: How it ended, once `wait` has seen that: the exit code, or ``-n`` for signal n. Else None.
    """

    __slots__ = ("pid", "pidfd", "returncode")

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.returncode: int | None = None

    def fileno(self) -> int:
        """Return `pidfd`, for selectors; the caller *borrows* it."""
        return self.pidfd

    def send_signal(self, number: int) -> None:
        """Send a signal, if the program has not ended; never to another process that has got its pid since.

        Raises:
            OSError: The kernel refused it: EPERM, EINVAL, or EBADF after `close`.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end and reap the process.

        Args:
            timeout: Seconds. 0 only looks; None waits as long as it takes.

        Returns:
            `returncode`; None if the program is still running.

        Raises:
            ChildProcessError: Someone else has reaped it: os.wait elsewhere, or an ignored SIGCHLD.
        """
        if self.returncode is not None:
            return self.returncode
        if timeout is not None and timeout > 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            poll.poll(timeout * 1000)
        end = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | (0 if timeout is None else os.WNOHANG))
        if end is not None:
            self.returncode = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return self.returncode

    def close(self) -> None:
        """Close `pidfd`; the program is left alone, and closing again does nothing."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def spawn(
    command: Sequence[str | bytes | os.PathLike[str] | os.PathLike[bytes]],
    descriptors: Sequence[tuple[int, str]] = (),
    *,
    environ: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    lifeline: int | None = None,
    pdeathsig: int | None = None,
    new_session: bool = False,
) -> Child:
    """Start a program that finds descriptors at 3, 4, ... and all else as a manager leaves it.

    That is: no descriptor but those, 0, 1, 2 and the lifeline; no signal blocked or ignored. Descriptors are
    *borrowed*: the program gets duplicates, and shares with the caller what belongs to the open file, such as
    O_NONBLOCK.

    A program that cannot be executed ends as in a shell: with 127 if it was not found, else with 126, after a
    line on its stderr that says why.

    Args:
        command: The program and its arguments. Without a slash it is looked up in the PATH of `environ`.
        descriptors: What to pass, each with its name (FileDescriptorName), which may be "".
        environ: The environment of the program, exactly, except that the four LISTEN_* variables are written
            here, or left out if there are no `descriptors`. Default: a copy of `os.environ`.
        stdin: A descriptor to become its standard input. Default: the caller's own; likewise the next two.
        stdout: Its standard output.
        stderr: Its standard error.
        lifeline: A descriptor whose end of file will tell the program that the caller died. It comes after
            the others, is not counted among them, and its number is in SDLISTEN_LIFELINE_FD, which the
            program does not find otherwise.
        pdeathsig: A signal for the program at the death of the *thread* that calls this (PR_SET_PDEATHSIG,
            prctl(2)), even if that comes first. It does not survive the start of a set-user-ID program.
        new_session: Whether it leads a new session and process group (setsid(2)).

    Returns:
        The program; the caller *takes ownership* of its pidfd.

    Raises:
        TypeError: `command` is one string.
        ValueError: `command` is empty, a word or variable cannot be passed (a NUL, a "=" in a name), or a
            descriptor is negative.
        ListenEnvironmentError: A name cannot be a FileDescriptorName.
        RuntimeError: There is no interpreter: `sys.executable` is empty, or a frozen program.
        OSError: A descriptor is not open (EBADF), none is left (EMFILE), or no process could be made.
            No process and no descriptor is left behind.
    """
    program = _words(command)
    environment = dict(os.environ if environ is None else environ)
    for variable in (*VARIABLES, LIFELINE):
        environment.pop(variable, None)
    # The shim will replace LISTEN_PID: it alone knows.
    environment.update(write_listen_environment([name for _, name in descriptors], pid=os.getpid()))
    wanted = [(fd, place) for place, fd in enumerate((stdin, stdout, stderr)) if fd is not None]
    wanted += [(fd, place) for place, (fd, _) in enumerate(descriptors, LISTEN_FDS_START)]
    end = LISTEN_FDS_START + len(descriptors)
    if lifeline is not None:
        wanted.append((lifeline, end))
        environment[LIFELINE] = str(end)
        end += 1
    shim = _shim(environment.get("LC_CTYPE"), pdeathsig)
    with contextlib.ExitStack() as copies:
        pid = os.posix_spawn(
            sys.executable,
            [*shim, *program],
            environment,
            file_actions=_placed(wanted, end, copies),
            # A mask outlives exec: the children of a supervisor that blocks TERM would never hear it.
            setsigmask=(),
            setsigdef=_RESETTABLE,
            setsid=new_session,
        )
    try:
        return Child(pid, os.pidfd_open(pid))
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _words(command: Sequence[str | bytes | os.PathLike[str] | os.PathLike[bytes]]) -> list[bytes]:
    if isinstance(command, (str, bytes)):
        raise TypeError(f"command is {command!r}: expected a sequence of words, such as [{command!r}]")
    words = [os.fsencode(word) for word in command]
    if not words or not words[0]:
        raise ValueError(f"command is {command!r}: expected a program and its arguments")
    return words


def _shim(ctype: str | None, pdeathsig: int | None) -> list[str | bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError(
            f"sys.executable is {sys.executable!r}: starting programs needs a Python interpreter there; "
            f"run sdlisten from an installed Python, not from a frozen program"
        )
    orders = [
        "" if ctype is None else f"={ctype}",
        "" if pdeathsig is None else f"{pdeathsig:d}:{os.getpid()}",
    ]
    # -X utf8 reads and writes each byte of the words unchanged, whatever the locale.
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", _shim_text(), *orders]


@functools.cache
def _shim_text() -> bytes:
    """Return `sdlisten.exec_shim` as text, read once, from a directory or a zip file.

    A supervisor may live longer than the files of its version: it must not run the shim of another one.
    """
    text: bytes = exec_shim.__spec__.loader.get_data(exec_shim.__file__)  # type: ignore[union-attr]
    return text


def _placed(
    wanted: Iterable[tuple[int, int]], lowest: int, copies: contextlib.ExitStack
) -> list[tuple[int, int, int]]:
    """Copy descriptors out of the way of all places, and say how posix_spawn puts them there.

    A descriptor may stand at the place of another. And dup2 onto itself would leave close-on-exec set.
    """
    actions = []
    for fd, place in wanted:
        try:
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
        except OSError as error:
            raise _explained(error, fd, place) from None
        copies.callback(os.close, copy)
        actions.append((os.POSIX_SPAWN_DUP2, copy, place))
    return actions


def _explained(error: OSError, fd: int, place: int) -> OSError:
    if error.errno in {errno.EINVAL, errno.EMFILE}:
        # EINVAL: the lowest number asked for is already beyond the limit (fcntl(2)).
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        error.add_note(f"RLIMIT_NOFILE is {limit}: each descriptor to be passed needs a free number twice.")
    error.add_note(f"Descriptor {fd} was to become {place} in a new program.")
    return error
