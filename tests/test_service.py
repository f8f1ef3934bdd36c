"""A service on real sockets, in this process: what its drain does to each kind of connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten import Connection, DrainReport, MessageError, Notifier, Service
from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.service.rules import Rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
    from pathlib import Path
    from ssl import SSLContext

    from sdlisten import Listeners
    from sdlisten.notifier import HasFileno
    from sdlisten.receiver import Receiver

    Run = Callable[[Coroutine[Any, Any, None]], None]
    Handler = Callable[[Connection], Awaitable[object]]

DEADLINE = 20.0
FOREVER = 600.0
QUIET = Notifier(None)


class Client:
    """A client on a raw socket, in the loop of the test."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.received = b""

    @classmethod
    async def connect(cls, listeners: Listeners | tuple[str, int]) -> Client:
        """Connect to the first listener."""
        address: Any = listeners if isinstance(listeners[0], str) else listeners[0].sockname
        client = cls(socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET))
        await asyncio.get_running_loop().sock_connect(client.sock, address)
        return client

    async def send(self, data: bytes) -> None:
        """Send all."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def line(self) -> bytes:
        """Receive a line."""
        while b"\n" not in self.received:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            assert data, f"the end after {self.received!r}"
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        return line

    async def ask(self, line: bytes) -> bytes:
        """Send a line and receive one."""
        await self.send(line + b"\n")
        return await self.line()

    async def rest(self) -> bytes:
        """Receive all to the end, which must be an orderly one."""
        while data := await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20):
            self.received += data
        rest, self.received = self.received, b""
        return rest

    def close(self) -> None:
        """Close it."""
        self.sock.close()


class Running:
    """A service that runs in the loop of the test, with clients that are closed in the end."""

    def __init__(self, service: Service, listeners: Listeners, task: asyncio.Task[DrainReport]) -> None:
        self.service = service
        self.listeners = listeners
        self.address: Any = listeners[0].sockname
        self.task = task
        self.clients: list[Client] = []

    async def client(self, line: bytes = b"") -> Client:
        """Connect; with a line, ask it and receive the answer."""
        client = await Client.connect(self.address)
        self.clients.append(client)
        if line:
            assert await client.ask(line) == b"more " + line
        return client

    async def accepted(self, number: int) -> None:
        """Wait until so many connections were accepted."""
        await until(lambda: self.service.counters.accepted == number)

    async def stop(self) -> DrainReport:
        """Order the drain and wait for its end."""
        self.service.stop()
        return await self.task

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
    handler: Handler,
    *,
    word: str = "127.0.0.1:0",
    ssl: SSLContext | None = None,
    **options: Any,  # noqa: ANN401 - those of Service
) -> AsyncIterator[Running]:
    """Run a service; by default nothing but the drain's limit ends a connection."""
    settings = {"fresh_timeout": FOREVER, "idle_timeout": FOREVER, "drain_timeout": FOREVER, **options}
    service = Service(notifier=settings.pop("notifier", QUIET), **settings)
    listeners = bind(parse_address(word))
    service.attach(listeners, handler, ssl=ssl)
    running = Running(service, listeners, asyncio.create_task(service.serve()))
    await asyncio.sleep(0)
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        service.stop()
        await asyncio.wait([running.task], timeout=2)
        running.task.cancel()  # only where a test has failed
        await asyncio.wait([running.task])


async def echo(connection: Connection) -> None:
    """Answer each line; the answer says whether it is the last."""
    reader, writer = connection.streams()
    while await connection.idle():
        line = await reader.readline()
        writer.write((b"last " if connection.closing else b"more ") + line)
        await writer.drain()


def gated(gate: asyncio.Event) -> Handler:
    """Return `echo` with answers that wait for an event, after a first line that says so."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            line = await reader.readline()
            writer.write(b"busy\n")
            await gate.wait()
            writer.write((b"last " if connection.closing else b"more ") + line)
            await writer.drain()

    return handler


def outcome(report: DrainReport) -> dict[str, int]:
    """Return what a report counted, without zeros."""
    names = ("finished", "handed_over", "closed_idle", "dropped")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def test_a_request_in_progress_is_finished_and_its_answer_is_the_last(run: Run) -> None:
    """A request that was read before the stop gets its answer, which says that it is the last."""

    async def test() -> None:
        gate = asyncio.Event()
        async with serving(gated(gate)) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"busy"
            await running.begin_stop()
            gate.set()
            assert await client.rest() == b"last a\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_an_idle_connection_gets_one_more_answer(run: Run) -> None:
    """A client that is silent at the stop is answered once more, told so, and closed in order."""

    async def test() -> None:
        async with serving(echo) as running:
            client = await running.client(b"a")
            await running.begin_stop()
            await client.send(b"b\n")
            assert await client.rest() == b"last b\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_fresh_connection_gets_its_first_answer(run: Run) -> None:
    """A client that was accepted and has sent nothing is served when it sends during the drain."""

    async def test() -> None:
        async with serving(echo) as running:
            client = await running.client()
            await running.accepted(1)
            await running.begin_stop()
            await client.send(b"a\n")
            assert await client.rest() == b"last a\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_connection_accepted_in_the_turn_of_the_stop_drains(run: Run) -> None:
    """A connection whose handler has not had its first turn when the drain begins is served."""

    async def test() -> None:
        async with serving(echo) as running:
            running.service._table.changed = running.service.stop
            client = await running.client()
            await client.send(b"a\n")
            assert await client.rest() == b"last a\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


@pytest.mark.parametrize("lines", [b"", b"a"], ids=["fresh", "idle"])
def test_silence_ends_a_connection(run: Run, lines: bytes) -> None:
    """A client that was silent for long enough is closed without a word, and counted."""

    async def test() -> None:
        async with serving(echo, idle_timeout=0, fresh_timeout=0) as running:
            client = await running.client(lines)
            await running.accepted(1)
            await asyncio.sleep(0)
            report = await running.stop()
            assert await client.rest() == b""
            assert outcome(report) == {"closed_idle": 1}

    run(test())


def test_silence_in_the_drain_is_limited_from_the_last_answer(run: Run) -> None:
    """A connection that becomes idle in the drain, by an answer from before it, is closed after silence."""

    async def test() -> None:
        gate = asyncio.Event()

        async def handler(connection: Connection) -> None:
            reader, writer = connection.streams()
            while await connection.idle():
                await reader.readline()
                writer.write(b"closing: %r\n" % connection.closing)
                await gate.wait()

        async with serving(handler, idle_timeout=0.01) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"closing: False"
            await running.begin_stop()
            gate.set()
            assert await client.rest() == b""
            assert outcome(await running.task) == {"closed_idle": 1}

    run(test())


@pytest.mark.parametrize("lines", [b"", b"a"], ids=["fresh", "idle"])
def test_what_came_in_the_last_moment_is_served(run: Run, lines: bytes) -> None:
    """A request that is in the kernel when a silent connection is about to be closed gets its answer."""

    async def test() -> None:
        async with serving(echo, idle_timeout=0, fresh_timeout=0) as running:
            client = await running.client(lines)
            await running.accepted(1)
            await asyncio.sleep(0)
            running.service._stop()
            client.sock.send(b"b\n")
            (entry,) = running.service._table
            assert not entry._silence_over()  # type: ignore[attr-defined]
            assert await client.rest() == b"last b\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_request_between_last_look_and_fin_counts_as_dropped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that comes after the last look at a silent connection is lost, and counted as such."""

    async def test() -> None:
        async with serving(echo, idle_timeout=0) as running:
            client = await running.client(b"a")
            await asyncio.sleep(0)
            (entry,) = running.service._table
            reader: Any = entry._reader  # type: ignore[attr-defined]
            monkeypatch.setattr(type(reader), "look", lambda _self: client.sock.send(b"b\n") < 0)
            assert outcome(await running.stop()) == {"dropped": 1}

    run(test())


def test_the_drain_ends_at_its_limit(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """At the limit requests in progress are cut, counted and logged as a warning; idle ones are not."""
    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with serving(gated(asyncio.Event()), drain_timeout=0) as running:
            busy, fresh = await running.client(), await running.client()
            assert await busy.ask(b"a") == b"busy"
            await running.accepted(2)
            await asyncio.sleep(0)
            report = await running.stop()
            assert outcome(report) == {"closed_idle": 1, "dropped": 1}
            assert await busy.rest() == b""
            assert await fresh.rest() == b""
            assert running.service.counters.dropped == 1

    run(test())
    last = caplog.records[-1]
    assert last.levelname == "WARNING"
    assert last.name == "sdlisten.service"
    assert last.getMessage() == "drained in 0.0 s: finished=0 handed_over=0 closed_idle=1 dropped=1"
    assert last.SDLISTEN_DROPPED == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("linger", [b"", b"\1\0\0\0\0\0\0\0"], ids=["fin", "reset"])
def test_who_leaves_at_the_limit_is_not_dropped(run: Run, linger: bytes) -> None:
    """A silent client whose end is seen only at the limit has lost nothing, and is not counted as lost."""

    async def test() -> None:
        async with serving(echo, drain_timeout=0) as running:
            client = await running.client(b"a")
            await asyncio.sleep(0)
            if linger:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
            (entry,) = running.service._table
            running.service._stop()
            entry.drop()
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_the_line_of_the_drain_is_as_fixed() -> None:
    """The report's text is the line that programs outside read."""
    report = DrainReport(finished=12, handed_over=24, closed_idle=0, dropped=1, seconds=3.21)

    assert str(report) == "drained in 3.2 s: finished=12 handed_over=24 closed_idle=0 dropped=1"


def test_open_connections_are_logged_while_draining(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A drain logs at once how many are open: a killed daemon's last line is not below its loss."""
    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with serving(echo) as running:
            clients = [await running.client(b"a") for _ in range(3)]
            await running.begin_stop()
            for client in clients:
                client.close()
            assert outcome(await running.task) == {"finished": 3}

    run(test())
    lines = [record.getMessage() for record in caplog.records if record.name == "sdlisten.service"]
    assert lines[0] == "draining: open=3"
    assert lines[-1].startswith("drained in 0.")


def test_orders_to_stop() -> None:
    """Within a second it is one order; later ones leave a tenth of the rest, at least a second."""
    rules = Rules(drain_timeout=100, fresh_timeout=5, idle_timeout=2)

    assert not rules.draining
    assert rules.order(1000.0)
    assert (rules.draining, rules.deadline) == (True, 1100.0)
    assert not rules.order(1000.9)
    assert rules.deadline == 1100.0
    assert not rules.order(1010.0)
    assert rules.deadline == 1019.0
    rules.order(1010.5)
    assert rules.deadline == 1019.0
    rules.order(1012.0)
    assert rules.deadline == 1013.0
    rules.order(1013.0)
    assert rules.deadline == 1013.0


def test_a_half_closed_client_is_answered(run: Run) -> None:
    """A client that sends its request and then the end gets the answer, in a drain too."""

    async def test() -> None:
        gate = asyncio.Event()
        async with serving(gated(gate)) as running:
            early, late = await running.client(), await running.client()
            assert await early.ask(b"a") == b"busy"
            early.sock.shutdown(socket.SHUT_WR)
            await running.accepted(2)
            await running.begin_stop()
            await late.send(b"b\n")
            late.sock.shutdown(socket.SHUT_WR)
            gate.set()
            assert await early.rest() == b"last a\n"
            assert await late.rest() == b"busy\nlast b\n"
            assert outcome(await running.task) == {"finished": 2}

    run(test())


BIG = 10_000_000


async def send_much(connection: Connection) -> None:
    """Answer with 10 MB and return without waiting."""
    reader, writer = connection.streams()
    if await connection.idle():
        await reader.readline()
        writer.write(b"x" * BIG)


def test_a_slow_reader_gets_its_whole_answer(run: Run) -> None:
    """What a handler has written is sent after it returned, and as long as the drain lasts."""

    async def test() -> None:
        async with serving(send_much) as running:
            client = await running.client()
            await client.send(b"a\n")
            await until(lambda: bool(client.sock.recv(1, socket.MSG_PEEK) if readable(client) else b""))
            await running.begin_stop()
            assert len(await client.rest()) == BIG
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_slow_reader_is_dropped_at_the_limit(run: Run) -> None:
    """A client that does not take its answer in time is cut, and counted as dropped."""

    async def test() -> None:
        async with serving(send_much, drain_timeout=0) as running:
            client = await running.client()
            await client.send(b"a\n")
            await until(lambda: readable(client))
            assert outcome(await running.stop()) == {"dropped": 1}
            assert 0 < len(await client.rest()) < BIG

    run(test())


def readable(client: Client) -> bool:
    """Return whether something waits to be read."""
    try:
        return bool(client.sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_an_upload_in_progress_is_finished(run: Run) -> None:
    """A body of which a part has come is read to its end during the drain, and answered."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            writer.write(b"go on\n")
            body = await reader.readexactly(1_000_000)
            writer.write(b"%d %r\n" % (len(body), connection.closing))

    async def test() -> None:
        async with serving(handler) as running:
            client = await running.client()
            assert await client.ask(b"x" * 999) == b"go on"
            await running.begin_stop()
            await client.send(b"x" * 999_000)
            assert await client.rest() == b"1000000 True\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_pipelined_requests_are_all_answered(run: Run) -> None:
    """Requests that came together are all answered in a drain, and only the last answer says so."""

    async def test() -> None:
        gate = asyncio.Event()
        async with serving(gated(gate)) as running:
            client = await running.client()
            await client.send(b"a\nb\n")
            assert await client.line() == b"busy"
            await running.begin_stop()
            client.sock.send(b"c\n")
            gate.set()
            assert await client.rest() == b"more a\nbusy\nmore b\nbusy\nlast c\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_half_a_request_before_the_stop_and_the_rest_after(run: Run) -> None:
    """A request whose first bytes came before the stop is in progress: it is read and answered."""

    async def test() -> None:
        async with serving(echo, fresh_timeout=0, idle_timeout=0) as running:
            client = await running.client()
            await client.send(b"he")
            await until(lambda: any(entry._reader.received for entry in running.service._table))  # type: ignore[attr-defined]
            await running.begin_stop()
            await client.send(b"llo\n")
            assert await client.rest() == b"last hello\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_handler_that_cannot_say_close_gives_one_more_answer(run: Run) -> None:
    """Where nobody asks `closing`, a connection ends after its first whole answer of the drain."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            writer.write(await reader.readline())

    async def test() -> None:
        async with serving(handler) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"a"
            await running.begin_stop()
            await client.send(b"b\nc\n")
            assert await client.rest() == b"b\nc\n"
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_after_the_last_answer_nothing_is_answered(run: Run) -> None:
    """What a client sends after it was told "last" is not read as a request, and costs it no answer."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            line = await reader.readline()
            writer.write((b"last " if connection.closing else b"more ") + line)
            clients[0].sock.send(b"x" * 100_000)

    clients: list[Client] = []

    async def test() -> None:
        async with serving(handler) as running:
            clients.append(await running.client())
            await running.accepted(1)
            await running.begin_stop()
            await clients[0].send(b"a\n")
            assert await clients[0].rest() == b"last a\n"
            clients[0].close()
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_unread_bytes_do_not_cost_the_answer(run: Run) -> None:
    """A handler may return before it has read all: the client gets the answer, and no reset."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        await reader.readline()
        writer.write(b"too much\n")

    async def test() -> None:
        async with serving(handler) as running:
            client = await running.client()
            await client.send(b"a\n" + b"x" * 500_000)
            assert await client.rest() == b"too much\n"

    run(test())


def test_a_client_that_goes_on_sending_is_cut_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever neither reads nor ends is closed after a while: lingering has a limit."""
    monkeypatch.setattr("sdlisten.service.served._LINGER", 0.01)

    async def handler(connection: Connection) -> None:
        await connection.streams()[0].readline()

    async def test() -> None:
        async with serving(handler) as running:
            client = await running.client()
            await client.send(b"a\nb")
            await until(lambda: running.service.counters.finished == 1)

    run(test())


def test_lingering_at_the_limit_is_no_loss(run: Run) -> None:
    """A connection whose answer was given counts as finished, even if its client still sends at the limit."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        await reader.readline()
        writer.write(b"done\n")

    async def test() -> None:
        async with serving(handler, drain_timeout=0) as running:
            client = await running.client()
            await client.send(b"a\nb")
            assert await client.line() == b"done"
            await until(lambda: any(entry._lingering for entry in running.service._table))  # type: ignore[attr-defined]
            assert outcome(await running.stop()) == {"finished": 1}

    run(test())


def test_connections_can_be_handed_over(run: Run) -> None:
    """What a channel takes is closed here without a word, and its handler returns."""

    def take(connection: Connection) -> bool:
        copies.append(connection.socket.dup())
        if len(copies) == 3:
            late.sock.send(b"unread\n")
        return True

    copies: list[socket.socket] = []
    ended: list[bool] = []
    late: Client

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            writer.write(b"more " + await reader.readline())
        ended.append(True)

    async def test() -> None:
        async with serving(handler) as running:
            running.service._rules.hand_over = take
            nonlocal late
            idle, fresh, late = [await running.client() for _ in range(3)]
            assert await idle.ask(b"a") == b"more a"
            await running.accepted(3)
            await until(lambda: all(entry._reader is not None for entry in running.service._table))  # type: ignore[attr-defined]
            assert outcome(await running.stop()) == {"handed_over": 3}
            assert ended == [True] * 3
            for client, copy in zip((idle, fresh), copies[:2], strict=True):
                copy.send(b"by another\n")
                assert await client.line() == b"by another"
            assert copies[2].recv(100) == b"unread\n"
            for copy in copies:
                copy.close()

    run(test())


def test_on_drain_is_called_for_requests_in_progress(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The hook gets each connection with a request in progress, and lets an endless answer end."""
    ends: dict[Connection, asyncio.Event] = {}

    async def endless(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            await reader.readline()
            ends[connection] = asyncio.Event()
            writer.write(b"event\n")
            await ends[connection].wait()
            writer.write(b"bye\n")

    async def hook(connection: Connection) -> None:
        ends[connection].set()

    async def test() -> None:
        async with serving(endless, on_drain=hook, idle_timeout=0) as running:
            client, idle = await running.client(), await running.client()
            assert await client.ask(b"a") == b"event"
            await running.accepted(2)
            await running.begin_stop()
            assert await client.rest() == b"bye\n"
            idle.close()
            assert outcome(await running.task) == {"closed_idle": 1, "finished": 1}

    run(test())
    assert len(ends) == 1
    assert "raised" not in caplog.text


def test_an_on_drain_that_raises_disturbs_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A hook's error is logged, and the drain goes on."""

    def hook(_connection: Connection) -> None:
        raise ValueError("the hook's fault")

    async def test() -> None:
        gate = asyncio.Event()
        async with serving(gated(gate), on_drain=hook) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"busy"
            await running.begin_stop()
            gate.set()
            assert await client.rest() == b"last a\n"

    run(test())
    assert "the hook's fault" in caplog.text


def test_a_handler_that_does_not_end_is_reported(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that goes on after it was cancelled does not hold the exit up; it is dropped and named."""
    monkeypatch.setattr("sdlisten.service.drain._CLEAN_UP", 0.05)

    async def test() -> None:
        release = asyncio.Event()

        async def stubborn(connection: Connection) -> None:
            connection.streams()[1].write(b"busy\n")
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

        async with serving(stubborn, drain_timeout=0) as running:
            client = await running.client()
            assert await client.line() == b"busy"
            assert outcome(await running.stop()) == {"dropped": 1}
            assert await client.rest() == b""
            release.set()
            await until(lambda: not running.service.counters.active)

    run(test())
    assert "still running after it was cancelled" in caplog.text


def test_a_raising_handler_disturbs_nobody(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """What a handler raises is logged and counted; what it wrote is sent; the others are served."""

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        line = await reader.readline()
        writer.write(line)
        if line == b"bad\n":
            raise ValueError("no such word")

    async def test() -> None:
        async with serving(handler) as running:
            bad, good = await running.client(), await running.client()
            await bad.send(b"bad\n")
            assert await bad.rest() == b"bad\n"
            await good.send(b"good\n")
            assert await good.rest() == b"good\n"
            assert running.service.counters.errors == 1

    run(test())
    assert "no such word" in caplog.text


def test_a_client_that_leaves_in_the_middle_is_no_error(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A reset, or the end in the middle of a request, ends the handler without a line in the log.

    Many times on the same numbers: uvloop forgets the reader of a socket that was reset.
    """

    async def handler(connection: Connection) -> None:
        reader, writer = connection.streams()
        while await connection.idle():
            await reader.readexactly(10)
            writer.write(b"never")

    async def test() -> None:
        async with serving(handler) as running:
            for number in range(20):
                client = await running.client()
                if number % 3:
                    await running.accepted(number + 1)
                await client.send(b"part")
                if number % 2:
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                await until(lambda number=number: running.service.counters.finished > number)  # type: ignore[misc]
            assert running.service.counters.errors == 0

    run(test())
    assert "raised" not in caplog.text


def test_a_broken_connection_is_not_idle(run: Run) -> None:
    """Where the client has reset the connection, idle() is False, with and without something to send."""
    seen: list[bool] = []

    async def handler(connection: Connection) -> None:
        _, writer = connection.streams()
        writer.write(b"x" * BIG if seen else b"x")
        seen.append(await connection.idle())

    async def test() -> None:
        async with serving(handler) as running:
            for number in range(2):
                client = await running.client()
                await running.accepted(number + 1)
                await until(lambda client=client: readable(client))  # type: ignore[misc]
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                await until(lambda number=number: len(seen) > number)  # type: ignore[misc]

    run(test())
    assert seen == [False, False]


def test_a_handler_may_use_the_bare_socket(run: Run) -> None:
    """A handler that reads the socket itself counts as busy until it returns, then it is closed."""

    async def handler(connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        while (data := await loop.sock_recv(connection.socket, 100)) != b"end\n":
            await loop.sock_sendall(connection.socket, data)

    async def test() -> None:
        async with serving(handler, fresh_timeout=0, idle_timeout=0) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"a"
            await running.begin_stop()
            assert await client.ask(b"b") == b"b"
            await client.send(b"end\n")
            assert await client.rest() == b""
            assert outcome(await running.task) == {"finished": 1}

    run(test())


def test_a_fresh_reader_without_idle_sees_the_end(run: Run) -> None:
    """A handler that begins with a read, and not with idle(), gets the end of a fresh silent client."""
    seen: list[bytes] = []

    async def handler(connection: Connection) -> None:
        seen.append(await connection.streams()[0].read(10))

    async def test() -> None:
        async with serving(handler, fresh_timeout=0) as running:
            client = await running.client()
            await running.accepted(1)
            await asyncio.sleep(0)
            assert outcome(await running.stop()) == {"closed_idle": 1}
            assert await client.rest() == b""

    run(test())
    assert seen == [b""]


def test_what_waits_at_a_bound_listener_is_served(run: Run) -> None:
    """Nobody else holds the socket we have bound: what is in its queue at the stop is accepted first."""

    async def test() -> None:
        async with serving(echo, max_connections=5) as running:
            # Connected without a turn of the loop, so nobody has accepted them.
            clients = [Client(socket.create_connection(running.address)) for _ in range(3)]
            running.clients += clients
            running.service._stop()
            for client in clients:
                await client.send(b"a\n")
                assert await client.rest() == b"last a\n"
            assert outcome(await running.task) == {"finished": 3}
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(running.address)

    run(test())


def test_at_most_so_many_connections(run: Run) -> None:
    """With max_connections clients beyond it wait in the queue, and are served when there is room."""

    async def test() -> None:
        async with serving(echo, max_connections=2) as running:
            first, second = await running.client(b"a"), await running.client(b"b")
            third = await running.client()
            await third.send(b"c\n")
            await until(lambda: running.service.counters.queued == 1)
            assert running.service.counters.active == 2
            first.close()
            assert await third.line() == b"more c"
            second.close()
            counters = running.service.counters
            assert (counters.accepted, counters.queued) == (3, 0)

    run(test())


def test_a_unix_client_has_a_connection_too(run: Run, tmp_path: Path) -> None:
    """On a unix socket everything is the same; a connection says who and where it is."""
    seen: list[Connection] = []
    texts: list[str] = []

    async def handler(connection: Connection) -> None:
        seen.append(connection)
        texts.append(repr(connection))
        await echo(connection)

    async def test() -> None:
        path = str(tmp_path / "service.sock")
        async with serving(handler, word=path) as running:
            await running.client(b"a")
            assert seen[0].listener is running.listeners[0]
            assert seen[0].peer == ""
            assert path in texts[0]

    run(test())


@pytest.mark.parametrize("limit", [float(sys.maxsize), sys.float_info.max], ids=["maxsize", "largest"])
def test_a_drain_without_a_real_limit(run: Run, receiver: Receiver, limit: float) -> None:
    """However long a drain may take, the manager is asked for a number of microseconds that it can read."""

    async def test() -> None:
        gate = asyncio.Event()
        notifier = Notifier(receiver.address)
        async with serving(gated(gate), drain_timeout=limit, notifier=notifier) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"busy"
            await running.begin_stop()
            gate.set()
            assert await client.rest() == b"last a\n"
            assert outcome(await running.task) == {"finished": 1}
        notifier.close()

    run(test())
    messages = [dict(message.assignments) for message in iter(receiver.receive, None)]
    asked = [int(message["EXTEND_TIMEOUT_USEC"]) for message in messages if "EXTEND_TIMEOUT_USEC" in message]
    assert asked == [86_400_000_000]


def test_a_drain_that_fails_ends_all_the_same(run: Run) -> None:
    """What goes wrong in a drain serve() raises, and no connection is left open."""

    class Failing(Notifier):
        """The line to a manager that breaks in the middle."""

        def send(self, *assignments: str, fds: Iterable[int | HasFileno] = ()) -> bool:
            if any("draining" in line for line in assignments):
                raise MessageError("a defect")
            return super().send(*assignments, fds=fds)

    async def test() -> None:
        async with serving(gated(asyncio.Event()), notifier=Failing(None)) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"busy"
            with pytest.raises(MessageError, match="a defect"):
                await running.stop()
            assert await client.rest() == b""
            await until(lambda: running.service.counters.active == 0)

    run(test())


def test_a_drain_that_is_cancelled_cancels_serve(run: Run) -> None:
    """Who cancels all tasks of a loop in the middle of a drain ends serve() too."""

    async def test() -> None:
        async with serving(gated(asyncio.Event())) as running:
            client = await running.client()
            assert await client.ask(b"a") == b"busy"
            await running.begin_stop()
            assert running.service._drain_task is not None
            running.service._drain_task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running.task

    run(test())


def test_stop_before_start_serves_nobody(run: Run) -> None:
    """A service that was told to stop before it began accepts nothing, says no READY=1, and ends."""

    async def test() -> None:
        service = Service(notifier=QUIET)
        listeners = bind(parse_address("127.0.0.1:0"))
        service.attach(listeners, echo)
        service.stop()
        assert outcome(await service.serve()) == {}
        assert listeners[0].fileno() == -1
        service.stop()
        service.reload()
        assert outcome(await service.serve()) == {}

    run(test())


def test_a_passed_connection_that_is_not_served_is_closed(run: Run) -> None:
    """A service that was told to stop before it began closes the one connection that it was given."""

    async def test() -> None:
        ours, theirs = socket.socketpair()
        with ours:
            service = Service(notifier=QUIET)
            service.attach_connection(theirs, echo)
            service.stop()
            assert outcome(await service.serve()) == {}
            assert theirs.fileno() == -1

    run(test())


def test_a_passed_connection_whose_client_has_left(run: Run) -> None:
    """A client that was reset before we began costs nothing but its handler's first look."""

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            far.close()
        service = Service(notifier=QUIET)
        service.attach_connection(near, echo)
        await service.serve()
        assert (service.counters.accepted, service.counters.finished) == (1, 1)

    run(test())


def test_orders_from_other_threads(run: Run) -> None:
    """start() and stop() work from any thread, also before anybody awaits serve()."""

    async def test() -> None:
        service = Service(notifier=QUIET)
        listeners = bind(parse_address("127.0.0.1:0"))
        service.attach(listeners[0], echo)
        address: Any = listeners[0].sockname
        started = threading.Thread(target=service.start)
        started.start()
        client = await Client.connect(address)
        assert await client.ask(b"a") == b"more a"
        service.start()
        started.join()
        stopped = threading.Thread(target=service.stop)
        stopped.start()
        await until(lambda: service.draining)
        client.close()
        assert outcome(await service.serve()) == {"finished": 1}
        stopped.join()

    run(test())


def test_start_needs_a_loop() -> None:
    """Outside of a loop, and without one known from before, start() is a clear error."""
    service = Service(notifier=QUIET)

    with pytest.raises(RuntimeError, match="no running event loop"):
        service.start()
    service.stop()  # harmless


def test_nothing_attached_is_an_error(run: Run) -> None:
    """A service without listeners refuses to run, by serve() and by start()."""

    async def test() -> None:
        with pytest.raises(RuntimeError, match="attach a listener"):
            await Service(notifier=QUIET).serve()

    run(test())


def test_attaching_after_the_start_is_an_error(run: Run) -> None:
    """Listeners are attached before the service starts."""

    async def test() -> None:
        async with serving(echo) as running:
            with pytest.raises(RuntimeError, match="before start"):
                running.service.attach(running.listeners, echo)

    run(test())


def test_a_listener_that_does_not_listen(run: Run) -> None:
    """If a listener cannot be armed, serve() raises, by whomever it was started, and all is closed."""

    async def test() -> None:
        for by_start in (False, True):
            service = Service(notifier=QUIET)
            good, bad = bind(parse_address("127.0.0.1:0")), bind(parse_address("127.0.0.1:0"))
            service.attach((*good, *bad), echo)
            bad.close()
            if by_start:
                service.start()
                await asyncio.sleep(0)
            with pytest.raises(ValueError, match="closed"):
                await service.serve()
            assert good[0].fileno() == -1

    run(test())


def test_a_cancelled_service_closes_everything(run: Run) -> None:
    """Cancelling serve() ends listeners, connections and handlers at once, in a drain or not."""

    async def test() -> None:
        for draining in (False, True):
            cancelled = asyncio.Event()

            async def handler(connection: Connection, cancelled: asyncio.Event = cancelled) -> None:
                try:
                    await connection.streams()[0].read(1)
                    connection.streams()[1].write(b"read\n")
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()

            async with serving(handler) as running:
                client = await running.client()
                assert await client.ask(b"a") == b"read"
                if draining:
                    await running.begin_stop()
                running.task.cancel()
                assert await asyncio.gather(running.task, return_exceptions=True)
                await cancelled.wait()
                assert running.listeners[0].fileno() == -1
                with contextlib.suppress(ConnectionResetError):
                    assert await client.rest() == b""

    run(test())


def test_options_are_checked() -> None:
    """Numbers that make no sense are errors that name the option and the value."""
    with pytest.raises(ValueError, match="drain_timeout=-1"):
        Service(drain_timeout=-1, notifier=QUIET)
    with pytest.raises(ValueError, match="exit_on_idle=-2"):
        Service(exit_on_idle=-2, notifier=QUIET)
    with pytest.raises(ValueError, match="max_connections=0"):
        Service(max_connections=0, notifier=QUIET)
