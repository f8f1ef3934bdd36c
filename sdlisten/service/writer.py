"""Bytes to a client: written at once as far as the kernel takes them, the rest when it does."""

from __future__ import annotations

import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Transport
    from collections.abc import Iterable

__all__ = ("SocketWriter", "TransportWriter", "Writer")

# As asyncio's transports have them.
_HIGH = 65536
_LOW = 16384


class Writer:
    """What a client is sent, with the methods of asyncio.StreamWriter that have a meaning here.

    Attributes:
        wrote: Whether anything was ever written.
    """

    __slots__ = ("_closing", "_error", "_loop", "_waiters", "wrote")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.wrote = False
        self._loop = loop
        self._closing = False
        self._error: OSError | None = None
        self._waiters: list[Future[None]] = []

    @property
    def buffered(self) -> int:
        """How many bytes were written and are not in the kernel yet."""
        raise NotImplementedError

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, or keep what the kernel does not take yet; `drain` before writing much more.

        On a connection that is broken nothing happens; `drain` says so.

        Raises:
            RuntimeError: After `close` or `write_eof`.
            TypeError: It is no bytes-like object, or one that does not lie in one piece.
        """
        raise NotImplementedError

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write several pieces as one."""
        self.write(b"".join(data))

    async def drain(self) -> None:
        """Wait until the client has taken enough that more may be written.

        Raises:
            ConnectionError: The connection is broken.
        """
        raise NotImplementedError

    async def flush(self) -> None:
        """Wait until the kernel has all that was written.

        Raises:
            ConnectionError: The connection is broken.
        """
        raise NotImplementedError

    def can_write_eof(self) -> bool:
        """Return whether `write_eof` works; not on TLS."""
        raise NotImplementedError

    def write_eof(self) -> None:
        """Tell the client, after what was written, that no more will come; it may still send.

        Raises:
            NotImplementedError: The connection is TLS.
        """
        raise NotImplementedError

    def is_closing(self) -> bool:
        """Return whether nothing can be written any more."""
        return self._closing or self._error is not None

    def close(self) -> None:
        """Write no more. The client sees the end; the connection is closed when its handler returns."""
        self._closing = True

    async def wait_closed(self) -> None:
        """Wait until all is sent.

        Raises:
            ConnectionError: The connection is broken.
        """
        await self.flush()

    def fail(self, error: OSError) -> None:
        """Take note that the connection is broken; nothing more is sent."""
        self._error = self._error or error
        self._wake()

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError("write() after close() or write_eof()")

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class SocketWriter(Writer):
    """Writes to a non-blocking socket (*borrowed*)."""

    __slots__ = ("_buffer", "_eof_wanted", "_fd", "_sock", "_watching")

    def __init__(self, loop: AbstractEventLoop, sock: socket.socket) -> None:
        super().__init__(loop)
        self._sock = sock
        self._fd = sock.fileno()
        self._buffer = bytearray()
        self._watching = False
        self._eof_wanted = False

    @property
    def buffered(self) -> int:
        """How many bytes were written and are not in the kernel yet."""
        return len(self._buffer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, or keep what the kernel does not take yet; see `Writer.write`."""
        self._check_open()
        data = _as_bytes(data)
        self.wrote = True
        if self._error is not None:
            return
        sent = 0 if self._buffer else self._send(data)
        if sent < len(data):
            self._buffer += memoryview(data)[sent:]
            self._watch()

    async def drain(self) -> None:
        """Wait until the client has taken enough that more may be written; see `Writer.drain`."""
        if self._error is None and len(self._buffer) > _HIGH:
            await self._until(_LOW)
        elif self._error is not None:
            raise self._error

    async def flush(self) -> None:
        """Wait until the kernel has all that was written; see `Writer.flush`."""
        await self._until(0)

    def can_write_eof(self) -> bool:
        """Return True."""
        return True

    def write_eof(self) -> None:
        """Tell the client, after what was written, that no more will come; see `Writer.write_eof`."""
        self._closing = True
        self._eof_wanted = True
        if not self._buffer:
            self._shutdown()

    def close(self) -> None:
        """Write no more; the client sees the end."""
        if not self._closing:
            self.write_eof()

    def fail(self, error: OSError) -> None:
        """Take note that the connection is broken, and leave the socket alone."""
        if self._watching:
            self._watching = False
            self._loop.remove_writer(self._fd)
        self._buffer.clear()
        super().fail(error)

    async def _until(self, level: int) -> None:
        while self._error is None and len(self._buffer) > level:
            await self._wait()
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        if not self._watching and self._error is None:
            self._watching = True
            self._loop.add_writer(self._fd, self._on_writable)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.fail(error)
            return len(data)

    def _on_writable(self) -> None:
        del self._buffer[: self._send(self._buffer)]
        if not self._buffer and self._watching:
            self._watching = False
            self._loop.remove_writer(self._fd)
            if self._eof_wanted:
                self._shutdown()
        if len(self._buffer) <= _LOW:
            self._wake()

    def _shutdown(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.fail(error)  # ENOTCONN: the client has reset the connection


class TransportWriter(Writer):
    """Writes to a transport (TLS)."""

    __slots__ = ("_paused", "_transport")

    def __init__(self, loop: AbstractEventLoop, transport: Transport) -> None:
        super().__init__(loop)
        self._transport = transport
        self._paused = False

    @property
    def buffered(self) -> int:
        """How many bytes were written and are not in the kernel yet."""
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, or keep what cannot be sent yet; see `Writer.write`."""
        self._check_open()
        data = _as_bytes(data)
        self.wrote = True
        if self._error is None:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has taken enough that more may be written; see `Writer.drain`."""
        while self._paused and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def flush(self) -> None:
        """Do what `drain` does: what the transport holds, it sends before it closes."""
        await self.drain()

    def can_write_eof(self) -> bool:
        """Return False: asyncio's TLS cannot."""
        return False

    def write_eof(self) -> None:
        """Raise NotImplementedError: asyncio's TLS cannot."""
        raise NotImplementedError("TLS in asyncio knows no write_eof()")

    def close(self) -> None:
        """Write no more; the transport closes after what was written."""
        super().close()
        self._transport.close()

    def pause(self, paused: bool) -> None:
        """Take note that the transport has too much, or not any more."""
        self._paused = paused
        if not paused:
            self._wake()


def _as_bytes(data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    """Return data whose len() and slices count bytes: of a view they count elements, send(2) bytes."""
    return data if isinstance(data, (bytes, bytearray)) else memoryview(data).cast("B")
