"""Lines of our own, and what the children write: unchanged, and its end remembered."""

from __future__ import annotations

import contextlib
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.supervisor.loop import Loop

__all__ = ("Output", "Relay", "Tail", "say")

# A pipe that is writable takes that many bytes without waiting (PIPE_BUF), and takes them whole.
_BLOCK = 4096
_TAIL = 4096
_TAIL_LINES = 20
_STDERR = 2


def say(text: str) -> None:
    """Write lines of our own to stderr, recognisable as such; what there is no room for is lost."""
    for line in text.splitlines():
        data = f"sdlisten: {line[: _BLOCK // 4]}\n".encode(errors="backslashreplace")
        if _has_room():
            with contextlib.suppress(OSError):  # nobody reads: no reason to stop serving
                os.write(_STDERR, data[:_BLOCK])


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
            while relay.forward():
                pass
            relay.close()
        self._loop.forget(_STDERR)

    def _go_on(self, _events: int) -> None:
        self._loop.forget(_STDERR)
        blocked, self._blocked = self._blocked, []
        for relay in blocked:
            relay.watch()


class Relay:
    """What one worker writes to its stderr, on its way to ours.

    Attributes:
        writer: The end for the worker; *borrowed*, until `close_writer`.
    """

    __slots__ = ("_loop", "_output", "_reader", "_tail", "writer")

    def __init__(self, loop: Loop, output: Output, tail: Tail) -> None:
        self._loop = loop
        self._output = output
        self._tail = tail
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
        if not _has_room():
            self._loop.forget(self._reader)
            self._output.wait_for_room(self)
            return False
        try:
            data = os.read(self._reader, _BLOCK)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self._tail.add(data)
        with contextlib.suppress(OSError):
            os.write(_STDERR, data)
        return True

    def close(self) -> None:
        """Give up what was not passed on; harmless twice."""
        self.close_writer()
        reader, self._reader = self._reader, -1
        if reader >= 0:
            self._output.remove(self)
            self._loop.forget(reader)
            os.close(reader)


def _has_room() -> bool:
    """Return whether a block can be written without waiting. If nobody reads, it can: it is lost."""
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    return bool(poll.poll(0))
