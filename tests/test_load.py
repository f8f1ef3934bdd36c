"""The load against servers that misbehave in each way."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten.address import Address, parse_address
from sdlisten.errors import AddressError
from sdlisten.load import Load, LoadProcess, Result, add_arguments, main, run
from sdlisten.load.answer import Answer
from sdlisten.load.client import Phase
from sdlisten.load.engine import Engine, _endpoint
from sdlisten.load.result import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n41 hello"
GOOD_CLOSE = GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
SHORT = GOOD[:-3]
RESET = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def serving(
    script: Callable[[socket.socket], None], name: object = ("127.0.0.1", 0), family: int = socket.AF_INET
) -> Iterator[str]:
    """Serve one connection after the other in a thread, each as the script says; yield the address word."""
    with socket.socket(family) as listener:
        listener.bind(name)  # type: ignore[arg-type] # each family has its own shape
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):  # shutdown(2) of the listener ends accept(2)
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(ConnectionError):
                        script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield word_of(listener)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def word_of(listener: socket.socket) -> str:
    """Return the address word of a listener."""
    match listener.getsockname():
        case (str() as host, int() as port, *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case bytes() as name:
            return "@" + name[1:].decode()
        case path:
            return str(path)


def asked(connection: socket.socket) -> bool:
    """Read one request; return False at EOF."""
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        received = connection.recv(4096)
        if not received:
            return False
        request += received
    return True


def answering(
    answer: bytes, *, then: Callable[[socket.socket], None] = socket.socket.close
) -> Callable[..., None]:
    """Return a script: read a request, answer so, then close or do something else."""

    def script(connection: socket.socket) -> None:
        if asked(connection):
            connection.sendall(answer)
            then(connection)

    return script


def keeping(connection: socket.socket) -> None:
    """Answer every request of a connection."""
    while asked(connection):
        connection.sendall(GOOD)


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def hang(connection: socket.socket) -> None:
    """Do nothing until the client has gone."""
    connection.recv(1)


def load_once(address: str, **options: object) -> Result:
    """Run one client that makes three requests."""
    options = {"clients": 1, "delay": 0.02, "rate": 1000} | options
    return Load(address, **options).run(requests=3)  # type: ignore[arg-type] # whatever the test says


def counted(result: Result) -> dict[str, int]:
    """Return the kinds that are not zero, with the good ones."""
    assert result.requests == result.ok + sum(result.failures.values())
    return {kind: count for kind, count in {"ok": result.ok, **result.failures}.items() if count}


@pytest.fixture(name="closed_port")
def _closed_port() -> Iterator[str]:
    """A port with nobody: bound, so that no other program gets it, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield word_of(bound)


@pytest.mark.parametrize("mode", ["short", "slow", "keep"])
def test_good_answers_are_ok(mode: str) -> None:
    """In each mode good answers count as ok, and the process that gave them by the first word of the body."""
    with serving(keeping) as address:
        result = load_once(address, mode=mode)
    assert counted(result) == {"ok": 3}
    assert result.pids == {41: 3}
    assert result.opened == (1 if mode == "keep" else 3)
    assert (result.closed_idle, result.close_announced, result.abandoned) == (0, 0, 0)
    assert result.clean


@pytest.mark.parametrize("mode", ["short", "slow", "keep"])
def test_nobody_listens(closed_port: str, mode: str) -> None:
    """A port with nobody is refused, and no connection was opened."""
    result = load_once(closed_port, mode=mode)
    assert counted(result) == {"refused": 3}
    assert result.opened == 0
    assert "Connection refused, connecting, request 1 of its connection" in result.samples[0]


def test_no_such_path(tmp_path: Path) -> None:
    """A unix path that does not exist is refused."""
    assert counted(load_once(f"{tmp_path}/none")) == {"refused": 3}


MISDEEDS = {
    "reset": (answering(b"", then=reset), "reset"),
    "close": (answering(b""), "empty"),
    "close within": (answering(SHORT), "short_read"),
    "reset within": (answering(SHORT, then=reset), "short_read"),
    "close within the head": (answering(b"HTT"), "short_read"),
    "reset instead of EOF": (answering(b"HTTP/1.1 200 OK\r\n\r\n41 hello", then=reset), "short_read"),
    "hang": (answering(b"", then=hang), "timeout"),
    "hang within": (answering(SHORT, then=hang), "timeout"),
    "500": (answering(GOOD.replace(b"200 OK", b"500 Internal Server Error"), then=hang), "bad_status"),
    "302": (answering(GOOD.replace(b"200 OK", b"302 Found"), then=hang), "bad_status"),
    "garbage": (answering(b"SSH-2.0-OpenSSH_9.2\r\n", then=hang), "bad_status"),
    "surplus": (answering(GOOD + b"more", then=hang), "bad_status"),
}


@pytest.mark.parametrize(("script", "kind"), MISDEEDS.values(), ids=MISDEEDS)
@pytest.mark.parametrize("mode", ["short", "slow", "keep"])
def test_each_failure_is_its_kind_alone(script: Callable[..., None], kind: str, mode: str) -> None:
    """A server that misbehaves after the request is counted as exactly that, in every mode."""
    with serving(script) as address:
        result = load_once(address, mode=mode, timeout=0.03 if kind == "timeout" else 10)
    assert counted(result) == {kind: 3}
    assert result.opened == 3
    assert len(result.samples) == 3
    assert not result.clean


@pytest.mark.parametrize("close", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_early_close(close: Callable[[socket.socket], None]) -> None:
    """Mode slow sees a server that closes connections on which nothing was sent."""
    with serving(close) as address:
        result = load_once(address, mode="slow")
    assert counted(result) == {"early_close": 3}


def test_early_close_before_the_loop_has_looked(listener: socket.socket) -> None:
    """A listener that goes with a connection in its queue is an early close in mode slow, not a refusal."""
    with by_hand(word_of(listener), mode="slow") as engine:
        listener.close()
        engine.settle(engine.start)
        result = engine.result(engine.start)

    assert counted(result) == {"early_close": 1}
    assert result.opened == 1


def test_early_close_forgets_the_moment_to_send(listener: socket.socket) -> None:
    """After an early close nothing is sent when the delay is over, and the client is free once, not twice."""
    with by_hand(word_of(listener), mode="slow") as engine:
        engine.settle(engine.start)
        assert [client.phase for client in engine.active] == [Phase.HOLDING]
        listener.accept()[0].close()
        engine.settle(engine.start)
        engine.settle(engine.start + 1)

        assert [client.phase for client in engine.free] == [Phase.FREE]


def test_slow_clients_do_not_march_in_step() -> None:
    """In a closed loop of slow requests the clients begin one after the other within the delay."""
    engine = Engine(Load(1, mode="slow", clients=4, delay=0.2), 4)
    free = []
    for milliseconds in (0, 51, 101, 151):
        engine.settle(engine.start + milliseconds / 1e3)
        free.append(len(engine.free))
    engine.close()

    assert free == [1, 2, 3, 4]


def test_answer_before_the_question() -> None:
    """Bytes that come before anything was sent are no good answer."""
    with serving(lambda connection: connection.sendall(GOOD)) as address:
        assert counted(load_once(address, mode="slow")) == {"bad_status": 3}


@contextlib.contextmanager
def by_hand(address: str, **options: object) -> Iterator[Engine]:
    """Yield the state of a load with one client, which the test moves on step by step."""
    engine = Engine(Load(address, clients=1, rate=1000, **options), 2)  # type: ignore[arg-type] # as load_once
    engine.settle(engine.start)
    engine.begin(engine.start)
    yield engine
    engine.close()


@pytest.fixture(name="listener")
def _listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A unix listener from which the test itself accepts: what one side does is seen by the other at once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        yield listener


def answer_and_close(listener: socket.socket) -> None:
    """Accept one connection, answer one request, and close without a word."""
    connection, _ = listener.accept()
    with connection:
        assert asked(connection)
        connection.sendall(GOOD)


def test_closed_while_idle(listener: socket.socket) -> None:
    """A kept connection that the server closes between requests is counted, replaced, and no failure."""
    with by_hand(word_of(listener), mode="keep") as engine:
        answer_and_close(listener)
        engine.settle(engine.start)  # the answer
        engine.settle(engine.start)  # EOF
        engine.begin(engine.start + 1)
        answer_and_close(listener)
        engine.settle(engine.start + 1)
        result = engine.result(engine.start + 1)

    assert counted(result) == {"ok": 2}
    assert (result.closed_idle, result.close_announced, result.opened) == (1, 0, 2)


def test_close_that_crosses_a_request(listener: socket.socket) -> None:
    """A request sent on a connection that was closed at the same time fails, and is no idle close."""
    with by_hand(word_of(listener), mode="keep") as engine:
        answer_and_close(listener)
        engine.settle(engine.start)  # the answer; EOF comes in the next turn
        engine.begin(engine.start + 1)
        result = engine.result(engine.start + 1)

    assert counted(result) == {"ok": 1, "reset": 1}
    assert result.closed_idle == 0
    assert "between requests, request 2 of its connection" in result.samples[0]


@pytest.mark.parametrize(
    "answer",
    [
        GOOD_CLOSE,
        b"HTTP/1.0 200 OK\r\n\r\n41 to the end of the connection",
        GOOD.replace(b"1.1", b"1.0"),
        b"HTTP/1.1 200 OK\r\n\r\n41 no length",
    ],
    ids=["close", "1.0", "1.0 with length", "1.1 without length"],
)
def test_connection_close(answer: bytes) -> None:
    """An answer that ends its connection is good, counted, and followed by a new connection."""
    with serving(answering(answer)) as address:
        result = load_once(address, mode="keep")
    assert counted(result) == {"ok": 3}
    assert (result.close_announced, result.closed_idle, result.opened) == (3, 0, 3)
    assert result.pids == {41: 3}


def test_http_1_0_with_keep_alive() -> None:
    """HTTP/1.0 with ``Connection: keep-alive`` keeps the connection."""
    answer = GOOD.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nConnection: Keep-Alive\r\n\r\n")

    def script(connection: socket.socket) -> None:
        while asked(connection):
            connection.sendall(answer)

    with serving(script) as address:
        result = load_once(address, mode="keep")
    assert (result.ok, result.opened, result.close_announced) == (3, 1, 0)


def test_stall_is_seen_from_the_planned_start() -> None:
    """A server that stops for half a second makes late every request that was due meanwhile, not one."""
    connections = iter(range(1000))

    def script(connection: socket.socket) -> None:
        asked(connection)
        if next(connections) == 2:
            threading.Event().wait(0.5)  # the misbehaviour, not a wait for something
        connection.sendall(GOOD)

    with serving(script) as address:
        result = Load(address, clients=1, rate=100).run(requests=50)
    assert counted(result) == {"ok": 50}
    assert result.max >= 0.5
    assert result.stall >= 0.5
    assert result.p50 >= 0.2  # of 50 requests 47 were due within the stall


def test_closed_loop() -> None:
    """With rate 0 each client asks again when it is answered, and rests after a failure."""
    failing = iter([GOOD, b"", GOOD, GOOD])

    def script(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(next(failing))

    with serving(script) as address:
        result = Load(address, clients=1, rate=0).run(requests=4)
    assert counted(result) == {"ok": 3, "empty": 1}
    assert result.seconds >= 0.05
    assert result.max < result.seconds - 0.05 + 1e-3  # the rest is planned, not latency
    assert result.stall >= 0.05  # and yet nobody was answered


def test_own_lateness_is_told() -> None:
    """A load that was kept from its work says for how long."""

    def dawdle() -> None:
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass

    with serving(keeping) as address:
        result = Load(address, mode="keep", clients=1, rate=100).run(requests=3, started=dawdle)
    assert result.lag >= 0.03
    assert result.max >= 0.03


@pytest.mark.parametrize("mode", ["short", "slow", "keep"])
def test_unix_path(tmp_path: Path, mode: str) -> None:
    """A path is an address."""
    with serving(keeping, f"{tmp_path}/s", socket.AF_UNIX) as address:
        assert counted(load_once(address, mode=mode)) == {"ok": 3}


def test_abstract_name() -> None:
    """An abstract name is an address."""
    with serving(keeping, "", socket.AF_UNIX) as address:  # autobind, unix(7)
        assert address.startswith("@")
        assert counted(load_once(address)) == {"ok": 3}


def test_ipv6() -> None:
    """An IPv6 address is an address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no [::1]: {error}")
    with serving(keeping, ("::1", 0), socket.AF_INET6) as address:
        assert address.startswith("[::1]:")
        assert counted(load_once(address)) == {"ok": 3}


def test_other_addresses() -> None:
    """A port is 127.0.0.1, a name is resolved, a scope is kept, vsock without a CID is this machine."""
    assert _endpoint(parse_address(8080)) == (socket.AF_INET, ("127.0.0.1", 8080))
    assert _endpoint(parse_address("localhost:80"))[1][:2] in {("127.0.0.1", 80), ("::1", 80)}
    assert _endpoint(parse_address("[fe80::1]:80%1")) == (socket.AF_INET6, ("fe80::1", 80, 0, 1))
    assert _endpoint(parse_address("vsock::80")) == (socket.AF_VSOCK, (1, 80))
    assert _endpoint(parse_address("vsock:2:80")) == (socket.AF_VSOCK, (2, 80))
    with pytest.raises(TypeError):
        _endpoint(Address())


def test_full_unix_queue(listener: socket.socket) -> None:
    """A full queue of a unix listener is waited for, as connect(2) does, and is a timeout in the end."""
    listener.listen(0)
    with socket.socket(socket.AF_UNIX) as filler:
        filler.connect(listener.getsockname())
        result = load_once(word_of(listener), timeout=0.02)
        with by_hand(word_of(listener)) as engine:
            assert [client.phase for client in engine.active] == [Phase.QUEUED]
            listener.accept()[0].close()
            engine.settle(engine.start + 1)
            assert [client.phase for client in engine.active] == [Phase.ASKED]

    assert counted(result) == {"timeout": 3}
    assert "waiting for room in the listener's queue" in result.samples[0]


def test_full_tcp_queue() -> None:
    """A full queue of a TCP listener is waited for too: the kernel asks again after a second."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.connect(listener.getsockname())
        result = load_once(word_of(listener), timeout=0.02)
        with by_hand(word_of(listener)) as engine:
            assert [client.phase for client in engine.active] == [Phase.CONNECTING]
            listener.accept()[0].close()
            assert select.select([engine.selector], [], [], 10)[0], "not connected within 10 s"
            engine.settle(engine.start + 1)
            assert [client.phase for client in engine.active] == [Phase.ASKED]

    assert counted(result) == {"timeout": 3}
    assert result.opened == 0


def test_wake_up_for_nothing(listener: socket.socket) -> None:
    """A socket that is reported readable and has nothing leaves the request as it is."""
    with by_hand(word_of(listener)) as engine:
        client = engine.oldest
        assert client.sock
        client.ready(client.sock, engine.start)
        assert [client.phase for client in engine.active] == [Phase.ASKED]


@pytest.mark.parametrize(("seconds", "requests"), [(0, None), (None, 0)])
def test_no_request_is_no_success(closed_port: str, seconds: float | None, requests: int | None) -> None:
    """A load that asked nothing proves nothing, and says so."""
    result = Load(closed_port).run(seconds, requests=requests)
    assert counted(result) == {}
    assert not result.clean
    assert "no request was made: nothing is proved" in str(result)


def test_seconds_end_it() -> None:
    """After its seconds no request is begun, and those in flight are waited for."""
    with serving(keeping) as address:
        result = Load(address, mode="slow", delay=0.1, clients=2).run(0.08)
    assert counted(result) == {"ok": 2}
    assert result.seconds >= 0.1


def test_stop_twice_abandons() -> None:
    """A second stop does not wait for the requests in flight; they are counted apart."""
    loads: list[Load] = []

    def script(connection: socket.socket) -> None:
        asked(connection)
        loads[0].stop()
        loads[0].stop()
        hang(connection)

    with serving(script) as address:
        loads.append(Load(address, clients=1))
        result = loads[0].run()
    assert (result.requests, result.abandoned) == (0, 1)
    assert "abandoned 1" in str(result)


def test_stop_from_a_thread_finishes_what_was_begun() -> None:
    """After one stop the requests in flight are still answered and counted."""
    loads: list[Load] = []

    def script(connection: socket.socket) -> None:
        asked(connection)
        loads[0].stop()
        connection.sendall(GOOD)

    with serving(script) as address:
        loads.append(Load(address, clients=1))
        assert counted(loads[0].run()) == {"ok": 1}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"clients": 0}, "clients is 0"),
        ({"rate": -1}, "rate is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"delay": math.nan}, "delay is nan"),
    ],
)
def test_senseless_arguments(options: dict[str, object], named: str) -> None:
    """An argument that makes no sense is named."""
    with pytest.raises(ValueError, match=named):
        Load("8080", **options)  # type: ignore[arg-type] # that is the point


def test_senseless_address() -> None:
    """A word that is no address is an AddressError."""
    with pytest.raises(AddressError):
        Load("nowhere")


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 65536,
    ],
)
def test_no_good_answer(text: bytes) -> None:
    """What this load does not take for a good answer is refused with a reason."""
    with pytest.raises(ValueError, match="answer"):
        Answer().feed(text)


@given(cuts=st.sets(st.integers(1, len(GOOD_CLOSE) - 1)))
def test_answer_in_pieces(cuts: set[int]) -> None:
    """However an answer is cut, it is whole with its last byte and not before."""
    edges = [0, *sorted(cuts), len(GOOD_CLOSE)]
    answer = Answer()
    pieces = [GOOD_CLOSE[start:end] for start, end in itertools.pairwise(edges)]
    assert [answer.feed(piece) for piece in pieces] == [False] * len(cuts) + [True]
    assert answer.first_word() == b"41"
    assert answer.close
    assert len(answer) == len(GOOD_CLOSE)


def test_no_content() -> None:
    """A 204 has no body and nobody's pid."""
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert answer.first_word() == b""
    assert not answer.close


def test_long_word_is_no_pid() -> None:
    """A body that begins with a long number does not fill the table of processes."""
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n123456789012")
    assert answer.first_word() == b""


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=200))
def test_quantiles(latencies: list[float]) -> None:
    """A quantile is not below the true one and at most 1 % above it; the maximum is exact."""
    tally = Tally("8080", "short", 1, 0)
    for latency in latencies:
        tally.good(latency, 0, 0, b"")
    result = tally.result(0, 0)
    true = sorted(latencies)
    assert result.max == true[-1]
    for share, found in {0.5: result.p50, 0.99: result.p99, 0.999: result.p999}.items():
        wanted = true[math.ceil(share * len(true)) - 1]
        assert wanted * (1 - 1e-9) <= found <= wanted * 1.0101


def test_stall_counts_only_time_in_which_answers_were_due() -> None:
    """Failures do not end a stall; time without a request is none."""
    tally = Tally("8080", "short", 1, 0)
    tally.good(1.0, 0.9, 0.9, b"")
    assert tally.result(1.5, 1).stall == pytest.approx(0.1)
    tally.bad(1.6, 1.5, "refused", "")
    tally.bad(2.6, 2.5, "refused", "")
    assert tally.result(2.6, 1).stall == pytest.approx(1.1)
    tally.good(3.0, 2.9, 2.9, b"")
    assert tally.result(3.0, 1).stall == pytest.approx(1.5)
    tally.good(10.0, 9.9, 9.9, b"")
    assert tally.result(10.0, 1).stall == pytest.approx(1.5)


def test_json_round_trip() -> None:
    """A result is the same after it was written and read, and has its sums for other readers."""
    with serving(answering(SHORT)) as address:
        result = replace(load_once(address), pids={41: 2, 42: 1}, ok=3)
    assert Result.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["requests"] == 6
    assert json.loads(result.to_json())["failed"] == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pids": {}, "samples": [], "requests": 0, "failed": 0}'])
def test_not_a_result(text: str) -> None:
    """What is no result is a ValueError that quotes it."""
    with pytest.raises(ValueError, match="not the result of a load"):
        Result.from_json(text)


def test_table() -> None:
    """The table names every kind, at most seven processes, the first three failures, and fits a screen."""
    result = Result("8080", "keep", 24, 1200, 10, ok=12000, reset=4, early_close=5, p999=0.0301)
    result = replace(result, pids=dict.fromkeys(range(41, 60), 600), samples=("a", "b", "c", "d"))
    kinds = "refused 0 · reset 4 · empty 0 · early close 5 · short read 0 · timeout 0 · bad status 0"
    lines = [
        "keep load on 8080: 24 clients, 1200 requests/s, 10.0 s",
        "requests     12,009 (1,201/s) · ok 12,000 · failed 9",
        f"failed       {kinds}",
        "connections  opened 0 · closed while idle 0 · answered with Connection: close 0",
        "latency ms   p50 0.00 · p99 0.00 · p99.9 30.10 · max 0.00 (good answers, from the planned start)",
        "stall ms     0.00 at most without a good answer · own lateness 0.00",
        "answered by  19 processes: 41 (600) 42 (600) 43 (600) … 57 (600) 58 (600) 59 (600)",
        "failure      a",
        "failure      b",
        "failure      c",
    ]
    assert str(result).splitlines() == lines
    assert "no pause" in str(replace(result, rate=0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_with_a_result(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGINT and SIGTERM end the program with its result and 0, and leave the process as it was."""

    def state() -> tuple[object, ...]:
        slack = Path("/proc/self/timerslack_ns").read_text(encoding="ascii")
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), slack

    before = state()
    once = iter([number])

    def script(connection: socket.socket) -> None:
        asked(connection)
        for order in once:
            os.kill(os.getpid(), order)
        connection.sendall(GOOD)

    with serving(script) as address:
        code = main([address, "--clients", "1", "--json"])
    result = Result.from_json(capsys.readouterr().out)
    assert code == 0
    assert set(counted(result)) == {"ok"}
    assert state() == before


def test_progress(
    closed_port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it runs the program says on stderr how it goes, with the kinds of failures that there are."""
    monkeypatch.setattr("sdlisten.load.engine._PROGRESS", 0.02)  # a second, for the impatient
    assert main([closed_port, "--rate=100", "--seconds=0.1", "--json"]) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(
        r"   0 s: 0 ok, (\d+) failed \(refused \1\), p50 0.00 ms, longest stall \d+ ms, 0 pids", first
    )


def test_program_prints_a_table_and_fails(closed_port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Failures make exit code 1; without --json the result is the table."""
    assert main([closed_port, "--seconds", "0.01"]) == 1
    assert capsys.readouterr().out.startswith(f"short load on {closed_port}: 24 clients, 600 requests/s")


@pytest.mark.parametrize("word", ["nowhere", "name.invalid:80"])
def test_usage_error(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An argument that is wrong is exit code 2 and a line on stderr."""
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith("sdlisten load: ")


def test_arguments_for_another_parser(closed_port: str) -> None:
    """`add_arguments` and `run` are a subcommand of somebody else's parser."""
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("load"))
    assert run(parser.parse_args(["load", closed_port, "--mode=keep", "--rate=0", "--seconds=0"])) == 1


def test_process() -> None:
    """A load in a process of its own starts, runs beside us, and gives its result when it is stopped."""
    with serving(keeping) as address, LoadProcess(address, clients=3) as load:
        load.wait_started()
        result = load.stop()
    assert set(counted(result)) == {"ok"}
    assert result.ok >= 3
    assert (result.address, result.mode, result.clients, result.rate) == (address, "short", 3, 600)


def test_process_stopped_at_once(closed_port: str) -> None:
    """A load that is stopped right after its start has a result: the signal waits for its handler."""
    with LoadProcess(closed_port, mode="keep", rate=0) as load:
        assert not load.stop().clean


def test_process_that_gets_no_answer(closed_port: str) -> None:
    """Waiting for answers that do not come ends in an error that says what came instead."""
    with (
        LoadProcess(closed_port, clients=1) as load,
        pytest.raises(TimeoutError, match=r"(?s)too few good answers within 0.3 s.*refused"),
    ):
        load.wait_started(0.3)


def test_process_that_cannot_run(capfd: pytest.CaptureFixture[str]) -> None:
    """A load that ends by itself is an error with its exit code, and it said why."""
    with LoadProcess("nowhere") as load, pytest.raises(RuntimeError, match="ended with code 2"):
        load.wait_started()
    assert "'nowhere' is not an address" in capfd.readouterr().err


def test_process_without_a_result() -> None:
    """A load that was killed by somebody else has no result, and that is an error."""
    with serving(keeping) as address, LoadProcess(address, clients=1) as load:
        load.wait_started()
        os.kill(load.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended with code -9"):
            load.stop()


@pytest.mark.parametrize("started", [True, False])
def test_process_that_hangs(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that does not end, or does not even begin, is killed, and that is an error."""
    with serving(keeping) as address, LoadProcess(address, clients=1, timeout=0.1, delay=0) as load:
        if started:
            load.wait_started()
        monkeypatch.setattr("sdlisten.load.process._START_LIMIT", 0.1)
        os.kill(load.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="did not end" if started else "did not"):
            load.stop()


def test_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an interpreter nothing is started and nothing left open."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        LoadProcess("8080")
    assert os.listdir("/proc/self/fd") == before


def test_process_outlives_nobody(closed_port: str) -> None:
    """A load whose parent has died ends by itself."""
    program = (
        "import os, sys; from sdlisten.load import LoadProcess; load = LoadProcess(sys.argv[1]);"
        "load._wait_for(ord('r'), 30); print(load.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, closed_port], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "still running 10 s after its parent has gone"
    os.close(pidfd)
