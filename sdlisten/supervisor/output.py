"""Lines of our own, and what the children write: unchanged, and its end remembered."""

from __future__ import annotations

import os
import select
import socket
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.supervisor.loop import Loop

__all__ = ("Output", "Relay", "Tail", "say")

# A pipe takes that many bytes whole, or none of them (PIPE_BUF).
_BLOCK = 4096
_REST = 16  # blocks at the end: what a pipe holds, unless somebody has made it larger
_TAIL = 4096
_TAIL_LINES = 20
_STDERR = 2


def say(text: str) -> None:
    """Write lines of our own to stderr, recognisable as such; what there is no room for is lost."""
    for line in text.splitlines():
        data = f"sdlisten: {line[: _BLOCK // 4]}\n".encode(errors="backslashreplace")
        _write(data[:_BLOCK])


class Tail:
    """The end of what the workers of one generation wrote."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = b""

    def add(self, data: bytes) -> None:
        """Remember it, and forget what came long before."""
        self._bytes = (self._bytes + data)[-_TAIL:]

    def __str__(self) -> str:
        return "\n".join(self._bytes.decode(errors="replace").splitlines()[-_TAIL_LINES:])


class Output:
    """Our stderr, as the way out for what workers write to theirs.

    Whoever reads it slowly slows the workers, as without us, and never the supervisor.
    """

    __slots__ = ("_blocked", "_loop", "_relays")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._blocked: list[Relay] = []
        self._relays: dict[Relay, None] = {}

    def relay(self, tail: Tail) -> Relay:
        """Make a way for one worker.

        Raises:
            OSError: No descriptor is left.
        """
        relay = Relay(self._loop, self, tail)
        self._relays[relay] = None
        return relay

    def wait_for_room(self, relay: Relay) -> None:
        """Let a worker wait until there is room."""
        self._blocked.append(relay)
        self._loop.watch(_STDERR, self._go_on, select.POLLOUT)

    def remove(self, relay: Relay) -> None:
        """Forget a way that has come to its end."""
        self._relays.pop(relay, None)

    def close(self) -> None:
        """Pass on what there is, and close what others may still write to; harmless twice."""
        for relay in list(self._relays):
            relay.forward_rest()
            relay.close()
        self._loop.forget(_STDERR)

    def _go_on(self, _events: int) -> None:
        self._loop.forget(_STDERR)
        blocked, self._blocked = self._blocked, []
        for relay in blocked:
            relay.watch()
            relay.forward()  # what it holds already makes nobody wake us


class Relay:
    """What one worker writes to its stderr, on its way to ours.

    Attributes:
        writer: The end for the worker; *borrowed*, until `close_writer`.
    """

    __slots__ = ("_block", "_loop", "_output", "_reader", "_tail", "writer")

    def __init__(self, loop: Loop, output: Output, tail: Tail) -> None:
        self._loop = loop
        self._output = output
        self._tail = tail
        self._block = b""  # taken from the worker, and not written yet
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self.watch()

    def watch(self) -> None:
        """Wait for more, if there can be more."""
        if self._reader >= 0:
            self._loop.watch(self._reader, self.forward)

    def close_writer(self) -> None:
        """Close our copy of the worker's end, so that it has an end of file."""
        writer, self.writer = self.writer, -1
        if writer >= 0:
            os.close(writer)

    def forward(self, _events: int = 0) -> bool:
        """Pass a block on; returns whether there was one, and room for it."""
        if self._reader < 0:
            return False
        if not self._block:
            try:
                self._block = os.read(self._reader, _BLOCK)
            except BlockingIOError:
                return False
            if not self._block:
                self.close()
                return False
            self._tail.add(self._block)
        self._block = self._block[_write(self._block) :]
        if self._block:
            self._loop.forget(self._reader)
            self._output.wait_for_room(self)
            return False
        return True

    def forward_rest(self) -> None:
        """Pass on what is in the pipe, but not for ever: a process that has outlived its worker may go on."""
        for _ in range(_REST):
            if not self.forward():
                return

    def close(self) -> None:
        """Give up what was not passed on; harmless twice."""
        self.close_writer()
        reader, self._reader = self._reader, -1
        if reader >= 0:
            self._output.remove(self)
            self._loop.forget(reader)
            os.close(reader)


def _write(data: bytes) -> int:
    """Write what there is room for, without waiting; returns how much. Where nobody reads all is lost."""
    try:
        return _write_now(data)
    except BlockingIOError:
        return 0
    except OSError:  # no reason to stop serving
        return len(data)


def _write_now(data: bytes) -> int:
    """Write to stderr without waiting.

    It is shared with workers, and others: they may fill it after a look at it, and O_NONBLOCK would be theirs
    too. A socket takes the wish with each call; a pipe or terminal can be opened once more, for us alone.
    """
    mode = os.fstat(_STDERR).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=_STDERR)
        try:
            return sock.send(data, socket.MSG_DONTWAIT)
        finally:
            sock.detach()
    # Not a file: that would be opened at its beginning. It does not wait for readers either.
    if stat.S_ISFIFO(mode) or os.isatty(_STDERR):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            ours = os.open(f"/proc/self/fd/{_STDERR}", flags)
        except OSError:  # of another user, or no descriptor is left: a look has to do
            poll = select.poll()
            poll.register(_STDERR, select.POLLOUT)
            if not poll.poll(0):
                return 0
        else:
            try:
                return os.write(ours, data)
            finally:
                os.close(ours)
    return os.write(_STDERR, data)
