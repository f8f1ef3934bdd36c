"""The daemon of the demo: HTTP/1.1 as it should be, and a start and an end without surprises."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Self

import pytest

from sdlisten import Listener, Listeners, NotActivatedError, Notifier, Origin, Service, hello
from sdlisten.hello import RequestError, parse_request
from sdlisten.testing import Activated, activate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

DEADLINE = 20.0
HELLO = (sys.executable, "-m", "sdlisten.hello")
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def start(*sockets: Any, options: Sequence[str] = (), env: dict[str, str] | None = None) -> Activated:  # noqa: ANN401
    """Return the daemon, to be started by ``with``."""
    return activate([*HELLO, *options], sockets or ("http=127.0.0.1:0",), env=env)


class Client:
    """A client that reads answers one by one."""

    def __init__(self, address: Listener | socket.socket) -> None:
        if isinstance(address, Listener):
            address = socket.create_connection(address.sockname)  # type: ignore[arg-type]
        self.sock = address
        self.sock.settimeout(DEADLINE)
        self.file = self.sock.makefile("rb")

    def ask(self, request: bytes = GET) -> tuple[str, dict[str, str], bytes]:
        """Send a request and read its answer."""
        self.sock.sendall(request)
        return self.answer(head=request.startswith(b"HEAD"))

    def answer(self, *, head: bool = False) -> tuple[str, dict[str, str], bytes]:
        """Read an answer: status line, fields, body."""
        status = self.file.readline().decode().rstrip()
        assert status, "the end instead of an answer"
        fields = dict(
            line.decode().rstrip().lower().split(": ") for line in iter(self.file.readline, b"\r\n")
        )
        return status, fields, b"" if head else self.file.read(int(fields["content-length"]))

    def ended(self) -> bool:
        """Return whether the server ends here, in order."""
        return self.file.read() == b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Activated]:
    """Give a daemon that serves many tests."""
    with start() as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(daemon: Activated) -> Iterator[Client]:
    """Give a connection to it."""
    with Client(daemon.listeners[0]) as made:
        yield made


@pytest.fixture(autouse=True, scope="module")
def _before_the_leak_check(daemon: Activated) -> None:
    """Start the daemon before descriptors are counted."""


def test_get(daemon: Activated, client: Client) -> None:
    """The first word of the body is the pid, and the connection is kept."""
    for _ in range(3):
        status, fields, body = client.ask()
        assert status == "HTTP/1.1 200 OK"
        assert fields["connection"] == "keep-alive"
        assert body == f"{daemon.pid} says hello\n".encode()


def test_head(client: Client) -> None:
    """HEAD gets the same fields and no body, so that the next answer is where it should be."""
    _, fields, body = client.ask(GET.replace(b"GET", b"HEAD"))
    assert body == b""
    assert client.ask() == ("HTTP/1.1 200 OK", fields, client.ask()[2])


def test_requests_may_come_together_or_in_pieces(client: Client) -> None:
    """Pipelined requests are answered in order; a request is read however its bytes come."""
    client.sock.sendall(GET * 3 + GET[:7])
    for _ in range(3):
        assert client.answer()[0] == "HTTP/1.1 200 OK"
    client.sock.sendall(GET[7:20])
    assert client.ask(GET[20:])[0] == "HTTP/1.1 200 OK"
    assert client.ask(b"\r\n" + GET)[0] == "HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: foo, Close\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: foo\r\nconnection: close\r\n\r\n", False),
        (b"GET http://a/ HTTP/1.1\r\nHost:\r\nX: \t \r\nContent-Length: 000\r\n\r\n", True),
    ],
)
def test_when_a_connection_is_kept(client: Client, request_: bytes, *, kept: bool) -> None:
    """HTTP/1.0 ends unless asked to stay, HTTP/1.1 stays unless asked to end; the answer says which."""
    status, fields, _ = client.ask(request_)

    assert status == "HTTP/1.1 200 OK"
    assert fields["connection"] == ("keep-alive" if kept else "close")
    if kept:
        assert client.ask()[0] == "HTTP/1.1 200 OK"
    else:
        assert client.ended()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "400 Bad Request"),
        (b"GET /\r\n\r\n", "400 Bad Request"),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", "413 Content Too Large"),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "413 Content Too Large"),
        (b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", "405 Method Not Allowed"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 8192 + b"\r\n\r\n", "431 Request Header Fields Too Large"),
        (b"x" * 9000, "431 Request Header Fields Too Large"),
    ],
)
def test_what_is_refused(client: Client, request_: bytes, status: str) -> None:
    """What is no request, has a body, or is too long, is answered with the right error, and then the end."""
    answer = client.ask(request_)

    assert answer[0] == f"HTTP/1.1 {status}"
    assert answer[1]["connection"] == "close"
    assert answer[1].get("allow") == ("get, head" if status.startswith("405") else None)
    client.sock.shutdown(socket.SHUT_WR)
    assert client.ended()


def test_an_upload_gets_its_error(client: Client) -> None:
    """A client that sends megabytes which nobody reads gets 413 all the same, and no reset."""
    client.sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)
    assert client.answer()[0] == "HTTP/1.1 413 Content Too Large"
    client.sock.shutdown(socket.SHUT_WR)
    assert client.ended()


def test_a_client_that_leaves_in_the_head(daemon: Activated) -> None:
    """A client that leaves in the middle of a request, or before, is nobody's error."""
    for data in (b"", b"GET / HT"):
        with Client(daemon.listeners[0]) as client:
            client.sock.sendall(data)
            client.sock.shutdown(socket.SHUT_WR)
            assert client.ended()
    assert "raised" not in daemon.output


def test_a_head_just_as_long_as_allowed() -> None:
    """A request is read by its parts: what the answer depends on."""
    request = parse_request(b"\r\nHEAD / HTTP/1.1\r\nHost: a\r\nCONNECTION: CLOSE\r\n\r\n")
    assert (request.head, request.close) == (True, True)
    with pytest.raises(RequestError, match="400"):
        parse_request(b"\r\n\r\n")


def test_a_slow_head_is_cut_off(monkeypatch: pytest.MonkeyPatch, run_hello: Callable[[], Client]) -> None:
    """A client that does not complete its request in time gets 408, then the end, also if it goes on."""
    monkeypatch.setattr(hello, "_HEAD_TIMEOUT", 0.05)
    monkeypatch.setattr(hello, "_LINGER", 0.05)
    with run_hello() as client:
        assert client.ask(b"GET / HTTP/1.1\r\n")[0] == "HTTP/1.1 408 Request Timeout"
        assert client.ended()


@pytest.fixture
def run_hello() -> Iterator[Callable[[], Client]]:
    """Give a function that serves hello in a thread of this process and returns a client."""
    import asyncio  # noqa: PLC0415
    import threading  # noqa: PLC0415

    service = Service(notifier=Notifier(None))
    listener = Listener(socket.create_server(("127.0.0.1", 0)), name="", origin=Origin.BOUND)
    service.attach(listener, hello.serve_http)
    address = listener.sockname
    thread = threading.Thread(target=lambda: asyncio.run(service.serve()))
    thread.start()
    yield lambda: Client(socket.create_connection(address))  # type: ignore[arg-type]
    service.stop()
    thread.join()


def test_the_last_answer_says_so() -> None:
    """After SIGTERM an idle connection gets one more answer, with Connection: close; pipelined ones all."""
    with start() as running:
        running.wait_ready()
        with Client(running.listeners[0]) as idle, Client(running.listeners[0]) as half:
            assert idle.ask()[1]["connection"] == "keep-alive"
            assert half.ask()[1]["connection"] == "keep-alive"
            half.sock.sendall(GET[:9])
            os.kill(running.pid, signal.SIGTERM)
            running.wait_output("draining: open=2")
            idle.sock.sendall(GET * 2)
            assert idle.answer()[1]["connection"] == "keep-alive"
            assert idle.answer()[1]["connection"] == "close"
            assert idle.ended()
            assert half.ask(GET[9:])[1]["connection"] == "close"
            assert half.ended()
        assert running.terminate() == 0
        assert "finished=2 handed_over=0 closed_idle=0 dropped=0" in running.output


def test_the_drain_has_a_limit() -> None:
    """--drain-timeout ends a request that never comes to its end; exit 0, the loss in the log."""
    with start(options=["--drain-timeout", "0"]) as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask()[0] == "HTTP/1.1 200 OK"
            client.sock.sendall(b"GET /")
            client.sock.sendall(b" ")
            with Client(running.listeners[0]) as other:
                other.ask()  # what came before on the other connection has been read
            assert running.terminate() == 0
            assert client.ended()
        assert "dropped=1" in running.output


def test_accept_yes() -> None:
    """Started with one accepted connection, it serves that one and exits."""
    ours, theirs = socket.socketpair()
    with Client(ours) as client, start(("connection", theirs)) as running:
        theirs.close()
        status, _, body = client.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (status, body.split()[0]) == ("HTTP/1.1 200 OK", str(running.pid).encode())
        assert client.ended()
        running.wait_output("drained in")
        assert running.terminate() == 0


def test_what_it_says_of_its_listeners(tmp_path: Path) -> None:
    """Each listener gets a line of NAME=VALUE words on stderr."""
    path = str(tmp_path / "hello.sock")
    with start("http=127.0.0.1:0", f"admin={path}") as running:
        running.wait_ready()
        port = running.listeners[0].address
        lines = running.output.splitlines()
        assert lines[0] == (
            f"adopted name=http address={port} family=AF_INET non-blocking=yes close-on-exec=yes "
            f"backlog={running.listeners[0].backlog}"
        )
        assert lines[1].startswith(f"adopted name=admin address={path} family=AF_UNIX ")
        assert running.terminate() == 0


def test_what_it_cannot_start_with() -> None:
    """An address that is none, or sockets that do not fit, end it with 78 and the reason."""
    for options, text in (
        (["-l", "127.0.0.1:99999"], "99999"),
        (["-l", "other=/nowhere"], "no passed socket is named 'other'"),
    ):
        with start(options=options) as running:
            child = running._child
            assert child is not None
            assert child.wait(DEADLINE) == 78
            assert running.output.startswith("hello: ")
            assert text in running.output


def test_the_start_can_be_slow() -> None:
    """HELLO_START_DELAY is slept before the sockets are taken."""
    with start(env={"HELLO_START_DELAY": "0.001"}) as running:
        running.wait_ready()
        assert running.terminate() == 0


def test_nothing_passed_and_nothing_said(passing: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """Without sockets and words it binds its default, unless sockets are required."""
    monkeypatch.setattr(hello, "_DEFAULT", "http=127.0.0.1:0")
    passing()

    with hello._take([]) as taken:
        assert isinstance(taken, Listeners)
        assert [listener.name for listener in taken] == ["http"]
    monkeypatch.setenv("SDLISTEN_REQUIRE", "1")
    with pytest.raises(NotActivatedError):
        hello._take([])
