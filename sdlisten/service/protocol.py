"""Connections served by asyncio protocols, such as those of an HTTP server: followed from outside.

A protocol can be exchanged for another one in the middle of a connection (WebSocket), and belongs to somebody
else. What every transport does in the end, asyncio's and uvloop's, plain and TLS, is to give up its socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from sdlisten.service.report import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from sdlisten.service.rules import Rules
    from sdlisten.service.table import Table

__all__ = ("ProtocolConnection", "ToldSocket")

_logger = logging.getLogger("sdlisten.service")


class ToldSocket(socket.socket):
    """A socket that says when it is closed or detached.

    Attributes:
        gone: Called then, once.
    """

    __slots__ = ("gone",)

    gone: Callable[[], None] | None

    def close(self) -> None:
        """Close it."""
        super().close()
        self._tell()

    def detach(self) -> int:
        """Give the descriptor up: uvloop closes it in C."""
        fd = super().detach()
        self._tell()
        return fd

    def _tell(self) -> None:
        gone, self.gone = self.gone, None
        if gone is not None:
            gone()


class ProtocolConnection:
    """One connection, its transport and its protocol.

    Attributes:
        outcome: How it will have ended.
        task: Connects the transport.
    """

    __slots__ = ("_rules", "_socket", "_table", "_transport", "outcome", "task")

    def __init__(self, sock: socket.socket, rules: Rules, table: Table) -> None:
        self._socket = ToldSocket(sock.family, sock.type | socket.SOCK_NONBLOCK, sock.proto, sock.detach())
        self._socket.gone = self._gone
        self._rules = rules
        self._table = table
        self._transport: asyncio.Transport | None = None
        self.outcome = Outcome.FINISHED
        self.task: asyncio.Task[None] | None = None

    def start(self, factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext | None) -> None:
        """Enter the table and connect a protocol; *takes ownership* of the socket."""
        if context is not None:
            self.outcome = Outcome.REFUSED  # until the handshake is done
        self._table.add(self)
        self.task = asyncio.get_running_loop().create_task(self._connect(factory, context))
        self.task.add_done_callback(self._connected)

    def begin_drain(self) -> bool:
        """Tell the protocol, if it wants to know."""
        if self._transport is not None:
            start_draining = getattr(self._transport.get_protocol(), "start_draining", None)
            if start_draining is not None:
                try:
                    start_draining()
                except Exception:
                    self._table.errors += 1
                    _logger.exception("start_draining() of %r raised", self._transport.get_protocol())
        return False

    def drop(self) -> None:
        """End at once, at the limit of the drain."""
        self.outcome = Outcome.CLOSED_IDLE if self._transport is None else Outcome.DROPPED
        if self._transport is not None:
            self._transport.abort()
        elif self.task is not None:
            self.task.cancel()

    async def _connect(
        self, factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext | None
    ) -> None:
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                factory, self._socket, ssl=context
            )
        except OSError as error:
            _logger.debug("TLS handshake failed: %r", error)
        except Exception:
            self._table.errors += 1
            _logger.exception("no protocol for a connection: %r raised", factory)
        else:
            self._transport = transport
            self.outcome = Outcome.FINISHED
            if self._rules.draining:
                self.begin_drain()

    def _connected(self, _task: asyncio.Task[None]) -> None:
        if self._transport is None:
            self._socket.close()

    def _gone(self) -> None:
        self._table.remove(self)
