"""The streams of a TLS connection: asyncio's transport below, our reader and writer above."""

from __future__ import annotations

import asyncio
from typing import cast

from sdlisten.service.reader import FedReader
from sdlisten.service.writer import TransportWriter

__all__ = ("StreamProtocol",)


class StreamProtocol(asyncio.Protocol):
    """Joins a transport to a reader and a writer, which exist once the handshake is done.

    Attributes:
        reader: What the client sends.
        writer: What it is sent.
        lost: Done when the connection is closed.
    """

    reader: FedReader
    writer: TransportWriter

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self.reader = FedReader(self._loop, self._transport)
        self.writer = TransportWriter(self._loop, self._transport)

    def data_received(self, data: bytes) -> None:
        """Pass on what came."""
        self.reader.feed(data)

    def eof_received(self) -> None:
        """Pass on that no more comes; TLS then closes the connection."""
        self.reader.feed_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake whoever waits."""
        self.reader.feed_end(exc)
        self.writer.fail(
            exc if isinstance(exc, OSError) else ConnectionResetError("the connection is closed")
        )
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        """Pass on that the transport has too much."""
        self.writer.pause(True)

    def resume_writing(self) -> None:
        """Pass on that it has room again."""
        self.writer.pause(False)

    def abort(self) -> None:
        """Close at once. Harmless twice."""
        if self._transport is not None:
            self._transport.abort()
