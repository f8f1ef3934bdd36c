"""sdlisten.accepting on asyncio, uvloop and Tornado, with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import importlib
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from sdlisten import accepting
from sdlisten.accepting import (
    CAPACITY_ERRNOS,
    CONNECTION_ERRNOS,
    LISTENER_ERRNOS,
    AcceptHandle,
    add_accept_handler,
)
from sdlisten.errors import DescriptorError
from sdlisten.listener import Listener, Origin

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator

    Unchanged = Callable[[], contextlib.AbstractContextManager[None]]

SECONDS = 20.0  # far beyond what anything here takes; nothing waits for it to pass

LOOPS = ("asyncio", "uvloop", "tornado")

Connections = list[socket.socket]


def needed(module: str) -> Any:  # noqa: ANN401 - any module
    """Import a module; where it is missing, skip the test, or fail it under SDLISTEN_NO_SKIP=1."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        unavailable(str(error))


def unavailable(what: str) -> NoReturn:
    """Skip the test because something is missing, or fail it under SDLISTEN_NO_SKIP=1."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


class Loop:
    """One kind of event loop, and what it was told to report."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "tornado":
            self.io_loop = needed("tornado.ioloop").IOLoop(make_current=False)
            self.asyncio: asyncio.AbstractEventLoop = self.io_loop.asyncio_loop
        else:
            self.asyncio = self.io_loop = needed(kind).new_event_loop()
        self.reported: list[dict[str, Any]] = []
        self.asyncio.set_exception_handler(lambda _, context: self.reported.append(context))

    def run(self, awaitable: Awaitable[Any]) -> Any:  # noqa: ANN401 - whatever it returns
        """Run the loop until something is done."""

        async def in_time() -> Any:  # noqa: ANN401
            return await asyncio.wait_for(awaitable, SECONDS)

        result = self.asyncio.run_until_complete(in_time())
        for context in self.reported:
            if isinstance(context.get("exception"), pytest.fail.Exception):
                raise context["exception"]  # pytest-timeout's, out of a callback that the loop had called
        return result

    def until(self, condition: Callable[[], object]) -> None:
        """Run the loop until something is true."""

        async def wait() -> None:
            while not condition():
                await self._polled()

        self.run(wait())

    def settle(self) -> None:
        """Run the loop until it has asked the kernel several times what is ready, and called all that was."""

        async def polls() -> None:
            for _ in range(3):
                await self._polled()

        self.run(polls())

    async def _polled(self) -> None:
        # A descriptor becomes readable now: when the loop calls back, it has asked about all the others too.
        near, far = socket.socketpair()
        with near, far:
            called = asyncio.Event()
            self.asyncio.add_reader(near.fileno(), called.set)
            far.send(b"x")
            try:
                await called.wait()
            finally:
                self.asyncio.remove_reader(near.fileno())

    def close(self) -> None:
        """Close it, with the descriptors it has."""
        if self.kind == "tornado":
            if not self.asyncio.is_closed():
                self.io_loop.close()
        else:
            self.asyncio.close()


@pytest.fixture(scope="session", autouse=True)
def _libuv() -> None:
    """Let libuv open the pipe for signals that it keeps until the process ends."""
    with contextlib.suppress(ImportError):
        importlib.import_module("uvloop").new_event_loop().close()


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    """Give each kind of event loop, not running."""
    with contextlib.closing(Loop(request.param)) as made:
        yield made


class Net:
    """Listeners and clients of one test, closed at its end; the connections accepted as well."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.accepted: Connections = []
        stack.callback(self._close_accepted)

    def take(self, connection: socket.socket, address: object) -> None:
        """Keep a connection: the simplest accept callback."""
        del address
        self.accepted.append(connection)

    def _close_accepted(self) -> None:
        for connection in self.accepted:
            connection.close()

    def bare(self, kind: str = "tcp") -> socket.socket:
        """Listen, blocking, as a manager does."""
        if kind in {"unix", "seqpacket"}:
            sock_type = socket.SOCK_STREAM if kind == "unix" else socket.SOCK_SEQPACKET
            sock = socket.socket(socket.AF_UNIX, sock_type)
            sock.bind(str(self._directory / f"{kind}-{sock.fileno()}"))
            sock.listen(128)
        elif kind == "tcp6":
            try:
                sock = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=128)
            except OSError as error:
                unavailable(f"no IPv6 here: {error}")
        else:
            sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        return self._stack.enter_context(sock)

    def listener(self, kind: str = "tcp", origin: Origin = Origin.BOUND) -> Listener:
        """Make a Listener."""
        return self._stack.enter_context(Listener(self.bare(kind), name="", origin=origin))

    def held(self, kind: str = "tcp", origin: Origin = Origin.ADOPTED) -> tuple[Listener, socket.socket]:
        """Make a Listener of a socket that another holder, who is returned too, has as well."""
        listener = self.listener(kind, origin)
        return listener, self._stack.enter_context(listener.socket.dup())

    def connect(self, to: Listener | socket.socket, count: int = 1) -> Connections:
        """Queue connections; returns the clients' ends."""
        sock = to.socket if isinstance(to, Listener) else to
        clients = []
        for _ in range(count):
            client = self._stack.enter_context(socket.socket(sock.family, sock.type))
            client.settimeout(SECONDS)
            client.connect(sock.getsockname())
            clients.append(client)
        return clients


@pytest.fixture
def net(tmp_path: Path, _nothing_leaks: None) -> Iterator[Net]:
    """Give listeners and clients that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield Net(tmp_path, stack)


@pytest.fixture(params=["_accept", "accept"])
def accept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do without the private ``socket._accept`` in one of two runs."""
    if request.param == "accept":
        monkeypatch.setattr(accepting, "_HAS_PRIVATE_ACCEPT", False)
    return str(request.param)


class Counting:
    """Stands before the accept() of a handle: counts, and fails first as the kernel would."""

    def __init__(self, handle: AcceptHandle, *errnos: int) -> None:
        self._accept = handle._accept
        self.errnos = list(errnos)
        self.calls = 0
        self.on_error: Callable[[], object] = lambda: None
        handle._accept = self

    def __call__(self) -> tuple[int, Any]:
        """Accept one."""
        self.calls += 1
        if self.errnos:
            self.on_error()
            number = self.errnos.pop()
            raise OSError(number, os.strerror(number))
        return self._accept()


def watched(fd: int) -> bool:
    """Return whether an epoll(7) of this process watches a descriptor, or one that had that number."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if os.readlink(f"/proc/self/fd/{entry}") == "anon_inode:[eventpoll]":
                info = Path(f"/proc/self/fdinfo/{entry}").read_text()
                if re.search(rf"^tfd:\s+{fd}\s", info, re.MULTILINE):
                    return True
    return False


def is_closed(connection: socket.socket, client: socket.socket) -> bool:
    """Return whether our end of a connection is closed, here and for the client."""
    return connection.fileno() == -1 and client.recv(1) == b""


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the module logged."""
    return [record.getMessage() for record in caplog.records if record.name == "sdlisten.accepting"]


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix", "seqpacket"])
@pytest.mark.usefixtures("accept")
def test_a_connection_is_what_was_promised(kind: str, loop: Loop, net: Net) -> None:
    """A connection is an exact socket, non-blocking, close-on-exec, of the listener's kind, and it works."""
    listener = net.listener(kind)
    got: list[tuple[socket.socket, object]] = []
    add_accept_handler(listener, lambda *both: got.append(both), loop.io_loop)
    (client,) = net.connect(listener)
    loop.until(lambda: got)
    ((connection, address),) = got
    with connection:
        assert type(connection) is socket.socket
        assert connection.gettimeout() == 0.0
        assert not os.get_blocking(connection.fileno())
        assert not os.get_inheritable(connection.fileno())
        options = (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
        kernel = [connection.getsockopt(socket.SOL_SOCKET, option) for option in options]
        assert [connection.family, connection.type, connection.proto] == kernel
        assert [listener.socket.getsockopt(socket.SOL_SOCKET, option) for option in options] == kernel
        assert address == client.getsockname()
        client.send(b"hello")
        assert loop.run(loop.asyncio.sock_recv(connection, 9)) == b"hello"
        connection.send(b"you too")
        assert client.recv(9) == b"you too"


def test_asyncio_sends_at_once_on_a_connection(loop: Loop, net: Net) -> None:
    """A connection says that it is TCP, though the listener said protocol 0: asyncio sets TCP_NODELAY."""
    listener = net.listener()
    assert listener.socket.proto == 0
    add_accept_handler(listener, net.take, loop.io_loop)
    net.connect(listener)
    loop.until(lambda: net.accepted)
    connection = net.accepted[0].dup()
    made = loop.run(loop.asyncio.connect_accepted_socket(asyncio.Protocol, connection))
    assert net.accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    made[0].close()
    loop.settle()


@pytest.mark.usefixtures("accept")
def test_a_default_timeout_changes_nothing(loop: Loop, net: Net) -> None:
    """With socket.setdefaulttimeout() a connection is as non-blocking as without."""
    listener = net.listener()
    add_accept_handler(listener, net.take, loop.io_loop)
    net.connect(listener)
    socket.setdefaulttimeout(5)
    try:
        loop.until(lambda: net.accepted)
    finally:
        socket.setdefaulttimeout(None)
    assert net.accepted[0].gettimeout() == 0.0
    assert not os.get_blocking(net.accepted[0].fileno())


def test_a_bare_socket_is_made_non_blocking(loop: Loop, net: Net) -> None:
    """A socket that is no Listener is accepted on as well; it is borrowed, and becomes non-blocking."""
    sock = net.bare()
    remove = add_accept_handler(sock, net.take, loop.io_loop)
    assert not os.get_blocking(sock.fileno())
    net.connect(sock)
    loop.until(lambda: net.accepted)
    remove()
    assert sock.fileno() >= 0
    assert not watched(sock.fileno())


@pytest.mark.parametrize("origin", list(Origin))
def test_a_burst_is_delivered_in_order(origin: Origin, loop: Loop, net: Net) -> None:
    """Queued connections of a listener of any origin all arrive, first come, first served."""
    listener = net.listener(origin=origin)
    add_accept_handler(listener, net.take, loop.io_loop)
    clients = net.connect(listener, 40)
    loop.until(lambda: len(net.accepted) == 40)
    assert [connection.getpeername() for connection in net.accepted] == [
        client.getsockname() for client in clients
    ]


def test_the_running_loop_is_the_default(loop: Loop, net: Net) -> None:
    """Without io_loop= the running loop is taken, whatever kind it is."""
    listener = net.listener()

    async def attach() -> None:
        add_accept_handler(listener, net.take)

    loop.run(attach())
    net.connect(listener)
    loop.until(lambda: net.accepted)


def test_tornados_current_loop_is_the_default_where_none_runs(net: Net) -> None:
    """Without io_loop= and outside a running loop, Tornado's current one is taken."""
    listener = net.listener()
    with contextlib.closing(Loop("tornado")) as loop:
        asyncio.set_event_loop(loop.asyncio)
        try:
            add_accept_handler(listener, net.take)
        finally:
            asyncio.set_event_loop(None)
        net.connect(listener)
        loop.until(lambda: net.accepted)


def test_tornado_without_a_current_loop_is_no_loop(net: Net, unchanged: Unchanged) -> None:
    """Where Tornado has a loop but not for this thread, there is none to take."""
    sock = net.bare()
    with contextlib.closing(Loop("tornado")):
        asyncio.set_event_loop(None)
        with unchanged(), pytest.raises(RuntimeError, match="no event loop: call add_accept_handler"):
            add_accept_handler(sock, net.take)


NO_LOOP = """
import os, socket, sys, warnings
warnings.simplefilter("error")
for name in sys.argv[1:]:
    __import__(name)
from sdlisten.accepting import add_accept_handler
sock = socket.create_server(("127.0.0.1", 0))
before = os.listdir("/proc/self/fd")
try:
    add_accept_handler(sock, print)
except RuntimeError as error:
    print(error)
print(before == os.listdir("/proc/self/fd") and os.get_blocking(sock.fileno()))
print("asyncio" in sys.modules)
sock.close()
"""


@pytest.mark.parametrize(
    "imported", [(), ("asyncio",), ("tornado.ioloop",)], ids=lambda names: "".join(names) or "-"
)
def test_no_loop_at_all_is_a_clear_error(imported: tuple[str, ...]) -> None:
    """Where nobody made a loop, none is made: the error says what to do, and nothing has changed."""
    for name in imported:
        needed(name)
    command = (sys.executable, "-c", NO_LOOP, *imported)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    text = "no event loop: call add_accept_handler() from a running one, or give it io_loop="
    if "tornado.ioloop" in imported and sys.version_info < (3, 12):
        assert done.stdout.startswith(text)  # asked by Tornado, asyncio has made a loop of its own
    else:
        assert (done.stdout, done.stderr) == (f"{text}\nTrue\n{bool(imported)}\n", "")


async def coroutine_function(connection: socket.socket, address: object) -> None:
    """Stand for a handler that somebody would have to await."""


@pytest.mark.parametrize(
    "callback", [coroutine_function, functools.partial(coroutine_function)], ids=["function", "partial"]
)
def test_a_coroutine_function_is_refused(
    callback: Callable[..., object], net: Net, unchanged: Unchanged
) -> None:
    """A coroutine function is refused at once, because nobody would await what it returns."""
    sock = net.bare()
    with (
        unchanged(),
        pytest.raises(TypeError, match=r"coroutine_function.* nobody would await: start a task"),
    ):
        add_accept_handler(sock, callback)


@pytest.mark.parametrize("burst", [0, -1])
def test_a_burst_of_none_is_refused(burst: int, net: Net, unchanged: Unchanged) -> None:
    """A burst under 1 would never accept anything: ValueError with the value."""
    sock = net.bare()
    with unchanged(), pytest.raises(ValueError, match=f"burst={burst}: expected how many connections"):
        add_accept_handler(sock, net.take, burst=burst)


def test_a_closed_listener_is_refused(loop: Loop, net: Net, unchanged: Unchanged) -> None:
    """A closed Listener is a ValueError that names it, a closed socket the kernel's EBADF."""
    listener, sock = net.listener(), net.bare()
    address = listener.address
    listener.close()
    sock.close()
    with unchanged(), pytest.raises(ValueError, match=f"the listener '' at {address} is closed or detached"):
        add_accept_handler(listener, net.take, loop.io_loop)
    with unchanged(), pytest.raises(OSError, match="Bad file descriptor"):
        add_accept_handler(sock, net.take, loop.io_loop)


@pytest.mark.parametrize("sock_type", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "datagram"])
def test_what_does_not_listen_is_refused(sock_type: int, loop: Loop, unchanged: Unchanged) -> None:
    """A socket that does not listen is a DescriptorError with its number and what it is."""
    with socket.socket(socket.AF_INET, sock_type) as sock:
        sock.bind(("127.0.0.1", 0))
        fd = sock.fileno()
        with (
            unchanged(),
            pytest.raises(DescriptorError, match=rf"fd {fd} .* does not listen: call listen\(\)"),
        ):
            add_accept_handler(sock, print, loop.io_loop)


def test_a_socket_with_an_accept_of_its_own_is_refused(loop: Loop, net: Net, unchanged: Unchanged) -> None:
    """An SSLSocket is refused: its connections would be promised to be TLS, and come as plain ones."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with (
        context.wrap_socket(net.bare().dup(), server_side=True) as sock,
        unchanged(),
        pytest.raises(TypeError, match=r"SSLSocket has an accept\(\) of its own"),
    ):
        add_accept_handler(sock, net.take, loop.io_loop)


def test_what_is_no_loop_is_refused(net: Net, unchanged: Unchanged) -> None:
    """An io_loop that cannot watch descriptors is a TypeError that names it."""
    sock = net.bare()
    with unchanged(), pytest.raises(TypeError, match=r"io_loop=17: expected an asyncio loop with add_reader"):
        add_accept_handler(sock, net.take, 17)


def test_a_closed_loop_is_refused(loop: Loop, net: Net, unchanged: Unchanged) -> None:
    """A closed loop would never call anybody: RuntimeError, and the socket is as before."""
    sock = net.bare()
    loop.close()
    with unchanged(), pytest.raises(RuntimeError, match=r"io_loop=.* is closed"):
        add_accept_handler(sock, net.take, loop.io_loop)


def test_a_second_handler_of_the_same_socket_is_refused(loop: Loop, net: Net, unchanged: Unchanged) -> None:
    """A loop has one reader per descriptor: a second handler is refused until the first is removed."""
    listener = net.listener()
    first = add_accept_handler(listener, net.take, loop.io_loop)
    with (
        unchanged(),
        pytest.raises(ValueError, match=r"<AcceptHandle 127\..* attached> accepts on fd \d+ alr"),
    ):
        add_accept_handler(listener.socket, net.take, loop.io_loop)
    first.pause()
    with unchanged(), pytest.raises(ValueError, match=r"<AcceptHandle 127\..* paused> accepts on fd \d+ alr"):
        add_accept_handler(listener, net.take, loop.io_loop)
    first.remove()
    add_accept_handler(listener, net.take, loop.io_loop)
    first.remove()
    net.connect(listener)
    loop.until(lambda: net.accepted)


def test_a_refusal_of_the_loop_changes_nothing(net: Net, unchanged: Unchanged) -> None:
    """Where the loop refuses the descriptor, the error is the loop's, and the socket is as before."""

    class Refusing(asyncio.SelectorEventLoop):
        def add_reader(self, *_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, "too many descriptors are watched")

    listener, sock = net.listener(), net.bare()
    with contextlib.closing(Refusing()) as loop:
        with unchanged(), pytest.raises(OSError, match="too many descriptors are watched"):
            add_accept_handler(sock, net.take, loop)
        with unchanged(), pytest.raises(OSError, match="too many descriptors are watched"):
            add_accept_handler(listener, net.take, loop)
    assert listener.before_release == []


def test_a_raising_callback_loses_its_own_connection_alone(loop: Loop, net: Net) -> None:
    """When the callback raises, that connection is closed and reported, and the same burst goes on."""
    listener = net.listener()
    lost: Connections = []
    wakes: list[int] = []

    def callback(connection: socket.socket, address: object) -> None:
        if len(net.accepted) == 1 and not lost:
            lost.append(connection)
            loop.asyncio.call_soon(lambda: wakes.append(len(net.accepted)))  # runs after the burst
            text = "no time for this one"
            raise LookupError(text)
        net.take(connection, address)

    add_accept_handler(listener, callback, loop.io_loop)
    clients = net.connect(listener, 3)
    loop.until(lambda: wakes)
    assert wakes == [2]
    assert is_closed(lost[0], clients[1])
    (context,) = loop.reported
    assert repr(context["exception"]) == "LookupError('no time for this one')"
    assert context["socket"] is lost[0]
    assert context["message"] == f"the accept callback of {listener.address} raised"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_exit_is_obeyed(stop: type[BaseException], loop: Loop, net: Net) -> None:
    """KeyboardInterrupt and SystemExit end the run of the loop; that connection is closed, no other one."""
    listener = net.listener()
    lost: Connections = []

    def callback(connection: socket.socket, address: object) -> None:
        if not lost:
            lost.append(connection)
            raise stop
        net.take(connection, address)

    add_accept_handler(listener, callback, loop.io_loop)
    clients = net.connect(listener, 2)
    with pytest.raises(stop):
        loop.asyncio.run_forever()
    assert is_closed(lost[0], clients[0])
    assert not loop.reported
    loop.until(lambda: net.accepted)


def test_what_else_a_callback_returns_is_ignored(loop: Loop, net: Net) -> None:
    """A callback may return anything that nobody has to await."""
    listener = net.listener()

    def callback(connection: socket.socket, address: object) -> object:
        net.take(connection, address)
        return connection

    add_accept_handler(listener, callback, loop.io_loop)
    net.connect(listener, 2)
    loop.until(lambda: len(net.accepted) == 2)
    assert all(connection.fileno() >= 0 for connection in net.accepted)
    assert not loop.reported


class Inert:
    """An awaitable that can be neither closed nor cancelled."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def a_coroutine(_: Loop) -> Coroutine[Any, Any, None]:
    """Make a coroutine that nobody has awaited."""
    return coroutine_function(socket.socket.__new__(socket.socket), None)


def a_future(loop: Loop) -> asyncio.Future[None]:
    """Make a future that nobody has awaited."""
    return loop.asyncio.create_future()


def something_inert(_: Loop) -> Inert:
    """Make an awaitable of no known kind."""
    return Inert()


@pytest.mark.parametrize("awaitable", [a_coroutine, a_future, something_inert])
def test_an_awaitable_is_refused(awaitable: Callable[[Loop], Awaitable[None]], loop: Loop, net: Net) -> None:
    """When the callback returns an awaitable, its connection is closed and it reported; nothing warns."""
    listener = net.listener()
    returned: list[Awaitable[None]] = []

    def callback(connection: socket.socket, address: object) -> object:
        net.take(connection, address)
        returned.append(awaitable(loop))
        return returned[-1]

    add_accept_handler(listener, callback, loop.io_loop)
    (client,) = net.connect(listener)
    loop.until(lambda: loop.reported)
    assert is_closed(net.accepted[0], client)
    assert re.fullmatch(
        r"<function .*callback.*> returned an awaitable, and nobody would await it",
        str(loop.reported[0]["exception"]),
    )
    if isinstance(returned[0], asyncio.Future):
        assert returned[0].cancelled()
    returned.clear()
    gc.collect()  # "never awaited" would be an error here


@pytest.mark.parametrize("origin", [Origin.BOUND, Origin.ADOPTED])
def test_remove_ends_the_burst(origin: Origin, loop: Loop, net: Net) -> None:
    """After remove() inside the callback no callback runs, and the rest stays in the queue."""
    listener = net.listener(origin=origin)

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if len(net.accepted) == 2:
            handle()

    handle = add_accept_handler(listener, callback, loop.io_loop)
    clients = net.connect(listener, 5)
    loop.until(lambda: len(net.accepted) == 2)
    loop.settle()
    assert len(net.accepted) == 2
    assert listener.queued == 3
    assert not watched(listener.fileno())
    connection, address = listener.accept(0)
    connection.close()
    assert address == clients[2].getsockname()
    assert repr(handle) == f"<AcceptHandle {listener.address} removed>"


def test_remove_from_another_callback_of_the_same_wake_up(loop: Loop, net: Net) -> None:
    """A handler that another callback of the same wake-up removes is not called any more."""
    listeners = net.listener(), net.listener()
    handles: list[AcceptHandle] = []

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        for handle in handles:
            handle.remove()

    handles += [add_accept_handler(listener, callback, loop.io_loop) for listener in listeners]
    for listener in listeners:
        net.connect(listener)
    loop.settle()
    assert len(net.accepted) == 1


def test_remove_is_harmless_twice_and_after_the_loop(loop: Loop, net: Net) -> None:
    """After remove(), and after the loop was closed, remove(), pause() and resume() do nothing."""
    listener, other = net.listener(), net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    late = add_accept_handler(other, net.take, loop.io_loop)
    resting = add_accept_handler(net.bare(), net.take, loop.io_loop)
    resting._take_a_rest(OSError(errno.EMFILE, "out of descriptors"))
    handle.remove()
    handle()
    handle.resume()
    net.connect(listener)
    loop.settle()
    assert not net.accepted
    loop.close()
    late.pause()
    late.resume()
    for each in (handle, late, resting):
        each.remove()
        each.remove()
    assert listener.before_release == other.before_release == []
    assert other.fileno() >= 0


@pytest.mark.parametrize("leave", [Listener.close, Listener.detach])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_closing_or_detaching_a_listener_detaches_its_handler(
    leave: Callable[[Listener], socket.socket | None], kind: str, loop: Loop, net: Net
) -> None:
    """A Listener closed while attached is not watched any more, though another holder keeps it and queues."""
    listener, holder = net.held(kind)
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    loop.settle()
    fd = listener.fileno()
    assert watched(fd)
    net.connect(listener)
    left = leave(listener)
    assert not watched(fd)
    loop.settle()
    assert not net.accepted
    assert handle.error is None
    holder.accept()[0].close()
    if left is not None:
        left.close()


def test_closing_a_listener_inside_the_callback(loop: Loop, net: Net) -> None:
    """A callback may close the Listener that it was called for: the burst ends there."""
    listener, holder = net.held()

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        listener.close()

    add_accept_handler(listener, callback, loop.io_loop)
    fd = listener.fileno()
    net.connect(listener, 3)
    loop.until(lambda: net.accepted)
    loop.settle()
    assert len(net.accepted) == 1
    assert not watched(fd)
    for _ in range(2):
        holder.accept()[0].close()
    assert not loop.reported


def test_a_forked_child_leaves_the_loop_to_its_parent(loop: Loop, net: Net) -> None:
    """A child forked by a callback may close its listener: the parent, whose epoll(7) it shares, goes on."""
    listener = net.listener()
    codes: list[int] = []

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if not codes:
            pid = os.fork()
            if pid == 0:
                try:
                    listener.close()
                finally:
                    os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    add_accept_handler(listener, callback, loop.io_loop)
    net.connect(listener)
    loop.until(lambda: net.accepted)
    assert codes == [0]
    net.connect(listener)
    loop.until(lambda: len(net.accepted) == 2)


def test_a_daemonized_child_may_run_the_loop(net: Net) -> None:
    """A child that was forked before the loop ran, and runs it, can remove the handler as usual."""
    listener = net.listener()
    with contextlib.closing(Loop("asyncio")) as loop:

        def callback(connection: socket.socket, address: object) -> None:
            net.take(connection, address)
            handle.remove()

        handle = add_accept_handler(listener, callback, loop.io_loop)
        net.connect(listener, 2)
        pid = os.fork()
        if pid == 0:
            try:
                loop.settle()
                os._exit(len(net.accepted) + 10 * watched(listener.fileno()))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize("origin", [Origin.BOUND, Origin.ADOPTED])
def test_pause_and_resume(origin: Origin, loop: Loop, net: Net) -> None:
    """pause() inside the callback ends the burst; resume() takes what waited."""
    listener = net.listener(origin=origin)

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if len(net.accepted) == 2:
            handle.pause()
            handle.pause()

    handle = add_accept_handler(listener, callback, loop.io_loop)
    assert repr(handle) == f"<AcceptHandle {listener.address} attached>"
    net.connect(listener, 5)
    loop.until(lambda: len(net.accepted) == 2)
    loop.settle()
    assert len(net.accepted) == 2
    assert repr(handle) == f"<AcceptHandle {listener.address} paused>"
    handle.resume()
    handle.resume()
    loop.until(lambda: len(net.accepted) == 5)


def test_pause_and_resume_within_a_callback(loop: Loop, net: Net) -> None:
    """A pause() that the same callback takes back changes nothing."""
    listener = net.listener()

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        handle.pause()
        handle.resume()

    handle = add_accept_handler(listener, callback, loop.io_loop)
    net.connect(listener, 5)
    loop.until(lambda: len(net.accepted) == 5)


def test_pause_while_resting(loop: Loop, net: Net) -> None:
    """A rest that ends during a pause leaves it paused; a resume() during a rest does not cut it short."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle, errno.EMFILE, errno.EMFILE)
    net.connect(listener)
    loop.until(lambda: count.calls == 1)
    handle.pause()
    loop.until(lambda: handle._rest_timer is None)  # the rest is over
    loop.settle()
    assert count.calls == 1
    handle.resume()
    loop.until(lambda: count.calls == 2)
    handle.pause()
    handle.resume()
    loop.settle()
    assert count.calls == 2
    assert not watched(listener.fileno())
    loop.until(lambda: net.accepted)
    assert count.calls == 3


def test_remove_while_resting(loop: Loop, net: Net) -> None:
    """remove() during a rest cancels what would have ended it."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle, errno.EMFILE)
    net.connect(listener)
    loop.until(lambda: count.calls)
    handle.remove()
    assert handle._rest_timer is not None
    assert handle._rest_timer.cancelled()
    after = loop.asyncio.create_future()
    loop.asyncio.call_later(2 * accepting._FIRST_REST, after.set_result, None)  # the rest would be over
    loop.run(after)
    loop.settle()
    assert count.calls == 1
    assert not net.accepted


@pytest.mark.parametrize("origin", [Origin.BOUND, Origin.ADOPTED])
@pytest.mark.parametrize("burst", [1, 2, 8])
def test_a_burst_lets_others_have_their_turn(burst: int, origin: Origin, loop: Loop, net: Net) -> None:
    """With 100 connections queued, another callback of the loop runs after at most `burst` of them."""
    listener = net.listener(origin=origin)
    seen = [""]

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        seen[-1] += "x"

    def other() -> None:
        seen.append("")
        if len(net.accepted) < 100:
            loop.asyncio.call_soon(other)

    net.connect(listener, 100)
    add_accept_handler(listener, callback, loop.io_loop, burst=burst)
    loop.asyncio.call_soon(other)
    loop.until(lambda: len(net.accepted) == 100)
    assert max(map(len, seen)) == burst


@pytest.mark.parametrize("number", CONNECTION_ERRNOS, ids=errno.errorcode.get)
def test_an_error_of_one_connection_is_passed_over(
    number: int, loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """After an error that concerns one connection the next is accepted at once; nothing is logged."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop, burst=2)
    count = Counting(handle, number)
    wakes: list[int] = []
    count.on_error = lambda: loop.asyncio.call_soon(lambda: wakes.append(count.calls))  # after the burst
    net.connect(listener)
    loop.until(lambda: wakes)
    assert wakes == [2]
    assert len(net.accepted) == 1
    assert log_lines(caplog) == []


def test_errors_of_connections_without_end_are_no_busy_loop(
    loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of one connection that does not go away, as EPERM by seccomp, makes the handler rest soon."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle, *[errno.EPERM] * 1_000_000)
    net.connect(listener)
    loop.until(lambda: handle._rest_timer)
    assert 50 < count.calls < 500
    assert not watched(listener.fileno())
    before = count.calls
    loop.until(lambda: count.calls > before)
    assert count.calls == before + 1
    assert handle._rest == 2 * accepting._FIRST_REST
    (line,) = log_lines(caplog)
    assert "Operation not permitted (a firewall rule or a security module forbids this client)" in line
    count.errnos.clear()
    loop.until(lambda: net.accepted)


@pytest.mark.parametrize("number", [*CAPACITY_ERRNOS, errno.EACCES], ids=errno.errorcode.get)
def test_being_out_of_something_rests(
    number: int, loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of descriptors or memory, or at an error nobody has heard of, it rests, then serves who waited."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle, number, number)
    net.connect(listener)
    loop.until(lambda: net.accepted)
    assert count.calls == 3
    why = CAPACITY_ERRNOS.get(number, "not an error that accept(2) documents")
    first, second = log_lines(caplog)
    assert first.startswith(f"cannot accept on {listener.address}, clients wait: [Errno {number}] ")
    assert first.endswith(f"({why})")
    assert re.fullmatch(rf"accepting on {listener.address} again after 0\.\d s", second)


def test_the_rests_grow_and_start_over(loop: Loop, net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """Each rest is twice as long as the last, up to a second, until accept() has what it needs."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    rests = []
    for _ in range(7):
        handle._take_a_rest(OSError(errno.EMFILE, "out of descriptors"))
        rests.append(handle._rest)
        assert handle._rest_timer is not None
        handle._rest_timer.cancel()
    assert rests == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    handle._wake()
    handle._on_readable()  # nobody waits: EAGAIN, for which the kernel needed a free descriptor
    assert handle._rest == 0.0
    assert len(log_lines(caplog)) == 2
    count = Counting(handle, errno.EMFILE)
    net.connect(listener)
    loop.until(lambda: net.accepted)
    assert count.calls == 2
    assert len(log_lines(caplog)) == 2, "a second outage within ten seconds is not logged"


@pytest.mark.parametrize("number", LISTENER_ERRNOS, ids=errno.errorcode.get)
def test_the_end_of_the_listener_detaches(
    number: int, loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """At an error that says the listener is gone the handler detaches, keeps the error and logs one line."""
    listener = net.listener()
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle, number)
    net.connect(listener)
    loop.until(lambda: count.calls)
    loop.settle()
    assert count.calls == 1
    assert not watched(listener.fileno())
    assert handle.error is not None
    assert handle.error.errno == number
    assert listener.before_release == []
    (line,) = log_lines(caplog)
    assert line == (
        f"detached from {listener.address}, it will never accept again: "
        f"{handle.error} ({LISTENER_ERRNOS[number]})"
    )


def test_a_second_without_descriptors(loop: Loop, net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """Out of descriptors for a second: at most 20 accept() calls, 2 log lines; then the client is served."""
    listener = net.listener()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    served = loop.asyncio.create_future()
    waited: list[int] = []

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        served.set_result(None)

    def more_again() -> None:
        waited.append(count.calls)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    async def outage() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        client.connect(listener.socket.getsockname())
        loop.asyncio.call_later(1.0, more_again)
        await served

    count = Counting(add_accept_handler(listener, callback, loop.io_loop))
    with socket.socket() as client:
        loop.settle()
        free = os.dup(0)  # the lowest number that is free, and so the lowest limit that forbids one more
        os.close(free)
        try:
            loop.run(outage())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert 2 <= waited[0] <= 20
        assert count.calls <= 20
        assert [line.split(" on ")[0] for line in log_lines(caplog)] == ["cannot accept", "accepting"]
        net.accepted[0].send(b"at last")
        assert client.recv(9) == b"at last"


END_IT = """
import os, socket, sys
socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_RD)
"""


@pytest.mark.parametrize("kind", ["tcp", "unix", "seqpacket"])
@pytest.mark.parametrize("origin", [Origin.BOUND, Origin.ADOPTED])
def test_another_holders_shutdown_detaches(
    origin: Origin, kind: str, loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """When another process calls shutdown() on the socket, the handler detaches after one accept()."""
    listener = net.listener(kind, origin)
    handle = add_accept_handler(listener, net.take, loop.io_loop)
    count = Counting(handle)
    loop.settle()
    assert watched(listener.fileno())
    command = (sys.executable, "-I", "-S", "-c", END_IT, str(listener.fileno()))
    subprocess.run(command, pass_fds=(listener.fileno(),), check=True, timeout=SECONDS)
    loop.until(lambda: handle.error)
    loop.settle()
    assert count.calls == 1
    assert handle.error is not None
    assert handle.error.errno == errno.EINVAL
    assert not watched(listener.fileno())
    assert len(log_lines(caplog)) == 1
    assert not loop.reported
    handle()


STEAL = """
import os, socket, sys
fd = int(sys.argv[1])
os.set_blocking(fd, True)
socket.socket(fileno=fd).accept()
"""


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_thief_that_makes_the_listener_blocking_stalls_nothing(kind: str, loop: Loop, net: Net) -> None:
    """Another process clears O_NONBLOCK and takes what the loop was woken for: the loop does not block."""
    # Both are readable in one wake-up of the loop. Whoever is called first has the other's connection stolen.
    listeners = [net.listener(kind, Origin.ADOPTED) for _ in range(2)]
    thieves: list[int] = []

    def steal_from(listener: Listener) -> None:
        fd = listener.fileno()
        command = (sys.executable, "-I", "-S", "-c", STEAL, str(fd))
        thieves.append(subprocess.run(command, pass_fds=(fd,), check=False, timeout=SECONDS).returncode)
        assert os.get_blocking(fd)

    def callback(other: Listener, connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if not thieves:
            steal_from(other)

    for listener, other in (listeners, listeners[::-1]):
        add_accept_handler(listener, functools.partial(callback, other), loop.io_loop)
        net.connect(listener)
    loop.until(lambda: net.accepted)
    loop.settle()
    assert thieves == [0]
    assert len(net.accepted) == 1
    assert not any(os.get_blocking(listener.fileno()) for listener in listeners)


@pytest.mark.parametrize("bare", [False, True], ids=["Listener", "share"])
def test_a_thief_within_a_burst_stalls_nothing(bare: bool, loop: Loop, net: Net) -> None:
    """O_NONBLOCK cleared and the queue emptied in the middle of a burst: the loop does not block."""
    listener, thief = net.held()
    shared = listener.share()

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if len(net.accepted) == 3:
            thief.setblocking(True)
            for _ in range(2):
                thief.accept()[0].close()

    with shared:
        handle = add_accept_handler(shared if bare else listener, callback, loop.io_loop)
        net.connect(listener, 5)
        loop.until(lambda: len(net.accepted) == 3)
        net.connect(listener)
        loop.until(lambda: len(net.accepted) == 4)
        handle.remove()
    assert not loop.reported


def test_another_holder_was_faster(loop: Loop, net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that another holder took is no error: nothing is logged, the next one is served."""
    listener, thief = net.held(origin=Origin.BOUND)

    def callback(connection: socket.socket, address: object) -> None:
        net.take(connection, address)
        if len(net.accepted) == 2:  # from the second on, a burst does not ask poll(2) before accept(2)
            thief.accept()[0].close()

    count = Counting(add_accept_handler(listener, callback, loop.io_loop))
    net.connect(listener, 3)
    loop.until(lambda: count.calls == 3)
    assert len(net.accepted) == 2
    net.connect(listener)
    loop.until(lambda: len(net.accepted) == 3)
    assert log_lines(caplog) == []
    assert not loop.reported


def test_a_shared_duplicate_closed_while_attached(
    loop: Loop, net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """A bare duplicate closed before remove() is reported once; the file with its number is left alone."""
    listener = net.listener()
    shared = listener.share()
    handle = add_accept_handler(shared, net.take, loop.io_loop)
    fd = shared.fileno()
    loop.settle()
    net.connect(listener)
    shared.close()
    near, far = os.pipe()
    os.dup2(near, fd)
    try:
        loop.until(lambda: handle.error)
        assert handle.error is not None
        assert handle.error.errno == errno.EBADF
        assert os.get_blocking(fd)
        assert not loop.reported
        assert len(log_lines(caplog)) == 1
    finally:
        loop.close()
        for number in {near, far, fd}:
            os.close(number)


COUNTED = """
import asyncio, os, socket, sys
from sdlisten.accepting import add_accept_handler
from sdlisten.listener import Listener, Origin

def new_loop(kind):
    if kind == "tornado":
        from tornado.ioloop import IOLoop
        io_loop = IOLoop(make_current=False)
        return io_loop.asyncio_loop, io_loop
    loop = __import__(kind).new_event_loop()
    return loop, loop

async def count(loop, io_loop, kind, origin, queued):
    sock = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if kind == "tcp" else "")
    sock.listen(128)
    taken = []
    with Listener(sock, name="", origin=origin) as listener:
        clients = [socket.socket(sock.family) for _ in range(queued)]
        for client in clients:
            client.connect(sock.getsockname())
        done = loop.create_future()
        def callback(connection, address):
            taken.append(connection)
            if len(taken) == queued:
                done.set_result(None)
        add_accept_handler(listener, callback, io_loop)
        os.write(2, f"begin {kind} {origin.value} {queued}".encode())
        await done
        os.write(2, b"end")
    for each in (*clients, *taken):
        each.close()

async def main(loop, io_loop):
    for kind in ("tcp", "unix"):
        for origin in (Origin.BOUND, Origin.ADOPTED):
            for queued in (1, 64):
                await count(loop, io_loop, kind, origin, queued)

loop, io_loop = new_loop(sys.argv[1])
loop.run_until_complete(main(loop, io_loop))
(io_loop if sys.argv[1] == "tornado" else loop).close()
"""


def traced(loop: str, directory: Path) -> dict[str, Counter[str]]:
    """Return the system calls on descriptors of each section of COUNTED; failed ones with their error."""
    if shutil.which("strace") is None:
        unavailable("strace is not installed")
    log = directory / "strace"
    command = (
        "strace",
        "-qq",
        "-o",
        str(log),
        "-e",
        "trace=%network,%desc",
        sys.executable,
        "-c",
        COUNTED,
        loop,
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    if "ptrace" in done.stderr:
        unavailable(f"strace may not trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    sections: dict[str, Counter[str]] = {}
    section: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        if begin := re.match(r'write\(2, "begin (.*?)"', line):
            section = sections[begin[1]] = Counter()
        elif line.startswith('write(2, "end"'):
            section = Counter()
        elif call := re.match(r"(\w+)\(.* = (?:-1 (\w+)|\d+)", line):
            section[" ".join(filter(None, call.groups()))] += 1
    return sections


# What the loop does, and the allocator, whose mmap() strace counts among the calls on descriptors.
OF_THE_LOOP = {"epoll_wait", "epoll_pwait", "epoll_ctl", "io_uring_enter", "mmap"}


@pytest.mark.parametrize("kind", LOOPS)
def test_system_calls(kind: str, tmp_path: Path) -> None:
    """A connection costs accept4, getsockname and ioctl, a wake-up one poll; no accept4 fails.

    Adopted listeners: one ioctl more per wake-up, which re-asserts O_NONBLOCK, and a poll before each accept4
    but the first of a wake-up. Queued connections come in bursts of 32.
    """
    needed(kind)
    sections = traced(kind, tmp_path)
    assert len(sections) == 8
    for name, calls in sections.items():
        _, origin, count = name.split()
        connections = int(count)
        wakes = -(-connections // 32)
        expected = {"accept4": connections, "getsockname": connections, "ioctl": connections, "poll": wakes}
        if origin == "adopted":
            expected["ioctl"] += wakes
            expected["poll"] = connections - wakes or 1
        seen = {call: number for call, number in calls.items() if call not in OF_THE_LOOP}
        assert seen == expected, name
