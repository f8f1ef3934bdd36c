"""What a handler gets: one connection, its streams, and when to stop using it."""

from __future__ import annotations

from sdlisten.service.reader import DEFAULT_LIMIT, SocketReader
from sdlisten.service.writer import SocketWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import socket
    from typing import Any

    from sdlisten.listener import Listener
    from sdlisten.service.reader import Reader
    from sdlisten.service.rules import Rules
    from sdlisten.service.writer import Writer

__all__ = ("Connection",)


class Connection:
    """One accepted connection; the service makes it, and closes it when its handler returns.

    Use it on the loop's own thread only.

    Attributes:
        socket: The socket, non-blocking and close-on-exec; *borrowed*. Whoever reads or writes it directly
            counts as busy until the handler returns.
        peer: The client's address, as accept(2) gave it.
        listener: Where it was accepted; None if it was passed as one connection (``Accept=yes``).
    """

    __slots__ = (
        "__weakref__",
        "_in_drain",
        "_loop",
        "_reader",
        "_rules",
        "_silent_since",
        "_timer",
        "_told",
        "_waiting",
        "_writer",
        "listener",
        "peer",
        "socket",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: Any,  # noqa: ANN401 - each address family has its own shape
        listener: Listener | None,
        rules: Rules,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.socket = sock
        self.peer = peer
        self.listener = listener
        self._rules = rules
        self._loop = loop
        self._reader: Reader | None = None
        self._writer: Writer | None = None
        self._silent_since = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = False  # in idle(), for the next request
        self._in_drain = False  # the request in progress began after the drain did
        self._told: bool | None = None  # what `closing` said of the request in progress; None: nobody asked

    def __repr__(self) -> str:
        where = f" at {self.listener.address}" if self.listener else ""
        return f"<Connection fd={self.socket.fileno()} from {self.peer!r}{where}>"

    @property
    def closing(self) -> bool:
        """Whether the answer being written must tell the client that it is the last (``Connection: close``).

        True while the service drains and the client has sent nothing beyond this request. Ask when the
        request is read whole: what is unread then is the next one, which will be answered too.
        """
        self._told = self._rules.draining and not (self._reader is not None and self._reader.pending())
        return self._told

    def streams(self, *, limit: int = DEFAULT_LIMIT) -> tuple[Reader, Writer]:
        """Return the reader and the writer, always the same pair; with TLS they see the plain text.

        Args:
            limit: How many bytes the reader's ``readuntil`` and ``readline`` look through.
        """
        reader, writer = self._streams()
        reader.limit = limit
        return reader, writer

    async def idle(self) -> bool:
        """Say that nothing is owed to the client, and wait for its next request.

        Call it before each request, the first one too. What was written is sent before. Outside of a drain
        it costs no system call of its own: what comes is what the reader gives next.

        Returns:
            True: there is something to read. False: the client has left, another process has the connection,
            or the service stops and has closed it: just return.
        """
        reader, writer = self._streams()
        try:
            if writer.buffered:
                await writer.flush()
            began = not self._answered_last(reader) and (bool(reader.buffered) or await self._next(reader))
        except OSError:
            began = False
        self._told = None
        self._in_drain = self._rules.draining
        return began

    def _streams(self) -> tuple[Reader, Writer]:
        if self._reader is None or self._writer is None:
            self._reader = SocketReader(self._loop, self.socket)
            self._writer = SocketWriter(self._loop, self.socket)
        return self._reader, self._writer

    async def _next(self, reader: Reader) -> bool:
        """Wait until something comes; False if nothing will."""
        if reader.received:
            self._silent_since = self._loop.time()
        self._waiting = True
        try:
            return not (self._rules.draining and self._pass_on()) and await reader.more()
        finally:
            self._waiting = False
            self._stop_timer()

    def _answered_last(self, reader: Reader) -> bool:
        """Whether the client knows that no more answers come.

        A handler that never asks `closing` cannot tell it: the moment after an answer, with nothing more to
        read, is then as good as any.
        """
        if self._told is None:
            return self._in_drain and not reader.pending()
        return self._told

    def _pass_on(self) -> bool:
        """Hand an idle or fresh connection over, or else limit its silence; returns whether it is gone."""
        raise NotImplementedError

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
