"""The reader and the writer of a connection, on socket pairs."""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten.service.reader import Reader, SocketReader
from sdlisten.service.writer import SocketWriter, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Run = Callable[[Coroutine[Any, Any, None]], None]

DEADLINE = 20.0
RESET = b"\1\0\0\0\0\0\0\0"


class Pair:
    """A connection: our streams at one end, a bare socket at the other."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            self.near, _ = listener.accept()
        self.near.setblocking(False)
        loop = asyncio.get_running_loop()
        self.reader = SocketReader(loop, self.near)
        self.writer = SocketWriter(loop, self.near)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.detach()
        self.writer.fail(ConnectionAbortedError("the test is over"))
        self.near.close()
        self.far.close()

    def reset(self) -> None:
        """Close the far end with a reset."""
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.far.close()

    async def received(self, size: int) -> bytes:
        """Receive so many bytes at the far end."""
        self.far.setblocking(False)
        data = b""
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(self.far, size - len(data))
        return data


async def waiting(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a task and let it come to its first wait."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


def test_a_reader_reads(run: Run) -> None:
    """Everything asyncio's StreamReader reads comes in the same portions."""

    async def test() -> None:
        with Pair() as pair:
            reader = pair.reader
            assert not reader.received
            pair.far.send(b"one\ntwo\r\n\r\nthree")
            assert await reader.readline() == b"one\n"
            assert reader.received
            assert await reader.readuntil(b"\r\n\r\n") == b"two\r\n\r\n"
            assert reader.buffered == 5
            assert await reader.read(2) == b"th"
            assert await reader.readexactly(2) == b"re"
            assert await reader.read(0) == b""
            assert await reader.readexactly(0) == b""
            task = await waiting(reader.readexactly(6))
            pair.far.send(b" four")
            assert await task == b"e four"
            task = await waiting(reader.read())
            pair.far.send(b"the rest")
            pair.far.shutdown(socket.SHUT_WR)
            assert await task == b"the rest"
            assert reader.at_eof()
            assert await reader.read(1) == await reader.read() == await reader.readline() == b""
            assert await reader.more() is False

    run(test())


def test_a_separator_may_come_in_parts(run: Run) -> None:
    """A separator is found wherever the client's packets end."""

    async def test() -> None:
        with Pair() as pair:
            task = await waiting(pair.reader.readuntil(b"\r\n\r\n"))
            for byte in b"a\r\nb\r\n\r\nc":
                pair.far.send(bytes([byte]))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert await task == b"a\r\nb\r\n\r\n"
            assert await pair.reader.read(9) == b"c"

    run(test())


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=8), st.binary(min_size=1, max_size=3))
def test_readuntil_splits_as_bytes_do(parts: list[bytes], separator: bytes) -> None:
    """However the bytes come, `readuntil` gives the same pieces as splitting the whole."""
    whole = b"".join(parts)

    class Given(Reader):
        """Has its bytes from a list."""

        async def more(self) -> bool:
            if not left:
                return False
            self._buffer += left.pop(0)
            return True

    async def test() -> list[bytes]:
        reader = Given(asyncio.get_running_loop())
        pieces = []
        while True:
            try:
                pieces.append(await reader.readuntil(separator))
            except asyncio.IncompleteReadError as error:
                return [*pieces, error.partial]

    left = list(parts)
    *split, last = whole.split(separator)
    assert asyncio.run(test()) == [*(piece + separator for piece in split), last]


def test_what_is_too_long_stays_unread(run: Run) -> None:
    """A line beyond the limit is an error, with or without its end, and nothing is lost."""

    async def test() -> None:
        with Pair() as pair:
            pair.reader.limit = 4
            pair.far.send(b"12345\n")
            with pytest.raises(asyncio.LimitOverrunError, match="within 4 bytes"):
                await pair.reader.readline()
            assert await pair.reader.read(2) == b"12"
            assert await pair.reader.readline() == b"345\n"
            pair.far.send(b"12345")
            with pytest.raises(asyncio.LimitOverrunError):
                await pair.reader.readuntil(b"\n")
            assert await pair.reader.readexactly(5) == b"12345"

    run(test())


def test_the_end_in_the_middle(run: Run) -> None:
    """An end before all has come is an error that has what came; a last line may lack its newline."""

    async def test() -> None:
        for method, argument in (("readexactly", 10), ("readuntil", b"\n")):
            with Pair() as pair:
                pair.far.send(b"part")
                pair.far.shutdown(socket.SHUT_WR)
                with pytest.raises(asyncio.IncompleteReadError) as caught:
                    await getattr(pair.reader, method)(argument)
                assert caught.value.partial == b"part"
        with Pair() as pair:
            pair.far.send(b"part")
            pair.far.shutdown(socket.SHUT_WR)
            assert await pair.reader.readline() == b"part"

    run(test())


@pytest.mark.parametrize("sent", [b"", b"part"])
@pytest.mark.parametrize("early", [False, True], ids=["while-waiting", "before"])
def test_a_reset_is_an_error_after_what_came(run: Run, sent: bytes, *, early: bool) -> None:
    """What came before a reset can be read, if the kernel kept it; then every read raises."""

    async def test() -> None:
        with Pair() as pair:
            task = None if early else await waiting(pair.reader.read(100))
            if sent:
                pair.far.send(sent)
            pair.reset()
            first = task or pair.reader.read(100)
            if sent:
                assert await first == sent
            else:
                with pytest.raises(ConnectionResetError):
                    await first
            for _ in range(2):
                with pytest.raises(ConnectionResetError):
                    await pair.reader.read(100)
            assert not pair.reader.pending()

    run(test())


def test_one_task_at_a_time(run: Run) -> None:
    """A second task that reads is told so, and the first one gets its bytes."""

    async def test() -> None:
        with Pair() as pair:
            assert not pair.reader.waiting
            task = await waiting(pair.reader.read(10))
            assert pair.reader.waiting
            with pytest.raises(RuntimeError, match="two tasks"):
                await pair.reader.read(10)
            pair.far.send(b"bytes")
            assert await task == b"bytes"

    run(test())


def test_nothing_is_read_that_nobody_wants(run: Run) -> None:
    """Bytes that come while nobody waits stay in the kernel, and can still be had later."""

    async def test() -> None:
        with Pair() as pair:
            reader = pair.reader
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await reader.read(10)
            assert not reader.pending()
            pair.far.send(b"bytes")
            for _ in range(5):
                await asyncio.sleep(0)
            assert reader.buffered == 0
            assert reader.pending()
            assert pair.near.recv(10, socket.MSG_PEEK) == b"bytes"
            assert await reader.read(10) == b"bytes"

    run(test())


def test_a_detached_reader_leaves_the_socket_alone(run: Run) -> None:
    """After detach() whoever waits sees the end, and what is in the kernel is somebody else's."""

    async def test() -> None:
        with Pair() as pair:
            task = await waiting(pair.reader.read(10))
            pair.reader.detach()
            pair.far.send(b"bytes")
            assert await task == b""
            assert not pair.reader.pending()
            assert pair.near.recv(10) == b"bytes"

    run(test())


def test_the_abstract_streams_do_nothing() -> None:
    """What each kind of stream must bring is abstract in the common part."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        reader, writer = Reader(loop), Writer(loop)
        assert not reader.pending()
        for method in (reader.look, reader.detach, writer.can_write_eof, writer.write_eof):
            with pytest.raises(NotImplementedError):
                method()
        with pytest.raises(NotImplementedError):
            writer.write(b"")
        with pytest.raises(NotImplementedError):
            _ = writer.buffered
        for coroutine in (writer.drain, writer.flush):
            with pytest.raises(NotImplementedError):
                await coroutine()

    asyncio.run(test())


def test_a_writer_writes_at_once_and_the_rest_later(run: Run) -> None:
    """What the kernel takes is sent at once; drain() waits for room, flush() for the last byte."""

    async def test() -> None:
        with Pair() as pair:
            writer = pair.writer
            assert not writer.wrote
            writer.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
            assert writer.wrote
            assert writer.buffered == 0
            await writer.drain()
            await writer.flush()
            assert await pair.received(3) == b"abc"
            size = 8_000_000
            writer.write(b"x" * size)
            writer.write(b"y")
            assert 65536 < writer.buffered < size
            drained = await waiting(writer.drain())
            again = await waiting(writer.drain())
            flushed = await waiting(writer.flush())
            assert not drained.done()
            cancelled = await waiting(writer.flush())
            cancelled.cancel()
            assert (await pair.received(size + 1))[-2:] == b"xy"
            await drained
            await again
            await flushed
            assert writer.buffered == 0

    run(test())


@pytest.mark.parametrize("size", [10, 8_000_000])
def test_the_end_comes_after_what_was_written(run: Run, size: int) -> None:
    """write_eof() and close() let the client read all, then the end; it may still send."""

    async def test() -> None:
        for end in ("write_eof", "close"):
            with Pair() as pair:
                pair.writer.write(b"x" * size)
                assert pair.writer.can_write_eof()
                assert not pair.writer.is_closing()
                getattr(pair.writer, end)()
                pair.writer.close()
                assert pair.writer.is_closing()
                with pytest.raises(RuntimeError, match="after close"):
                    pair.writer.write(b"more")
                await pair.received(size)
                await pair.writer.wait_closed()
                assert await asyncio.get_running_loop().sock_recv(pair.far, 1) == b""
                pair.far.send(b"still")
                assert await pair.reader.read(10) == b"still"

    run(test())


def test_a_broken_connection_swallows_writes_and_drain_says_so(run: Run) -> None:
    """Writing to a client that is gone does nothing; drain() and flush() raise."""

    async def test() -> None:
        with Pair() as pair:
            writer = pair.writer
            writer.write(b"x" * 8_000_000)
            task = await waiting(writer.drain())
            pair.reset()
            with pytest.raises(ConnectionError):
                await task
            assert writer.is_closing()
            assert writer.buffered == 0
            writer.write(b"swallowed")
            for method in (writer.drain, writer.flush):
                with pytest.raises(ConnectionError):
                    await method()
            writer.close()
        with Pair() as pair:
            pair.reset()
            while not pair.writer.is_closing():
                pair.writer.write(b"x")
                await asyncio.sleep(0)
            pair.writer.write_eof()
            with pytest.raises(ConnectionError):
                await pair.writer.drain()

    run(test())


def test_an_end_that_cannot_be_sent_is_an_error(run: Run) -> None:
    """Where the client has reset the connection, the end cannot be said, and drain() raises."""

    async def test() -> None:
        with Pair() as pair:
            pair.reset()
            with pytest.raises(ConnectionResetError):
                await pair.reader.read(1)
            pair.writer.write_eof()
            with pytest.raises(OSError, match="not connected"):
                await pair.writer.drain()

    run(test())


def test_a_busy_client_does_not_starve_the_others(run: Run) -> None:
    """However fast a client sends, each portion of its bytes goes through the loop: others have turns."""

    async def test() -> None:
        with Pair() as pair:
            pair.far.setblocking(False)
            turns: list[int] = []

            def turn() -> None:
                turns.append(1)
                handle[0] = asyncio.get_running_loop().call_soon(turn)

            handle = [asyncio.get_running_loop().call_soon(turn)]
            for _ in range(50):
                pair.far.send(b"x" * 100)
                assert await pair.reader.read(100) == b"x" * 100
            handle[0].cancel()
            assert len(turns) >= 49

    run(test())


def numbers(size: int) -> array.array[int]:
    """Return so many bytes in elements of 8."""
    return array.array("q", range(size // 8))


@pytest.mark.parametrize("view", [memoryview, lambda data: data], ids=["memoryview", "array"])
def test_elements_are_not_bytes(run: Run, view: Callable[[Any], Any]) -> None:
    """Of a buffer whose elements have several bytes all bytes are sent, at once and later."""

    async def test() -> None:
        with Pair() as pair:
            small, large = numbers(80), numbers(8 << 20)
            pair.writer.write(view(small))
            assert await pair.received(80) == small.tobytes()
            pair.writer.write(view(large))
            assert pair.writer.buffered
            pair.writer.write(view(small))
            assert await pair.received(80 + (8 << 20)) == large.tobytes() + small.tobytes()
            await pair.writer.flush()
            pair.writer.write(view(numbers(0)))
            assert not pair.writer.buffered

    run(test())


@pytest.mark.parametrize(
    ("data", "why"),
    [("text", "bytes-like object is required"), (memoryview(b"a.b.c.")[::2], "C-contiguous")],
    ids=["text", "gaps"],
)
def test_what_cannot_be_sent_is_refused(run: Run, data: Any, why: str) -> None:  # noqa: ANN401 - anything
    """What is no bytes, or does not lie in one piece, is an error, and nothing counts as written."""

    async def test() -> None:
        with Pair() as pair:
            with pytest.raises(TypeError, match=why):
                pair.writer.write(data)
            assert not pair.writer.wrote

    run(test())
