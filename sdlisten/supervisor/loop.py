"""Wait for descriptors and signals, in one thread: poll(2), and a pipe that each signal writes to.

poll and not epoll: a closed descriptor that others hold too can be forgotten without surprises, and with no
events asked for it tells the end alone.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

__all__ = ("SIGNALS", "Loop", "Signals")

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGCHLD,
)
"""What the supervisor listens to; PID 1 gets only what it has a handler for."""

# Who starts us with these ignored does not want us to hear them: nohup(1), or `command &` in a script.
_LEFT_ALONE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_LONGEST_WAIT = 3600.0  # seconds; poll(2) counts milliseconds in an int


class Loop:
    """Calls back for whoever has something to read, write or end."""

    __slots__ = ("_callbacks", "_poll")

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], object]] = {}

    def watch(self, fd: int, callback: Callable[[int], object], events: int = select.POLLIN) -> None:
        """Call back with what poll(2) reports of a descriptor (*borrowed*), as often as it does.

        Args:
            fd: The descriptor, which is forgotten before it is closed.
            callback: It must not wait, also if there is nothing to do.
            events: What to report besides POLLHUP, POLLERR and POLLNVAL; 0 for no more than those.
        """
        self._poll.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        """Watch no longer; harmless for a descriptor that is not watched."""
        if self._callbacks.pop(fd, None):
            self._poll.unregister(fd)

    def wait(self, deadline: float) -> None:
        """Wait until something happens or the time has come, and call back for all that happened.

        Args:
            deadline: By `time.monotonic`; infinite for none.
        """
        seconds = min(max(deadline - time.monotonic(), 0), _LONGEST_WAIT)
        seen = self._poll.poll(math.ceil(seconds * 1000))
        callbacks = [(fd, self._callbacks.get(fd), events) for fd, events in seen]
        for fd, callback, events in callbacks:
            # Not if one before has forgotten this one: the number may be another descriptor's by now.
            if callback and self._callbacks.get(fd) is callback:
                callback(events)


class Signals:
    """Signals as something to read. A handler is there for each, so that PID 1 gets them too.

    Nothing happens in a handler; the pipe is written by Python's own, in C.
    """

    __slots__ = ("_before", "_mask", "_previous", "_reader", "_writer")

    def __init__(self, numbers: Iterable[int]) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A pipe that is full holds each signal often enough.
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        heard = [number for number in numbers if number not in _LEFT_ALONE or not _is_ignored(number)]
        self._before = {number: signal.signal(number, _wake) for number in heard}
        # Who started us may have blocked them, as our own command does on its way here.
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)

    def fileno(self) -> int:
        """Return what to watch; *borrowed*."""
        return self._reader

    def take(self) -> list[int]:
        """Return those that came, each once, in the order of their first coming."""
        try:
            came = os.read(self._reader, 65536)
        except BlockingIOError:
            return []
        return list(dict.fromkeys(came))

    def close(self) -> None:
        """Restore what was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._previous)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        os.close(self._reader)
        os.close(self._writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _wake(_number: int, _frame: object) -> None:
    """Do nothing: the signal is in the pipe already."""
