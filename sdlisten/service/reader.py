"""Bytes from a client, read into a buffer that can be looked at.

asyncio's StreamReader keeps to itself whether it holds bytes, and its transport reads before anybody asks. A
connection can be handed to another process, or closed without loss, only when nothing is held here; so these
readers read when somebody waits, and say what they have.
"""

from __future__ import annotations

import asyncio
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Transport

__all__ = ("DEFAULT_LIMIT", "FedReader", "Reader", "SocketReader")

DEFAULT_LIMIT = 65536
_CHUNK = 65536


class Reader:
    """What a client sent, with the methods and the semantics of asyncio.StreamReader.

    One task at a time may wait in it.

    Attributes:
        limit: How many bytes `readuntil` and `readline` look through.
        received: Whether anything ever came.
    """

    __slots__ = ("_buffer", "_eof", "_error", "_loop", "_waiter", "limit", "received")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.limit = DEFAULT_LIMIT
        self.received = False
        self._loop = loop
        self._buffer = bytearray()
        self._eof = False
        self._error: OSError | None = None
        self._waiter: Future[None] | None = None

    @property
    def buffered(self) -> int:
        """How many bytes are here and not read yet."""
        return len(self._buffer)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for more."""
        return self._waiter is not None

    @property
    def client_left(self) -> bool:
        """Whether the end or an error has come, and all before was read."""
        return self._over() and not self._buffer

    def at_eof(self) -> bool:
        """Return whether all was read, and no more will come."""
        return self._eof and not self._buffer

    def pending(self) -> bool:
        """Return whether there are bytes to read, here or in the kernel."""
        return bool(self._buffer)

    async def read(self, n: int = -1) -> bytes:
        """Return at most ``n`` bytes, as soon as there are any; all until the end if ``n`` is negative.

        Returns:
            ``b""`` at the end.

        Raises:
            ConnectionError: The connection broke, and all that came before was read.
        """
        if n < 0:
            while await self.more():
                pass
            return self._pop(len(self._buffer))
        if n and not self._buffer:
            await self.more()
        return self._pop(n)

    async def readexactly(self, n: int) -> bytes:
        """Return exactly ``n`` bytes.

        Raises:
            asyncio.IncompleteReadError: The end came before; it has what came.
            ConnectionError: The connection broke.
        """
        while len(self._buffer) < n:
            if not await self.more():
                raise asyncio.IncompleteReadError(self._pop(n), n)
        return self._pop(n)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Return what comes up to and including the separator.

        Raises:
            asyncio.IncompleteReadError: The end came before; it has what came.
            asyncio.LimitOverrunError: There is no separator in the first `limit` bytes, which stay unread.
            ConnectionError: The connection broke.
        """
        start = 0
        while True:
            at = self._buffer.find(separator, start)
            length = len(self._buffer) if at < 0 else at + len(separator)
            if length > self.limit:
                raise asyncio.LimitOverrunError(f"no {separator!r} within {self.limit} bytes", length)
            if at >= 0:
                return self._pop(length)
            start = max(0, length + 1 - len(separator))
            if not await self.more():
                raise asyncio.IncompleteReadError(self._pop(length), None)

    async def readline(self) -> bytes:
        """Return a line with its newline; the last one may lack it. ``b""`` at the end.

        Raises:
            asyncio.LimitOverrunError: It is longer than `limit`, and stays unread.
            ConnectionError: The connection broke.
        """
        try:
            return await self.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial

    async def more(self) -> bool:
        """Wait until there are more bytes than now; False at the end.

        Raises:
            ConnectionError: The connection broke.
            RuntimeError: Another task waits.
        """
        if self._waiter is not None:
            raise RuntimeError("two tasks read from one connection")
        before = len(self._buffer)
        if not self._over():
            self._waiter = self._loop.create_future()
            try:
                await self._wait(self._waiter)
            finally:
                self._waiter = None
        if len(self._buffer) > before:
            return True
        if self._error is not None:
            raise self._error
        return False

    def look(self) -> bool:
        """Look once whether anything came: bytes, the end, an error; whoever waits learns it."""
        raise NotImplementedError

    def detach(self) -> None:
        """Let this be the end of what the client sends."""
        raise NotImplementedError

    def _over(self) -> bool:
        return self._eof or self._error is not None

    async def _wait(self, waiter: Future[None]) -> None:
        await waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pop(self, n: int) -> bytes:
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken


class SocketReader(Reader):
    """Reads a non-blocking socket (*borrowed*), and only while somebody waits.

    The loop goes on watching the socket between two requests, so that waiting for the next one takes no
    system call but epoll_wait and recv.
    """

    __slots__ = ("_fd", "_on_uvloop", "_sock", "_watching")

    def __init__(self, loop: AbstractEventLoop, sock: socket.socket) -> None:
        super().__init__(loop)
        self._sock = sock
        self._fd = sock.fileno()
        self._watching = False
        self._on_uvloop = type(loop).__module__.startswith("uvloop")

    def pending(self) -> bool:
        """Return whether there are bytes to read, here or in the kernel."""
        if self._buffer or self._over():
            return bool(self._buffer)
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False  # nothing there, or nothing that can be read

    def look(self) -> bool:
        """Look once whether anything came, without waiting."""
        came = self._receive()
        if came:
            self._wake()
        return came

    def detach(self) -> None:
        """Let this be the end: leave the socket alone from now on; what is in the kernel stays there."""
        self._unwatch()
        self._eof = True
        self._wake()

    async def _wait(self, waiter: Future[None]) -> None:
        if not self._watching:
            # The first bytes are often here already, which saves the loop. Later ones go through it: a client
            # that sends faster than we answer must not keep everybody else waiting.
            if not self.received and self._receive():
                return
            self._loop.add_reader(self._fd, self._on_readable)
            self._watching = True
        await waiter

    def _on_readable(self) -> None:
        if self._waiter is None or self._waiter.done():
            self._unwatch()  # nobody wants more for now; what came stays in the kernel
        elif self._receive():
            if self._on_uvloop and not self._over():
                self._take_error()
            self._wake()

    def _take_error(self) -> None:
        """Ask for the error that waits behind the bytes just read: a reset that came with them.

        uvloop forgets the reader of a socket with an error after one call, and nobody would look again.
        """
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._error = OSError(code, os.strerror(code))
            self._unwatch()

    def _receive(self) -> bool:
        """Read once; returns whether there was anything: bytes, the end, an error."""
        if self._over():
            return True
        try:
            data = self._sock.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._error = error
        else:
            self._buffer += data
            self._eof = not data
            self.received = self.received or bool(data)
        if self._over():
            self._unwatch()
        return True

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._fd)


class FedReader(Reader):
    """Is fed by a transport (TLS), which it pauses when it has enough."""

    __slots__ = ("_paused", "_transport")

    def __init__(self, loop: AbstractEventLoop, transport: Transport) -> None:
        super().__init__(loop)
        self._transport = transport
        self._paused = False

    def feed(self, data: bytes) -> None:
        """Take what came."""
        self.received = True
        self._buffer += data
        if len(self._buffer) > 2 * self.limit and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def feed_end(self, error: Exception | None = None) -> None:
        """Take note that no more will come."""
        self._eof = True
        if isinstance(error, OSError):
            self._error = error
        self._wake()

    def look(self) -> bool:
        """Return whether anything came; the transport reads without being asked."""
        return bool(self._buffer) or self._over()

    def detach(self) -> None:
        """Let this be the end of what the client sends."""
        self.feed_end()

    async def _wait(self, waiter: Future[None]) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        await waiter
