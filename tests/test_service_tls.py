"""Services with TLS and with protocols, where asyncio's transports stand between us and the socket."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten import Connection, DrainReport, Notifier, Service
from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.service.tls import StreamProtocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from sdlisten import Listeners

    Run = Callable[[Coroutine[Any, Any, None]], None]

DEADLINE = 20.0
FOREVER = 600.0
BIG = 5_000_000


@pytest.fixture(scope="session")
def server_tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Give the context of a server with a certificate of its own."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = str(directory / "key.pem"), str(directory / "certificate.pem")
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


@pytest.fixture(scope="session")
def client_tls() -> ssl.SSLContext:
    """Give the context of a client that trusts anybody: the certificate is not what is tested."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Running:
    """A service in the loop of the test, and its clients."""

    def __init__(self, service: Service, address: tuple[str, int], tls: ssl.SSLContext | None) -> None:
        self.service = service
        self.address = address
        self.tls = tls
        self.task: asyncio.Task[DrainReport] = asyncio.create_task(service.serve())
        self.writers: list[asyncio.StreamWriter] = []

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        reader, writer = await asyncio.open_connection(*self.address, ssl=self.tls)
        self.writers.append(writer)
        return reader, writer

    async def plain(self) -> socket.socket:
        """Connect without TLS."""
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        return sock

    async def begin_stop(self) -> None:
        """Order the drain and wait until it has begun."""
        self.service.stop()
        await until(lambda: self.service.draining)
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something is the case."""
    while not condition():  # noqa: ASYNC110 - nobody sets an event for what a test looks at
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(
    attach: Callable[[Service, Listeners], None],
    tls: ssl.SSLContext | None = None,
    **options: Any,  # noqa: ANN401 - those of Service
) -> AsyncIterator[Running]:
    """Run a service; by default nothing but the drain's limit ends a connection."""
    settings = {"fresh_timeout": FOREVER, "idle_timeout": FOREVER, "drain_timeout": FOREVER, **options}
    service = Service(notifier=Notifier(None), **settings)
    listeners = bind(parse_address("127.0.0.1:0"))
    attach(service, listeners)
    address: Any = listeners[0].sockname
    running = Running(service, address, tls)
    await asyncio.sleep(0)
    try:
        yield running
    finally:
        for writer in running.writers:
            writer.close()
        with contextlib.suppress(OSError):
            await asyncio.gather(*(writer.wait_closed() for writer in running.writers))
        service.stop()
        await asyncio.wait([running.task], timeout=2)
        running.task.cancel()  # only where a test has failed
        await asyncio.wait([running.task])
        await asyncio.sleep(0)


def by_handler(
    handler: Callable[[Connection], Awaitable[None]], tls: ssl.SSLContext
) -> Callable[[Service, Listeners], None]:
    """Return what attaches a handler."""
    return lambda service, listeners: service.attach(listeners, handler, ssl=tls)


def by_protocol(
    factory: Callable[[], asyncio.BaseProtocol], tls: ssl.SSLContext | None = None
) -> Callable[[Service, Listeners], None]:
    """Return what attaches a protocol."""
    return lambda service, listeners: service.attach_protocol(listeners, factory, ssl=tls)


async def echo(connection: Connection) -> None:
    """Answer each line; the answer says whether it is the last."""
    reader, writer = connection.streams()
    while await connection.idle():
        line = await reader.readline()
        writer.write((b"last " if connection.closing else b"more ") + line)
        await writer.drain()


def outcome(report: DrainReport) -> dict[str, int]:
    """Return what a report counted, without zeros."""
    names = ("finished", "handed_over", "closed_idle", "dropped")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


@pytest.fixture
def tls_echo(server_tls: ssl.SSLContext) -> Callable[[Service, Listeners], None]:
    """Attach `echo` with TLS."""
    return by_handler(echo, server_tls)


def test_tls_keeps_alive_and_drains(
    run: Run, tls_echo: Callable[[Service, Listeners], None], client_tls: ssl.SSLContext
) -> None:
    """Over TLS an idle connection gets one more answer, the last one, and nothing is handed over."""

    async def test() -> None:
        async with serving(tls_echo, client_tls) as running:
            reader, writer = await running.client()
            running.service._rules.hand_over = lambda _connection: True
            for number in range(3):
                writer.write(b"%d\n" % number)
                assert await reader.readline() == b"more %d\n" % number
            await running.begin_stop()
            writer.write(b"x\ny\n")
            assert await reader.read() == b"more x\nlast y\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_tls_silence_ends_a_connection(
    run: Run, tls_echo: Callable[[Service, Listeners], None], client_tls: ssl.SSLContext
) -> None:
    """An idle and a fresh client over TLS are closed after silence, with a good-bye."""

    async def test() -> None:
        async with serving(tls_echo, client_tls, idle_timeout=0, fresh_timeout=0) as running:
            idle, writer = await running.client()
            fresh, _ = await running.client()
            writer.write(b"x\n")
            assert await idle.readline() == b"more x\n"
            await running.begin_stop()
            assert await idle.read() == await fresh.read() == b""
            assert outcome(await running.task) == {"closed_idle": 2}

    run(test())


def test_tls_elements_are_not_bytes(run: Run, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """Over TLS every buffer is taken that is taken without, and all its bytes are sent."""
    data = array.array("q", range(BIG // 8))

    async def handler(connection: Connection) -> None:
        _, writer = connection.streams()
        writer.write(memoryview(data))
        writer.write(data)  # type: ignore[arg-type] # asyncio's own refuses it
        writer.close()

    async def test() -> None:
        async with serving(by_handler(handler, server_tls), client_tls) as running:
            reader, _ = await running.client()
            assert await reader.read() == data.tobytes() * 2

    run(test())


def test_tls_streams_carry_much(run: Run, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """Megabytes go both ways over TLS, with readers that are slower than writers."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        assert not writer.can_write_eof()
        with pytest.raises(NotImplementedError):
            writer.write_eof()
        data = b""
        while len(data) < BIG:
            await asyncio.sleep(0)
            data += await reader.read(1 << 20)
        for start in range(0, BIG, 100_000):
            writer.write(data[start : start + 100_000])
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def test() -> None:
        attach = by_handler(handler, server_tls)
        async with serving(attach, client_tls) as running:
            reader, writer = await running.client()
            data = bytes(range(256)) * (BIG // 256 + 1)
            writer.write(data[:BIG])
            await writer.drain()
            assert await reader.readexactly(BIG) == data[:BIG]
            await until(lambda: running.service.counters.finished == 1)

    run(test())


def test_tls_at_the_limit(
    run: Run, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """At the limit a request in progress over TLS is dropped, a handshake in progress is none."""
    caplog.set_level(logging.WARNING)

    async def handler(connection: Connection) -> None:
        await connection.streams()[0].readline()
        await asyncio.Event().wait()

    async def test() -> None:
        attach = by_handler(handler, server_tls)
        async with serving(attach, client_tls, drain_timeout=0) as running:
            reader, writer = await running.client()
            writer.write(b"x\n")
            await until(lambda: any(e._reader and e._reader.received for e in running.service._table))  # type: ignore[attr-defined]
            with await running.plain() as silent:
                await until(lambda: running.service.counters.accepted == 2)
                await running.begin_stop()
                assert outcome(await running.task) == {"closed_idle": 1, "dropped": 1}
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.get_running_loop().sock_recv(silent, 100) == b""

    run(test())


def test_a_handshake_in_progress_is_fresh(run: Run, tls_echo: Callable[[Service, Listeners], None]) -> None:
    """A client that connects to a TLS port and says nothing is closed like any fresh one."""

    async def test() -> None:
        async with serving(tls_echo, fresh_timeout=0) as running:
            with await running.plain() as silent:
                await until(lambda: running.service.counters.accepted == 1)
                await running.begin_stop()
                assert await asyncio.get_running_loop().sock_recv(silent, 100) == b""
                assert outcome(await running.task) == {"closed_idle": 1}

    run(test())


def test_a_failed_handshake_is_refused(run: Run, tls_echo: Callable[[Service, Listeners], None]) -> None:
    """Whoever does not speak TLS is counted as refused, and is no error of a handler."""

    async def test() -> None:
        async with serving(tls_echo) as running:
            with await running.plain() as client:
                client.send(b"GET / HTTP/1.0\r\n\r\n")
                await until(lambda: running.service.counters.refused == 1)
                assert running.service.counters.errors == 0

    run(test())


def test_a_tls_client_that_vanishes(run: Run, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """A TLS client that is gone without a good-bye ends its handler, which waits to read or to write."""
    ended: list[str] = []

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        line = await reader.readline()
        try:
            while line == b"write\n":
                writer.write(b"x" * 100_000)
                await writer.drain()
            assert not await reader.read(1)
        except ConnectionError:
            pass
        ended.append(line.decode())

    async def test() -> None:
        attach = by_handler(handler, server_tls)
        async with serving(attach, client_tls) as running:
            for line in (b"write\n", b"read\n"):
                _, writer = await running.client()
                writer.write(line)
                await until(lambda: any(e._reader and e._reader.received for e in running.service._table))  # type: ignore[attr-defined]
                writer.transport.abort()
                await until(lambda line=line: line.decode() in ended)  # type: ignore[misc]
                await until(lambda: not running.service.counters.active)

    run(test())


class Shout(asyncio.Protocol):
    """Answers in capitals; ends when it is told to drain."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self.transport.write(data.upper())

    def start_draining(self) -> None:
        """End."""
        self.transport.write(b"BYE\n")
        self.transport.close()


class Deaf(Shout):
    """Does not know what draining is."""

    start_draining = None  # type: ignore[assignment]


class Upgraded(Shout):
    """Is replaced by another protocol with its first data."""

    def data_received(self, data: bytes) -> None:
        """Upgrade."""
        other = Shout()
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("protocol", [Shout, Upgraded])
def test_protocols_are_told_to_drain(
    run: Run,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    *,
    protocol: type[Shout],
    tls: bool,
) -> None:
    """The protocol that a connection has at the time is told, and followed to its end."""

    async def test() -> None:
        attach = by_protocol(protocol, server_tls if tls else None)
        async with serving(attach, client_tls if tls else None) as running:
            reader, writer = await running.client()
            left, gone = await running.client()
            for each in (writer, gone):
                each.write(b"hello\n")
            assert await reader.readline() == await left.readline() == b"HELLO\n"
            gone.close()
            await until(lambda: running.service.counters.finished == 1)
            await running.begin_stop()
            assert await reader.read() == b"BYE\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_protocols_that_do_not_drain_are_dropped(run: Run, server_tls: ssl.SSLContext) -> None:
    """At the limit a protocol's connection is aborted, and so is a handshake."""

    async def test() -> None:
        attach = by_protocol(Deaf)
        async with serving(attach, drain_timeout=0) as running:
            reader, writer = await running.client()
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            running.service.stop()
            assert outcome(await running.task) == {"dropped": 1}
            assert await reader.read() == b""
        attach = by_protocol(Shout, server_tls)
        async with serving(attach, drain_timeout=0) as running:
            with await running.plain():
                await until(lambda: running.service.counters.accepted == 1)
                running.service.stop()
                assert outcome(await running.task) == {"closed_idle": 1}

    run(test())


def test_a_protocol_connected_in_the_drain_is_told(
    run: Run, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """A handshake that is done during the drain makes a protocol that is told at once."""

    async def test() -> None:
        attach = by_protocol(Shout, server_tls)
        async with serving(attach, client_tls) as running:
            with await running.plain() as client:
                await until(lambda: running.service.counters.accepted == 1)
                await running.begin_stop()
                reader, writer = await asyncio.open_connection(
                    sock=client, ssl=client_tls, server_hostname=""
                )
                running.writers.append(writer)
                assert await reader.read() == b"BYE\n"
                assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_protocols_that_raise_disturb_nobody(
    run: Run, server_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """A factory or a start_draining() that raises, and a failed handshake, cost one connection each."""

    class Raising(Shout):
        def start_draining(self) -> None:
            super().start_draining()
            raise ValueError("cannot drain")

    made: list[Shout] = []

    def factory() -> Shout:
        if not made:
            made.append(Shout())
            raise ValueError("cannot make")
        return Raising()

    async def test() -> None:
        attach = by_protocol(factory)
        async with serving(attach) as running:
            with await running.plain() as unlucky:
                assert await asyncio.get_running_loop().sock_recv(unlucky, 100) == b""
            reader, writer = await running.client()
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            await running.begin_stop()
            assert await reader.read() == b"BYE\n"
            await running.task
            assert running.service.counters.errors == 2
        attach = by_protocol(Shout, server_tls)
        async with serving(attach) as running:
            with await running.plain() as client:
                client.send(b"GET / HTTP/1.0\r\n\r\n")
                await until(lambda: running.service.counters.refused == 1)

    run(test())
    assert "cannot make" in caplog.text
    assert "cannot drain" in caplog.text


def test_ends_are_harmless_twice(run: Run) -> None:
    """A transport that was never made is aborted in vain, and one that is lost is lost once."""

    async def scenario() -> None:
        protocol = StreamProtocol(asyncio.get_running_loop())
        protocol.abort()
        here, there = socket.socketpair()
        with there:
            here.setblocking(False)
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: protocol, sock=here)
            protocol.abort()
            await protocol.lost
            protocol.connection_lost(None)
            assert transport.is_closing()

    run(scenario())
