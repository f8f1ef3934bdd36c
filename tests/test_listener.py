"""A Listener, what it gives away, and what servers do to that."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import os
import resource
import select
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

from sdlisten.descriptor import listen_queue
from sdlisten.listener import Listener, Listeners, Origin, SharedSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import aiohttp.web

    Unchanged = Callable[[], AbstractContextManager[None]]

GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def bound(path: Path, name: str = "web") -> Listener:
    """Bind a unix socket as listen() does: the listener knows the path that it created."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen(5)
    status = path.stat()
    return Listener(sock, name=name, origin=Origin.BOUND, created=(status.st_dev, status.st_ino))


@pytest.fixture
def listener(tcp: socket.socket) -> Iterator[Listener]:
    """Give a listener on TCP, with a backlog of 77, that another process (here: `tcp`) holds too."""
    with Listener(tcp.dup(), name="web", origin=Origin.ADOPTED) as listener:
        yield listener


@pytest.fixture
def client(tcp: socket.socket) -> Iterator[socket.socket]:
    """Give a connection that waits in the queue of `tcp`."""
    with socket.create_connection(tcp.getsockname()) as client:
        yield client


def test_takes_a_socket_over(tcp: socket.socket) -> None:
    """A listener is non-blocking and close-on-exec, whatever the socket was; it knows name and address."""
    sock = tcp.dup()
    sock.setblocking(True)
    sock.set_inheritable(True)

    with Listener(sock, name="web", origin=Origin.ADOPTED) as listener:
        assert listener.socket is sock
        assert listener.fileno() == sock.fileno()
        assert (os.get_blocking(sock.fileno()), sock.gettimeout()) == (False, 0.0)
        assert os.get_inheritable(sock.fileno()) is False
        assert (listener.name, listener.origin) == ("web", Origin.ADOPTED)
        assert listener.sockname == tcp.getsockname()
        assert listener.address == f"127.0.0.1:{tcp.getsockname()[1]}"
        assert repr(listener) == f"<Listener 'web' {listener.address} adopted fd={sock.fileno()}>"
    assert repr(listener) == f"<Listener 'web' {listener.address} adopted closed>"


def test_a_socket_without_a_word() -> None:
    """If the address cannot be written, as that of an unnamed socket, it is ""."""
    sock = socket.socket(socket.AF_UNIX)

    with Listener(sock, name="", origin=Origin.ADOPTED) as listener:
        assert (listener.address, listener.sockname) == ("", "")


def test_a_closed_socket_is_refused(unchanged: Unchanged) -> None:
    """A socket that is closed already is an OSError, EBADF."""
    with socket.socket() as sock:
        pass
    with unchanged(), pytest.raises(OSError, match="Bad file descriptor"):
        Listener(sock, name="", origin=Origin.BOUND)


@pytest.mark.usefixtures("client")
def test_tells_its_queue(listener: Listener) -> None:
    """Backlog and queue are asked of the kernel each time."""
    assert (listener.backlog, listener.queued) == (77, 1)

    listener.socket.listen(5)

    assert (listener.backlog, listener.queued) == (5, 1)


def test_tells_no_queue_where_the_kernel_does_not() -> None:
    """For a VM socket both figures are None."""
    try:
        sock = socket.socket(socket.AF_VSOCK)
    except OSError:  # a kernel without VM sockets: any socket that is no stream will do
        sock = socket.socket(type=socket.SOCK_DGRAM)

    with Listener(sock, name="", origin=Origin.BOUND) as listener:
        assert (listener.backlog, listener.queued) == (None, None)


class TestAccept:
    """Listener.accept(), for programs without a loop."""

    def test_returns_a_connection(self, listener: Listener, client: socket.socket) -> None:
        """The connection is a plain socket, blocking and close-on-exec, with the peer's address."""
        connection, address = listener.accept()

        with connection:
            assert type(connection) is socket.socket
            assert address == client.getsockname()
            assert (os.get_blocking(connection.fileno()), connection.gettimeout()) == (True, None)
            assert os.get_inheritable(connection.fileno()) is False

    @pytest.mark.parametrize("timeout", [0, 0.01, -1.0])
    def test_waits_so_long_and_no_longer(self, listener: Listener, timeout: float) -> None:
        """Nobody connects: a TimeoutError with the address and the seconds."""
        with pytest.raises(TimeoutError) as caught:
            listener.accept(timeout)

        assert str(caught.value) == f"nobody connected to {listener.address} within {timeout} s"

    def test_looks_once_at_least(self, listener: Listener, client: socket.socket) -> None:
        """Even with no time to wait, a connection that is there is taken."""
        connection, address = listener.accept(0)

        connection.close()
        assert address == client.getsockname()

    @pytest.mark.parametrize("timeout", [None, 60.0])
    def test_waits_on_when_another_was_faster(
        self,
        listener: Listener,
        tcp: socket.socket,
        client: socket.socket,
        monkeypatch: pytest.MonkeyPatch,
        timeout: float | None,
    ) -> None:
        """Another holder takes what poll() saw, and has cleared O_NONBLOCK too: we wait for the next one."""
        late: list[socket.socket] = []
        real_poll = select.poll

        class Poll:
            """A poll(2) behind which another process accepts, the first time."""

            def __init__(self) -> None:
                self._poll = real_poll()
                self.register = self._poll.register
                self._first = True

            def poll(self, timeout: float | None) -> list[tuple[int, int]]:
                """Wait, and let the other be faster."""
                if not self._first:
                    late.append(socket.create_connection(tcp.getsockname()))
                found = self._poll.poll(timeout)
                if self._first:
                    tcp.setblocking(True)
                    tcp.accept()[0].close()
                self._first = False
                return found

        monkeypatch.setattr("sdlisten.listener.select.poll", Poll)
        connection, address = listener.accept(timeout)

        connection.close()
        late[0].close()
        assert address[1] != client.getsockname()[1]

    def test_the_end_of_the_listener_is_an_error(self, listener: Listener, tcp: socket.socket) -> None:
        """Another holder has shut the listener down: EINVAL of accept(2), and no endless loop."""
        tcp.shutdown(socket.SHUT_RDWR)

        with pytest.raises(OSError, match="Invalid argument"):
            listener.accept(5)

    def test_needs_an_open_listener(self, listener: Listener) -> None:
        """A closed listener is a ValueError with its name and address."""
        listener.close()

        with pytest.raises(
            ValueError, match=rf"^the listener 'web' at {listener.address} is closed or detached$"
        ):
            listener.accept(0)


class TestShare:
    """Listener.share(): a duplicate that cannot change the listener."""

    @pytest.mark.parametrize("default", [None, 5.0])
    def test_is_a_listener_of_its_own(self, listener: Listener, default: float | None) -> None:
        """It has family, type and protocol, is non-blocking and close-on-exec; closing it ends nothing."""
        os.set_blocking(listener.fileno(), True)  # as another holder may
        socket.setdefaulttimeout(default)
        try:
            shared = listener.share()
        finally:
            socket.setdefaulttimeout(None)

        with shared:
            assert isinstance(shared, socket.socket)
            assert (shared.family, shared.type, shared.proto) == (
                socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
            )
            assert shared.fileno() != listener.fileno()
            assert os.path.sameopenfile(shared.fileno(), listener.fileno())
            assert (os.get_blocking(shared.fileno()), shared.gettimeout()) == (False, 0.0)
            assert os.get_inheritable(shared.fileno()) is False
        assert listener.backlog == 77

    def test_listen_does_nothing(self, listener: Listener) -> None:
        """Whatever a server asks for, the backlog stays."""
        with listener.share() as shared:
            shared.listen()
            shared.listen(100)
            assert listener.backlog == 77

    @pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
    def test_shutdown_is_refused(self, listener: Listener, tcp: socket.socket, how: int) -> None:
        """A shutdown() would reach the manager; it is a PermissionError that says so, and nothing happens."""
        with listener.share() as shared, pytest.raises(PermissionError) as caught:
            shared.shutdown(how)

        assert (caught.value.errno, caught.value.strerror) == (
            errno.EPERM,
            "shutdown() would end this listener for every process that holds it; close() this duplicate",
        )
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1

    def test_duplicates_are_as_careful(self, listener: Listener) -> None:
        """A duplicate of the duplicate cannot change the listener either."""
        with listener.share() as shared, shared.dup() as again:
            assert type(again) is SharedSocket
            again.listen(1)
            assert listener.backlog == 77

    def test_accepts_plain_sockets(self, listener: Listener, client: socket.socket) -> None:
        """What it accepts is a plain socket that may be shut down, and says that it is TCP."""
        with listener.share() as shared:
            connection, _ = shared.accept()
        with connection:
            assert type(connection) is socket.socket
            assert connection.proto == socket.IPPROTO_TCP
            connection.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""

    def test_needs_an_open_listener(self, listener: Listener, unchanged: Unchanged) -> None:
        """A detached listener has nothing to share."""
        listener.detach().close()

        with unchanged(), pytest.raises(ValueError, match="closed or detached"):
            listener.share()

    def test_no_descriptor_is_free(self, listener: Listener, unchanged: Unchanged) -> None:
        """EMFILE is reported, and the listener works on."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with unchanged():
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                with pytest.raises(OSError, match="Too many open files"):
                    listener.share()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert listener.backlog == 77

    def test_nothing_leaks_when_memory_is_short(
        self, listener: Listener, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the socket object cannot be made, the duplicate is closed."""

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(SharedSocket, "__init__", fail)
        with unchanged(), pytest.raises(MemoryError):
            listener.share()


class TestRelease:
    """Closing and detaching."""

    def test_detach_gives_the_socket_up(self, tmp_path: Path) -> None:
        """The caller gets the very socket, and the path with it; the listener is closed from then on."""
        listener = bound(tmp_path / "x")
        sock = listener.socket

        with listener.detach() as detached:
            assert detached is sock
            assert detached.fileno() >= 0
            assert listener.fileno() == -1
            listener.close()
        assert (tmp_path / "x").is_socket()
        with pytest.raises(ValueError, match=rf"^the listener 'web' at {tmp_path}/x is closed or detached$"):
            listener.detach()

    def test_close_is_harmless_twice(self, listener: Listener, tcp: socket.socket) -> None:
        """Our descriptor is closed once; the other holder's goes on listening."""
        listener.close()
        listener.close()

        assert listener.fileno() == -1
        assert listen_queue(tcp.fileno()) == (0, 77)

    def test_whoever_watches_is_told_before(self, listener: Listener) -> None:
        """before_release is called once, last one first, while the descriptor is still open."""
        calls: list[tuple[str, int]] = []
        listener.before_release.append(lambda: calls.append(("first", listener.fileno())))
        listener.before_release.append(lambda: calls.append(("last", listener.fileno())))
        fd = listener.fileno()

        listener.close()
        listener.close()

        assert calls == [("last", fd), ("first", fd)]

    def test_a_failing_watcher_stops_nothing_for_good(self, listener: Listener) -> None:
        """If one of before_release raises, close() can be called again, and goes on with the others."""
        calls: list[str] = []

        def fail() -> None:
            calls.append("fail")
            raise RuntimeError

        listener.before_release.extend([lambda: calls.append("first"), fail])
        with pytest.raises(RuntimeError):
            listener.close()
        assert listener.fileno() >= 0

        listener.close()

        assert calls == ["fail", "first"]
        assert listener.fileno() == -1

    def test_close_removes_the_path_that_it_bound(self, tmp_path: Path) -> None:
        """The path of a unix socket goes with the listener that created it."""
        path = tmp_path / "x"

        bound(path).close()

        assert not path.exists()

    def test_close_leaves_an_adopted_path(self, unix: socket.socket) -> None:
        """The path of an adopted socket belongs to the manager."""
        Listener(unix.dup(), name="", origin=Origin.ADOPTED).close()

        assert os.path.exists(unix.getsockname())

    def test_close_leaves_another_ones_path(self, tmp_path: Path) -> None:
        """If another server has taken the path over, it stays, and its server with it."""
        path = tmp_path / "x"
        listener = bound(path)
        path.unlink()
        with bound(path) as other:
            listener.close()

            assert path.is_socket()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(path))
                assert other.queued == 1

    def test_a_forked_child_leaves_the_path(self, tmp_path: Path) -> None:
        """Only the process that bound the path removes it; a child that closes its copy does not."""
        path = tmp_path / "x"
        with bound(path) as listener:
            child = os.fork()
            if child == 0:
                try:
                    listener.close()
                    os._exit(0 if listener.fileno() == -1 else 2)
                finally:
                    os._exit(3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

            assert path.is_socket()
            assert listener.backlog == 5
        assert not path.exists()

    def test_a_path_that_is_gone(self, tmp_path: Path) -> None:
        """Somebody removed the path, or made a file of its directory: there is nothing left to do."""
        (tmp_path / "d").mkdir()
        listeners = [bound(tmp_path / "d" / "x"), bound(tmp_path / "d" / "y")]
        (tmp_path / "d" / "x").unlink()
        listeners[0].close()
        (tmp_path / "d" / "y").unlink()
        (tmp_path / "d").rmdir()
        (tmp_path / "d").touch()
        listeners[1].close()

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
    def test_a_path_that_may_not_be_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """A stale path is left behind without an error: the next bind replaces it."""

        def refuse(path: str) -> None:  # root may do anything, also where these tests run
            raise OSError(code, os.strerror(code), path)

        listener = bound(tmp_path / "x")
        monkeypatch.setattr("sdlisten.listener.os.unlink", refuse)
        listener.close()

        assert listener.fileno() == -1

    def test_another_error_is_reported_and_the_socket_closed(self, tmp_path: Path) -> None:
        """What should not happen (here: a loop of links) is raised, but no descriptor stays open."""
        (tmp_path / "d").mkdir()
        listener = bound(tmp_path / "d" / "x")
        fd = listener.fileno()
        (tmp_path / "d").rename(tmp_path / "moved")
        (tmp_path / "d").symlink_to("d")

        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            listener.close()

        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_with_closes(self, tmp_path: Path) -> None:
        """Leaving a with block closes, also by an error."""
        path = tmp_path / "x"
        with pytest.raises(KeyError), bound(path) as listener:
            raise KeyError

        assert listener.fileno() == -1
        assert not path.exists()


class TestListeners:
    """Listeners: the tuple that listen() returns."""

    def test_closes_all(self, tmp_path: Path) -> None:
        """A with block closes every listener, and closing again is harmless."""
        with Listeners([bound(tmp_path / "x"), bound(tmp_path / "y")]) as listeners:
            assert [listener.address for listener in listeners] == [f"{tmp_path}/x", f"{tmp_path}/y"]
            assert isinstance(listeners, tuple)
        listeners.close()

        assert [listener.fileno() for listener in listeners] == [-1, -1]
        assert list(tmp_path.iterdir()) == []

    def test_closes_all_though_one_fails(self, tmp_path: Path) -> None:
        """If one cannot be closed cleanly, the others are closed all the same, and the error is raised."""
        listeners = Listeners([bound(tmp_path / "x"), bound(tmp_path / "y"), bound(tmp_path / "z")])

        def fail() -> None:
            raise RuntimeError("busy")

        listeners[1].before_release.append(fail)
        with pytest.raises(RuntimeError, match="busy"):
            listeners.close()
        assert [listener.fileno() >= 0 for listener in listeners] == [False, True, False]

        listeners.close()

        assert [listener.fileno() for listener in listeners] == [-1, -1, -1]


def nodelay(transport: asyncio.Transport | asyncio.StreamWriter | None) -> int:
    """Return TCP_NODELAY of a transport's socket."""
    assert transport is not None
    option: int = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    return option


async def get(sockname: tuple[str, int]) -> bytes:
    """Send one request and read the answer to its end."""
    reader, writer = await asyncio.open_connection(*sockname)
    writer.write(GET)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


class Answer(asyncio.Protocol):
    """Answer anything with the value of TCP_NODELAY that the connection has."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        """Answer and close."""
        assert data == GET
        self.transport.write(b"nodelay=%d" % nodelay(self.transport))
        self.transport.close()


async def by_asyncio(listener: Listener) -> bytes:
    """Serve with create_server(), which listens again with a backlog of 100."""
    server = await asyncio.get_running_loop().create_server(Answer, sock=listener.share())
    async with server:
        return await get(listener.socket.getsockname())


async def by_asyncio_streams(listener: Listener) -> bytes:
    """Serve with start_server()."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"nodelay=%d" % nodelay(writer))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, sock=listener.share()):
        return await get(listener.socket.getsockname())


async def by_uvloop(listener: Listener) -> bytes:
    """Serve on uvloop, which listens in C and has to be told the backlog."""
    loop = asyncio.get_running_loop()
    assert type(loop).__module__.startswith("uvloop")
    backlog = listener.backlog
    assert backlog
    server = await loop.create_server(Answer, sock=listener.share(), backlog=backlog)
    async with server:
        return await get(listener.socket.getsockname())


async def by_aiohttp(listener: Listener) -> bytes:
    """Serve with aiohttp."""
    web = imported("aiohttp.web")

    async def answer(request: aiohttp.web.Request) -> object:
        return web.Response(text=f"nodelay={nodelay(request.transport)}")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, listener.share()).start()
        return await get(listener.socket.getsockname())
    finally:
        await runner.cleanup()


async def by_uvicorn(listener: Listener) -> bytes:
    """Serve with uvicorn, whose ASGI application sees no transport; its protocol does."""
    uvicorn = imported("uvicorn")
    h11_impl = imported("uvicorn.protocols.http.h11_impl")
    started = asyncio.get_running_loop().create_future()
    seen: list[int] = []

    class Protocol(h11_impl.H11Protocol):  # type: ignore[misc, name-defined]
        """Look at each connection."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            """Read TCP_NODELAY."""
            seen.append(nodelay(transport))
            super().connection_made(transport)

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        """Say when it serves."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Start, then say so."""
            await super().startup(sockets)
            started.set_result(None)

    async def app(
        _scope: object, _receive: object, send: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"nodelay=%d" % seen[0]})

    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_config=None)
    server = Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener.share()]))
    await started
    try:
        return await get(listener.socket.getsockname())
    finally:
        server.should_exit = True
        await serving


async def by_tornado(listener: Listener) -> bytes:
    """Serve with Tornado, which sets TCP_NODELAY only as it finishes an answer: here a moment before."""
    web = imported("tornado.web")
    httpserver = imported("tornado.httpserver")

    class Handler(web.RequestHandler):  # type: ignore[misc, name-defined]
        """Set TCP_NODELAY and read it."""

        def get(self) -> None:
            """Answer with what the kernel has."""
            stream = self.request.connection.stream
            stream.set_nodelay(True)
            option = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            self.finish(f"nodelay={option}")

    server = httpserver.HTTPServer(web.Application([("/", Handler)], log_function=lambda _: None))
    server.add_sockets([listener.share()])
    try:
        return await get(listener.socket.getsockname())
    finally:
        server.stop()
        await server.close_all_connections()


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


def imported(name: str) -> Any:  # noqa: ANN401 - a module, with whatever it has
    """Import what only one test needs, if it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(str(error))


def run(main: Awaitable[bytes], *, loop: str) -> bytes:
    """Run on asyncio or uvloop."""

    async def coroutine() -> bytes:
        return await main

    if loop == "uvloop":
        factory: Callable[[], asyncio.AbstractEventLoop] = imported("uvloop").new_event_loop
    else:
        factory = asyncio.SelectorEventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine())


SERVERS = [by_asyncio, by_asyncio_streams, by_aiohttp, by_uvicorn, by_tornado, by_uvloop]


def backlog_by_ss(port: int) -> int:
    """Return what ss(8) shows as Send-Q of a TCP listener."""
    program = shutil.which("ss")
    if program is None:
        missing("ss (iproute2) is not installed")
    command = [program, "-ltnH", f"sport = :{port}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[2])


@pytest.fixture(scope="module")
def _libuv() -> None:
    """Let libuv open what it opens once in the life of a process: a pipe for signals."""
    with contextlib.suppress(ImportError):
        importlib.import_module("uvloop").new_event_loop().close()


@pytest.mark.usefixtures("_libuv")
@pytest.mark.parametrize("serve", SERVERS, ids=[serve.__name__ for serve in SERVERS])
def test_servers_leave_the_backlog(listener: Listener, serve: Callable[[Listener], Awaitable[bytes]]) -> None:
    """A server on share() answers, has TCP_NODELAY, and leaves the backlog and the listener as they are."""
    port = listener.socket.getsockname()[1]
    assert (listener.backlog, backlog_by_ss(port)) == (77, 77)

    answer = run(serve(listener), loop="uvloop" if serve is by_uvloop else "asyncio")

    assert b"nodelay=1" in answer
    assert (listener.backlog, backlog_by_ss(port)) == (77, 77)
    assert os.get_blocking(listener.fileno()) is False


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_accept_after_a_shutdown(kind: str, request: pytest.FixtureRequest) -> None:
    """A listener that another holder has shut down makes accept() fail, and not spin until the deadline."""
    sock = request.getfixturevalue(kind)
    with Listener(sock.dup(), name="x", origin=Origin.ADOPTED) as listener:
        sock.shutdown(socket.SHUT_RDWR)

        with pytest.raises(OSError, match=r"listen any more|Invalid argument") as caught:
            listener.accept(timeout=5)

        assert caught.value.errno == errno.EINVAL
