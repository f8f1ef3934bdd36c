"""A connection as the service sees it: its handler runs, it drains, it is closed without loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from sdlisten.service.connection import Connection
from sdlisten.service.report import Outcome
from sdlisten.service.tls import StreamProtocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from typing import Any

    from sdlisten.listener import Listener
    from sdlisten.service.rules import Rules
    from sdlisten.service.table import Table

__all__ = ("ServedConnection",)

_logger = logging.getLogger("sdlisten.service")

# Seconds for which a client that is still sending may go on before its connection is closed for good.
_LINGER = 1.0


class ServedConnection(Connection):
    """A `Connection` with its task.

    Attributes:
        outcome: How it will have ended.
        task: Runs the handler.
    """

    __slots__ = ("_began", "_lingering", "_protocol", "_table", "_tls", "outcome", "task")

    def __init__(
        self,
        sock: socket.socket,
        peer: Any,  # noqa: ANN401 - each address family has its own shape
        listener: Listener | None,
        rules: Rules,
        table: Table,
    ) -> None:
        super().__init__(sock, peer, listener, rules, asyncio.get_running_loop())
        self._table = table
        self._began = False  # the handler has been called
        self._lingering = False  # all is answered, the client is still sending
        self._tls: ssl.SSLContext | None = None
        self._protocol: StreamProtocol | None = None  # after the handshake
        self.outcome = Outcome.FINISHED
        self.task: asyncio.Task[None] | None = None

    def start(
        self, handler: Callable[[Connection], Awaitable[object]], context: ssl.SSLContext | None
    ) -> None:
        """Enter the table and run the handler in a task; *takes ownership* of the socket."""
        if self.socket.family in {socket.AF_INET, socket.AF_INET6}:
            # As asyncio's own transports do. Not on the listener: its options are its other holders' too.
            with contextlib.suppress(OSError):  # the client has reset it already
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tls = context
        self._table.add(self)
        self.task = self._loop.create_task(self._run(handler))
        # Not a finally in the task: one that is cancelled before its first step never gets there.
        self.task.add_done_callback(self._ended)

    def begin_drain(self) -> bool:
        """Learn that the drain begins; returns whether a request is in progress."""
        if self._waiting or self._fresh:
            self._pass_on()
            return False
        return True

    def drop(self) -> None:
        """End at once, at the limit of the drain."""
        if not self._silence_over() and not self._lingering:
            self.outcome = Outcome.DROPPED
        self._close()
        if self.task is not None:
            self.task.cancel()

    @property
    def _fresh(self) -> bool:
        """Whether nothing was read or written yet."""
        if self._reader is None or self._writer is None:
            return not self._began
        return not (self._reader.received or self._writer.wrote)

    def _pass_on(self) -> bool:
        buffered = (self._reader and self._reader.buffered) or (self._writer and self._writer.buffered)
        if not buffered and self._tls is None and self._rules.hand_over(self):
            self.outcome = Outcome.HANDED_OVER
            self._close()
            return True
        received = self._reader is not None and self._reader.received
        silence = self._rules.idle_timeout if received else self._rules.fresh_timeout
        self._stop_timer()
        self._timer = self._loop.call_at(self._silent_since + silence, self._silence_over)
        return False

    def _silence_over(self) -> bool:
        """Close if nothing is owed to the client, and nothing has come in the last moment."""
        self._stop_timer()
        if self._reader is None:
            # A TLS handshake; or a handler that has not begun yet, and will ask.
            if self._tls is None or self._began or self.task is None:
                return False
            self.outcome = Outcome.CLOSED_IDLE
            self.task.cancel()
            return True
        if not (self._waiting or (self._fresh and self._reader.waiting)) or self._reader.look():
            return False
        self.outcome = Outcome.CLOSED_IDLE
        if self._tls is not None:
            self._reader.detach()  # the handler returns, and TLS says good-bye
            return True
        # A request that crosses our FIN is lost. One that comes between that look and the FIN can be seen,
        # and is counted for what it is.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            if self.socket.recv(1):
                self.outcome = Outcome.DROPPED
        self._close()
        return True

    async def _run(self, handler: Callable[[Connection], Awaitable[object]]) -> None:
        if self._tls is not None and not await self._handshake(self._tls):
            return
        self._began = True
        try:
            await handler(self)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            _logger.debug("%r: %r", self, error)
        except Exception:
            self._table.errors += 1
            _logger.exception("the handler of %r raised", self)
        with contextlib.suppress(OSError):
            await self._finish()

    async def _handshake(self, context: ssl.SSLContext) -> bool:
        protocol = StreamProtocol(self._loop)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, self.socket, ssl=context)
        except OSError as error:
            # ssl.SSLError and TimeoutError are among them: a port scan, a client without our certificate.
            self.outcome = Outcome.REFUSED
            _logger.debug("%r: TLS handshake failed: %r", self, error)
            return False
        self._protocol = protocol
        self._reader, self._writer = protocol.reader, protocol.writer
        return True

    async def _finish(self) -> None:
        """Send what was written, and close so that the client can read it."""
        if self._reader is None or self._writer is None or self.outcome is not Outcome.FINISHED:
            return
        if self._protocol is not None:
            self._writer.close()
            await asyncio.wait([self._protocol.lost], timeout=_LINGER)
            return
        await self._writer.flush()
        self._lingering = True
        if self._reader.pending():
            # close(2) with unread bytes resets the connection, and the client may lose the answer: say first
            # that no more comes, and read what it sends until it says the same.
            self._writer.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while await self._reader.read(1 << 16):
                        pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._close()
        self._table.remove(self)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a bug of ours; the loop reports it

    def _close(self) -> None:
        """Close at once. Harmless twice."""
        self._stop_timer()
        if self._protocol is not None:
            self._protocol.abort()
            return
        if self._reader is not None and self._writer is not None:
            self._reader.detach()
            self._writer.fail(ConnectionAbortedError("the service has closed the connection"))
        self.socket.close()
