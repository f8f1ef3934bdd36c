"""sdlisten.binding against the real kernel, and against Tornado where the two must agree.

Where the kernel cannot be made to refuse something, or another process to come in between two calls,
`Intrude` steps in front of one method of ``socket.socket``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tornado.netutil

from sdlisten import binding
from sdlisten.binding import DEFAULT_BACKLOG, bind_sockets, bind_unix_path, bind_unix_socket, bind_vsock
from sdlisten.descriptor import listen_queue
from sdlisten.errors import AddressError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    Unchanged = Callable[[], contextlib.AbstractContextManager[None]]
    Rounds = Callable[[int], int]

V4, V6 = socket.AF_INET, socket.AF_INET6
ANY = "0.0.0.0"  # noqa: S104 - on a port of the kernel's choice, for an instant
IN_USE = "is in use; if a .socket unit holds it, start through the unit: systemctl start NAME.socket"
BELOW_1024 = "ports below 1024 need CAP_NET_BIND_SERVICE; a .socket unit can bind it for you."
NOBODY = 65534


def refusal(number: int) -> OSError:
    """Return the error that the kernel gives for an errno."""
    return OSError(number, os.strerror(number))


def notes(error: pytest.ExceptionInfo[BaseException]) -> list[str]:
    """Return the notes of a caught exception."""
    return getattr(error.value, "__notes__", [])


@contextlib.contextmanager
def closing(sockets: Iterable[socket.socket]) -> Iterator[list[socket.socket]]:
    """Close sockets at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(sock) for sock in sockets]


def answers(path: str | Path | bytes, server: socket.socket) -> bool:
    """Tell whether a connection to a path arrives at a server, which must have no other waiting."""
    with pytest.raises(BlockingIOError):
        server.accept()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        connection, _ = server.accept()
        connection.close()
        return True


def leave_dead(path: str | Path) -> os.stat_result:
    """Bind a path and close the socket: what a crashed server leaves behind."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    return os.lstat(path)


class Intrude:
    """Calls a function before a method of every socket that is made from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(
        self,
        create: Callable[[int, int], object] = lambda _family, _kind: None,
        bind: Callable[[socket.socket, Any], object] = lambda _sock, _address: None,
        listen: Callable[[socket.socket], object] = lambda _sock: None,
        connect_ex: Callable[[socket.socket], object] = lambda _sock: None,
    ) -> None:
        """Install the functions; what they raise is what the kernel seems to say."""

        class Intruded(socket.socket):
            def __init__(
                self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None
            ) -> None:
                create(family, kind)
                super().__init__(family, kind, proto, fileno)

            def bind(self, address: Any, /) -> None:  # noqa: ANN401 - as socket.bind has it
                bind(self, address)
                super().bind(address)

            def listen(self, backlog: int = 0, /) -> None:
                listen(self)
                super().listen(backlog)

            def connect_ex(self, address: Any, /) -> int:  # noqa: ANN401 - as socket.connect_ex has it
                connect_ex(self)
                return super().connect_ex(address)

        self._monkeypatch.setattr(socket, "socket", Intruded)


@pytest.fixture
def intrude(monkeypatch: pytest.MonkeyPatch) -> Intrude:
    """Give a way to step in front of a socket's methods."""
    return Intrude(monkeypatch)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a way to let every name resolve to the given numeric addresses, in their order."""

    def install(*addresses: tuple[str, int]) -> None:
        def getaddrinfo(_host: object, port: int, *_: object) -> list[tuple[object, ...]]:
            return [
                (V6, socket.SOCK_STREAM, 6, "", (host, port, 0, scope))
                if ":" in host
                else (V4, socket.SOCK_STREAM, 6, "", (host, port))
                for host, scope in addresses
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return install


@pytest.fixture
def public() -> Iterator[Path]:
    """Give a directory that other users can reach; tmp_path is for its owner alone."""
    directory = tempfile.mkdtemp(prefix="sdlisten-")
    os.chmod(directory, 0o777)  # noqa: S103 - the point
    yield Path(directory)
    shutil.rmtree(directory)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user for whom permissions count: nobody, if this is root."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


def abstract_name() -> str:
    """Return an abstract name of this process alone."""
    return f"@sdlisten-test-{os.getpid()}"


@pytest.mark.parametrize(
    ("address", "family", "flags", "reuse_port"),
    [
        (None, socket.AF_UNSPEC, None, False),
        ("", socket.AF_UNSPEC, None, False),
        ("127.0.0.1", socket.AF_UNSPEC, None, False),
        ("::1", socket.AF_UNSPEC, None, False),
        ("::", socket.AF_UNSPEC, None, False),
        ("localhost", socket.AF_UNSPEC, None, False),
        ("127.1", socket.AF_UNSPEC, None, False),
        ("127.0.0.1", V4, None, False),
        (None, V4, None, False),
        (None, V6, None, False),
        ("localhost", V4, None, False),
        (None, socket.AF_UNSPEC, 0, False),
        ("127.0.0.1", socket.AF_UNSPEC, socket.AI_PASSIVE | socket.AI_NUMERICHOST, False),
        (None, socket.AF_UNSPEC, None, True),
    ],
)
def test_tornado_binds_the_same(
    address: str | None, family: int, flags: int | None, reuse_port: bool
) -> None:
    """For the same arguments Tornado makes sockets of the same families, addresses, options and order."""

    def described(sockets: list[socket.socket]) -> list[tuple[object, ...]]:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        return [
            (
                sock.family,
                sock.type,
                sock.proto,
                sock.getsockname()[0],
                sock.gettimeout(),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT),
                sock.family == V6 and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
            )
            for sock in sockets
        ]

    theirs = tornado.netutil.bind_sockets(0, address, socket.AddressFamily(family), 99, flags, reuse_port)
    ours = bind_sockets(0, address, family, 99, flags, reuse_port)
    with closing(theirs), closing(ours):
        assert described(ours) == described(theirs)
        assert [listen_queue(sock.fileno()) for sock in ours] == [(0, 99)] * len(ours)


def make_tcp(_directory: Path) -> socket.socket:
    """Bind TCP."""
    (sock,) = bind_sockets(0, "127.0.0.1")
    return sock


def make_unix(directory: Path) -> socket.socket:
    """Bind a path."""
    return bind_unix_socket(directory / "socket")


def make_abstract(_directory: Path) -> socket.socket:
    """Bind an abstract name."""
    return bind_unix_socket(abstract_name())


@pytest.mark.parametrize("make", [make_tcp, make_unix, make_abstract])
def test_listeners_are_non_blocking_and_close_on_exec_from_birth(
    make: Callable[[Path], socket.socket], tmp_path: Path, intrude: Intrude
) -> None:
    """socket(2) itself is asked for both flags, kernel and Python object agree, and the backlog is 4096."""
    births: list[int] = []
    intrude(create=lambda _family, kind: births.append(kind))
    socket.setdefaulttimeout(5.0)
    try:
        sock = make(tmp_path)
    finally:
        socket.setdefaulttimeout(None)
    with sock:
        flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        assert [kind & flags for kind in births] == [flags]
        assert sock.type == socket.SOCK_STREAM
        assert (sock.getblocking(), sock.gettimeout(), os.get_blocking(sock.fileno())) == (False, 0.0, False)
        assert not os.get_inheritable(sock.fileno())
        cap = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert listen_queue(sock.fileno()) == (0, min(DEFAULT_BACKLOG, cap))


def test_asyncio_sets_nodelay_on_what_it_accepts() -> None:
    """The protocol of the listener says TCP, without which asyncio leaves Nagle's algorithm on."""

    async def accepted_nodelay(sock: socket.socket) -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def handler(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            seen.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(handler, sock=sock):
            reader, writer = await asyncio.open_connection(*sock.getsockname()[:2])
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            return await seen

    for address in ("127.0.0.1", "localhost"):
        with closing(bind_sockets(0, address)) as sockets:
            assert sockets[0].proto == socket.IPPROTO_TCP
            assert asyncio.run(accepted_nodelay(sockets[0])) == 1


def test_one_port_in_both_families_even_if_many_are_taken_in_one(rounds: Rounds) -> None:
    """With 3,000 IPv6 ports held, 300 of 300 calls for port 0 get one port for IPv4 and IPv6."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4000)), hard))
    clashes = 0
    try:
        with contextlib.ExitStack() as held:
            for _ in range(3000):
                sock = held.enter_context(socket.socket(V6))
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("::", 0))
            for _ in range(rounds(300)):
                with closing(bind_sockets(0)) as sockets:
                    (ipv4, ipv6) = (sock.getsockname()[:2] for sock in sockets)
                    assert ipv4 == (ANY, ipv6[1])
                    assert ipv6[0] == "::"
            for _ in range(300):  # one try, as Tornado has it
                with socket.socket(V4) as first, socket.socket(V6) as second, contextlib.suppress(OSError):
                    second.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    first.bind((ANY, 0))
                    clashes += 1
                    second.bind(("::", first.getsockname()[1]))
                    clashes -= 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert clashes > 0, "the ports were not in the way: the proof proves nothing"


def test_a_clash_at_listen_is_a_clash_too(intrude: Intrude) -> None:
    """Somebody else may listen on the chosen port between our bind() and listen(): the set is tried again."""
    listened: list[socket.socket] = []

    def listen(sock: socket.socket) -> None:
        listened.append(sock)
        if len(listened) <= 2:
            raise refusal(errno.EADDRINUSE)

    intrude(listen=listen)
    with closing(bind_sockets(0, "127.0.0.1")) as sockets:
        assert listened[-1:] == sockets
        assert [sock.fileno() for sock in listened[:2]] == [-1, -1]


def test_a_port_that_never_fits_is_an_error_in_the_end(intrude: Intrude, unchanged: Unchanged) -> None:
    """The tries for port 0 are bounded; then the kernel's refusal is told."""
    tries: list[object] = []

    def bind(sock: socket.socket, address: object) -> None:
        if sock.family == V6:
            tries.append(address)
            raise refusal(errno.EADDRINUSE)

    intrude(bind=bind)
    with unchanged(), pytest.raises(OSError, match="Address already in use") as caught:
        bind_sockets(0)
    assert caught.value.errno == errno.EADDRINUSE
    assert len(tries) == binding._PORT_TRIES


def test_dual_stack_is_one_socket_for_both_families() -> None:
    """dual_stack=True makes what ListenStream=8080 makes: one [::] socket that takes IPv4 as well."""
    for address in (None, "", "::"):
        with closing(bind_sockets(0, address, dual_stack=True)) as (sock,):
            assert sock.family == V6
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
            with socket.create_connection(("127.0.0.1", sock.getsockname()[1])):
                connection, peer = sock.accept()
                connection.close()
                assert peer[0] == "::ffff:127.0.0.1"


@pytest.mark.parametrize(
    ("address", "family"),
    [("127.0.0.1", socket.AF_UNSPEC), ("::1", socket.AF_UNSPEC), (ANY, socket.AF_UNSPEC), (None, V4)],
)
def test_dual_stack_is_for_every_interface_alone(address: str | None, family: int) -> None:
    """dual_stack=True with an address or a family that cannot be both is refused, naming them."""
    with pytest.raises(ValueError, match=r"dual_stack=True is for \[::\] alone") as caught:
        bind_sockets(0, address, family, dual_stack=True)
    assert f"address={address!r}" in str(caught.value)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_dual_stack_falls_back_where_ipv6_is_off(number: int, intrude: Intrude, unchanged: Unchanged) -> None:
    """Without IPv6 the port is bound at 0.0.0.0, as systemd does, but not if AF_INET6 was asked for."""

    def create(family: int, _kind: int) -> None:
        if family == V6 and number == errno.EAFNOSUPPORT:
            raise refusal(number)

    def bind(sock: socket.socket, _address: object) -> None:
        if sock.family == V6:
            raise refusal(number)

    intrude(create=create, bind=bind)
    with closing(bind_sockets(0, dual_stack=True)) as (sock,):
        assert (sock.family, sock.getsockname()[0]) == (V4, ANY)
    with unchanged(), pytest.raises(OSError, match=r"\[::\]:0|nothing left") as caught:
        bind_sockets(0, family=V6, dual_stack=True)
    assert caught.value.errno == number


def test_another_refusal_is_no_reason_to_fall_back(unchanged: Unchanged) -> None:
    """A port that is taken is told, also with dual_stack=True; 0.0.0.0 is not tried instead."""
    with closing(bind_sockets(0, family=V6)) as (taken,):
        port = taken.getsockname()[1]
        with unchanged(), pytest.raises(OSError, match=rf"\[::\]:{port}") as caught:
            bind_sockets(port, dual_stack=True)
        assert caught.value.errno == errno.EADDRINUSE


def test_a_family_that_is_not_there_is_left_out(intrude: Intrude, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAFNOSUPPORT of socket(2), or a Python without IPv6, leaves IPv4; nothing left is an error."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "has_ipv6", False)
        with closing(bind_sockets(0)) as (sock,):
            assert sock.family == V4

    def create(family: int, _kind: int) -> None:
        if family == V6:
            raise refusal(errno.EAFNOSUPPORT)

    intrude(create=create)
    with closing(bind_sockets(0)) as (sock,):
        assert sock.family == V4
    with pytest.raises(
        OSError, match=r"nothing left to bind: address='::1', port=80: Address family"
    ) as caught:
        bind_sockets(80, "::1")
    assert caught.value.errno == errno.EAFNOSUPPORT


def test_the_half_of_localhost_that_no_interface_has_is_left_out(
    intrude: Intrude, resolve: Callable[..., None], unchanged: Unchanged
) -> None:
    """EADDRNOTAVAIL of ::1 is passed over for localhost, not for another name, not to leave nothing."""

    def bind(sock: socket.socket, _address: object) -> None:
        if sock.family == V6:
            raise refusal(errno.EADDRNOTAVAIL)

    intrude(bind=bind)
    resolve(("::1", 0), ("127.0.0.1", 0))
    with closing(bind_sockets(0, "localhost")) as (sock,):
        assert sock.getsockname()[0] == "127.0.0.1"
    with unchanged(), pytest.raises(OSError, match=r"\[::1\]:\d+") as caught:
        bind_sockets(0, "other.test")
    assert caught.value.errno == errno.EADDRNOTAVAIL
    resolve(("::1", 0))
    with (
        unchanged(),
        pytest.raises(OSError, match="nothing left to bind: address='localhost', port=0") as caught,
    ):
        bind_sockets(0, "localhost")
    assert caught.value.errno == errno.EADDRNOTAVAIL
    resolve()
    with pytest.raises(OSError, match="the resolver knows no address"):
        bind_sockets(0, "other.test")


def test_each_address_once_ipv4_first(resolve: Callable[..., None]) -> None:
    """Duplicates go, IPv4 comes first, the resolver's order stays; macOS's link-local localhost goes."""
    resolve(("::1", 0), ("127.0.0.2", 0), ("127.0.0.1", 0), ("127.0.0.2", 0), ("::1", 0), ("fe80::1", 1))
    with closing(bind_sockets(0, "localhost")) as sockets:
        assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.2", "127.0.0.1", "::1"]
        assert len({sock.getsockname()[1] for sock in sockets}) == 1


@pytest.mark.parametrize(
    ("address", "sockname"),
    [
        ("127.0.0.1", ("127.0.0.1",)),
        ("::1", ("::1", 0, 0)),
        ("::1%lo", ("::1", 0, 0)),
        ("0:0:0:0:0:0:0:1%1", ("::1", 0, 0)),
    ],
)
def test_a_numeric_address_does_not_ask_the_resolver(
    address: str, sockname: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPv4 and IPv6 addresses, also with a scope, are bound as they are."""
    monkeypatch.delattr(socket, "getaddrinfo")
    with closing(bind_sockets(0, address)) as (sock,):
        host, _, *rest = sock.getsockname()
        assert (host, *rest) == sockname


def test_the_scope_of_a_numeric_address_counts(unchanged: Unchanged) -> None:
    """A scope is an interface's name or number and reaches the kernel; a name that nobody has is ENODEV."""
    for address in ("fe80::5d11:1%lo", "fe80::5d11:1%1"):
        with unchanged(), pytest.raises(OSError, match=r"\[fe80::5d11:1\]:0%1") as caught:
            bind_sockets(0, address)
        assert caught.value.errno == errno.EADDRNOTAVAIL
    with unchanged(), pytest.raises(OSError, match="no network interface is called 'nosuch'") as caught:
        bind_sockets(0, "fe80::1%nosuch")
    assert caught.value.errno == errno.ENODEV


def test_a_name_that_does_not_resolve_is_named(unchanged: Unchanged) -> None:
    """The resolver's error says which address it was about; what cannot be a name is an AddressError."""
    with unchanged(), pytest.raises(socket.gaierror, match="address='no-number'") as caught:
        bind_sockets(0, "no-number", flags=socket.AI_NUMERICHOST)
    assert caught.value.errno == socket.EAI_NONAME
    with unchanged(), pytest.raises(socket.gaierror, match=r"address='127\.0\.0\.1'"):
        bind_sockets(0, "127.0.0.1", V6)
    with unchanged(), pytest.raises(AddressError, match=r"address='a\.\.b' cannot be a host name"):
        bind_sockets(0, "a..b")
    with unchanged(), pytest.raises(socket.gaierror):
        bind_sockets(0, "\0")


def test_a_port_is_an_int_in_its_range() -> None:
    """A port that is no int is a TypeError, one out of range an AddressError; both quote it."""
    for port in ("8080", None, 80.0):
        with pytest.raises(TypeError, match=f"port={port!r} is not an int from 0 to 65535"):
            bind_sockets(port)  # type: ignore[arg-type]
    for number in (-1, 65536):
        with pytest.raises(AddressError, match=f"port={number} is not a port: expected 0 to 65535"):
            bind_sockets(number)


def test_reuse_port_lets_several_listen_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """With reuse_port=True a second set binds the same port; a platform without it is told."""
    with closing(bind_sockets(0, reuse_port=True)) as first:
        port = first[0].getsockname()[1]
        with closing(bind_sockets(port, reuse_port=True)) as second:
            assert [sock.getsockname() for sock in second] == [sock.getsockname() for sock in first]
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValueError, match="reuse_port=True"):
        bind_sockets(0, reuse_port=True)


@pytest.mark.parametrize(("family", "where"), [(V4, ANY), (V6, "[::]")])
def test_a_port_in_use_is_told_with_its_address_and_what_to_do(
    family: int, where: str, unchanged: Unchanged
) -> None:
    """EADDRINUSE names the address, its note the unit; a set half bound is closed while the error lives."""
    with closing(bind_sockets(0, family=family)) as (taken,):
        port = taken.getsockname()[1]
        with unchanged(), pytest.raises(OSError, match="Address already in use") as caught:
            bind_sockets(port)
    assert caught.value.errno == errno.EADDRINUSE
    assert str(caught.value).endswith(f"'{where}:{port}'")
    assert notes(caught) == [f"{where}:{port} {IN_USE}"]


def test_a_low_port_is_told_with_the_capability_it_needs(intrude: Intrude, unchanged: Unchanged) -> None:
    """EACCES of a port below 1024 says what is missing; of another port or of a name it has other reasons."""

    def bind(_sock: socket.socket, _address: object) -> None:
        raise refusal(errno.EACCES)

    intrude(bind=bind)
    with unchanged(), pytest.raises(PermissionError, match=r"127\.0\.0\.1:443") as caught:
        bind_sockets(443, "127.0.0.1")
    assert notes(caught) == [BELOW_1024]
    for call in (lambda: bind_sockets(8080, "127.0.0.1"), lambda: bind_unix_socket(abstract_name())):
        with unchanged(), pytest.raises(PermissionError) as caught:
            call()
        assert notes(caught) == []


def test_any_other_exception_leaves_nothing_either(tmp_path: Path, unchanged: Unchanged) -> None:
    """A backlog that is no number fails after the bind: no descriptor and no path stay behind."""
    backlog: Any = "many"
    for call in (
        lambda: bind_sockets(0, backlog=backlog),
        lambda: bind_unix_socket(abstract_name(), backlog=backlog),
        lambda: bind_unix_socket(tmp_path / "socket", backlog=backlog),
    ):
        with unchanged(), pytest.raises(TypeError):
            call()
    assert os.listdir(tmp_path) == []


NAMESPACE = """
    import ctypes, fcntl, json, socket, struct
    from sdlisten.binding import bind_sockets

    with socket.socket() as sock:  # ip link set lo up
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
    with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as switch:
        switch.write("1")
    answer = [(2, 1, 6, "", ("127.0.0.1", 0)), (10, 1, 6, "", ("::1", 0, 0, 0))]
    socket.getaddrinfo = lambda *_: answer
    localhost = [sock.getsockname()[0] for sock in bind_sockets(0, "localhost")]
    (dual,) = bind_sockets(0, dual_stack=True)
    with socket.socket() as client:
        client.connect(("127.0.0.1", dual.getsockname()[1]))
        peer = dual.accept()[1][0]
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)  # capset(2): none
    ctypes.CDLL(None).capset(header, data)
    try:
        bind_sockets(80, "127.0.0.1")
    except PermissionError as error:
        print(json.dumps([localhost, peer, str(error), error.__notes__]))
"""


def test_without_ipv6_and_without_capabilities() -> None:
    """A kernel with IPv6 off: localhost is IPv4, [::] takes IPv4; a process that may not: port 80 is told."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no network namespace can be made here (unshare): the tests with Intrude stand for it")
    command = [*unshare, sys.executable, "-W", "ignore", "-c", textwrap.dedent(NAMESPACE)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    localhost, peer, text, told = json.loads(done.stdout)
    assert localhost == ["127.0.0.1"]
    assert peer == "::ffff:127.0.0.1"
    assert text == "[Errno 13] Permission denied: '127.0.0.1:80'"
    assert told == [BELOW_1024]


def test_vsock(monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged) -> None:
    """A VM socket listens, a foreign cid is refused by name, and a platform without them is told."""
    try:
        sock = bind_vsock(socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY, 9)
    except OSError as error:
        assert error.errno == errno.EAFNOSUPPORT  # noqa: PT017 - a kernel without them is a right answer too
    else:
        with sock:
            assert (sock.family, sock.type, sock.gettimeout()) == (socket.AF_VSOCK, socket.SOCK_STREAM, 0.0)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        with unchanged(), pytest.raises(OSError, match="vsock:77:5000") as caught:
            bind_vsock(77, 5000)
        assert caught.value.errno == errno.EADDRNOTAVAIL
    monkeypatch.delattr(socket, "AF_VSOCK")
    with pytest.raises(OSError, match="no VM sockets: vsock:2:80") as caught:
        bind_vsock(2, 80)
    assert caught.value.errno == errno.EAFNOSUPPORT


@contextlib.contextmanager
def modes_seen(path: Path) -> Iterator[set[int]]:
    """Look at a path's mode before and after every call into C: an observer that never comes too late."""
    seen: set[int] = set()

    def look(_frame: FrameType, _event: str, _arg: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            seen.add(stat.S_IMODE(os.lstat(path).st_mode))

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Have another umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0o000])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_the_mode_is_what_was_asked_and_never_looser(mode: int, mask: int, tmp_path: Path) -> None:
    """Whatever the umask, no step of the bind shows a bit that was not asked for; the last shows all."""
    path = tmp_path / "socket"
    with umask(mask), modes_seen(path) as seen:
        sock = bind_unix_socket(path, mode)
    sock.close()
    assert stat.S_IMODE(os.lstat(path).st_mode) == mode
    assert mode in seen
    assert not {loose for loose in seen if loose & ~mode}


def test_the_observer_sees_a_looser_mode_where_there_is_one(tmp_path: Path) -> None:
    """The test above can fail: Tornado's bind_unix_socket shows 0o777 for an instant."""
    path = tmp_path / "socket"
    with umask(0), modes_seen(path) as seen:
        sock = tornado.netutil.bind_unix_socket(os.fspath(path), 0o600)
    sock.close()
    assert seen == {0o777, 0o600}


OBSERVER = """
    import os, select, sys

    seen, goes_on = set(), True
    print("looking", flush=True)
    while goes_on:
        goes_on = not select.select([0], [], [], 0)[0]
        for _ in range(500):
            try:
                seen.add(os.lstat(sys.argv[1]).st_mode & 0o7777)
            except FileNotFoundError:
                pass
    print(*seen)
"""


def test_a_racing_observer_sees_no_looser_mode(tmp_path: Path, rounds: Rounds) -> None:
    """Another process that looks all the time, under umask 0, sees the asked mode and nothing else."""
    path = tmp_path / "socket"
    command = [sys.executable, "-c", textwrap.dedent(OBSERVER), os.fspath(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as observer:
        assert observer.stdout
        assert observer.stdout.readline() == "looking\n"
        with umask(0):
            for _ in range(rounds(1000)):
                path.unlink(missing_ok=True)
                bind_unix_socket(path, 0o640).close()
        seen, _ = observer.communicate("")
    assert seen == f"{0o640}\n"


STARTER = """
    import os, sys
    from sdlisten.binding import bind_unix_socket

    for line in sys.stdin:
        sock = None  # the winner of the last round leaves a dead socket
        print("ready", flush=True)
        os.read(int(sys.argv[1]), 1)
        try:
            sock = bind_unix_socket(line.rstrip())
        except OSError as error:
            print(error.errno, flush=True)
        else:
            print("won", flush=True)
"""


def test_of_two_starters_exactly_one_wins(tmp_path: Path, rounds: Rounds) -> None:
    """Two processes bind one path at one instant, free or left by the dead: one wins, nothing else stays."""
    path = tmp_path / "socket"
    read, write = os.pipe()
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STARTER), str(read)]
    with contextlib.ExitStack() as stack:
        starters = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    pass_fds=[read],
                    bufsize=1,
                )
            )
            for _ in range(2)
        ]

        def told() -> list[str]:
            return sorted(starter.stdout.readline() for starter in starters if starter.stdout)

        for turn in range(rounds(200)):
            for starter in starters:
                assert starter.stdin
                print(path, file=starter.stdin)
            assert told() == ["ready\n", "ready\n"]
            if turn % 2:
                path.unlink()
            os.write(write, b"..")
            assert told() == [f"{errno.EADDRINUSE}\n", "won\n"]
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(path))
            assert os.listdir(tmp_path) == ["socket"]
        for starter in starters:
            assert starter.stdin
            starter.stdin.close()
    os.close(read)
    os.close(write)


def test_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    """What a crashed server left is no hindrance, and the path is the one that getsockname() tells."""
    path = tmp_path / "socket"
    dead = leave_dead(path)
    sock, created = bind_unix_path(path, 0o600, 16)
    with sock:
        assert answers(path, sock)
        now = os.lstat(path)
        assert created == (now.st_dev, now.st_ino)
        assert dead.st_ctime_ns != now.st_ctime_ns
        assert sock.getsockname() == os.fspath(path)
        assert listen_queue(sock.fileno()) == (0, 16)
    assert os.listdir(tmp_path) == ["socket"]


def test_a_living_server_keeps_its_path(tmp_path: Path, unchanged: Unchanged) -> None:
    """A server that answers is refused by name and still answers; the question left nothing in its queue."""
    path = tmp_path / "socket"
    with bind_unix_socket(path, 0o666) as server:
        before = os.lstat(path)
        with unchanged(), pytest.raises(OSError, match="Address already in use") as caught:
            bind_unix_socket(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EADDRINUSE, os.fspath(path))
        assert notes(caught) == [f"{path} {IN_USE}"]
        assert os.lstat(path) == before
        assert answers(path, server)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socket_that_somebody_holds_is_alive(kind: int, tmp_path: Path, unchanged: Unchanged) -> None:
    """Whatever its type, and also before it listens, a bound socket keeps its path."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as holder:
        holder.bind(os.fspath(path))
        with unchanged(), pytest.raises(OSError, match="Address already in use"):
            bind_unix_socket(path)
        assert stat.S_ISSOCK(os.lstat(path).st_mode)


def test_where_a_datagram_socket_is_always_refused_a_stream_socket_asks(
    tmp_path: Path, intrude: Intrude, unchanged: Unchanged
) -> None:
    """In gVisor a datagram socket is refused at a stream listener; the second question finds it alive."""
    path = tmp_path / "socket"
    elsewhere = tmp_path / "elsewhere"
    with bind_unix_socket(path) as server:

        def connect_ex(probe: socket.socket) -> None:
            if probe.type == socket.SOCK_DGRAM:
                path.rename(elsewhere)
            else:
                elsewhere.rename(path)

        intrude(connect_ex=connect_ex)
        with unchanged(), pytest.raises(OSError, match="Address already in use"):
            bind_unix_socket(path)
        connection, _ = server.accept()
        connection.close()


def test_a_socket_that_may_not_be_asked_is_alive(public: Path, unchanged: Unchanged) -> None:
    """If connect() is forbidden, nobody knows whether the server lives: its path is not touched."""
    path = public / "socket"
    leave_dead(path)
    path.chmod(0)
    before = os.lstat(path)
    with unprivileged(), unchanged(), pytest.raises(OSError, match="Address already in use"):
        bind_unix_socket(path)
    assert os.lstat(path).st_ino == before.st_ino


def make_file(path: Path) -> None:
    """Make a file."""
    path.write_text("precious")


def make_link_to_socket(path: Path) -> None:
    """Make a symbolic link to a dead socket."""
    leave_dead(path.with_name("target"))
    path.symlink_to("target")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_file, "a file"),
        (Path.mkdir, "a directory"),
        (lambda path: path.symlink_to("nowhere"), "a symbolic link"),
        (make_link_to_socket, "a symbolic link"),
        (os.mkfifo, "a FIFO"),
    ],
)
def test_what_is_no_socket_is_refused_untouched(
    make: Callable[[Path], object], kind: str, tmp_path: Path, unchanged: Unchanged
) -> None:
    """A file, directory, link or FIFO at the path is an AddressError that says which, and stays as it is."""
    path = tmp_path / "socket"
    make(path)
    before = os.lstat(path)
    with unchanged(), pytest.raises(AddressError, match=f"{str(path)!r} is {kind}, not a socket"):
        bind_unix_socket(path)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mode,
        before.st_ctime_ns,
    )


def test_what_has_no_word_of_its_own_is_refused_too() -> None:
    """A device is something else, and no socket."""
    with pytest.raises(AddressError, match="'/dev/null' is something else, not a socket"):
        bind_unix_socket("/dev/null")


def test_a_path_may_have_107_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """107 bytes of path or name are bound, 108 are refused with both numbers before anything is touched."""
    monkeypatch.chdir(tmp_path)
    name = abstract_name().ljust(108, "x")
    with bind_unix_socket("p" * 107) as sock, bind_unix_socket(name) as abstract:
        assert sock.getsockname() == "p" * 107
        assert abstract.getsockname() == b"\0" + name[1:].encode()
    for long in ("p" * 108, "ü" * 54, name + "x"):
        with pytest.raises(AddressError, match="it has 108 bytes, 107 may be"):
            bind_unix_socket(long)
    assert os.listdir(tmp_path) == ["p" * 107]


def test_a_path_is_not_empty_and_has_no_nul(tmp_path: Path) -> None:
    """The kernel would choose a name for the empty path, and would end a path at its first NUL byte."""
    for empty in ("", "@", "\0", b"@"):
        with pytest.raises(AddressError, match="it is empty"):
            bind_unix_socket(empty)
    with pytest.raises(AddressError, match="a path has no NUL byte"):
        bind_unix_socket(f"{tmp_path}/a\0b")
    assert os.listdir(tmp_path) == []


def test_a_mode_is_permission_bits(tmp_path: Path) -> None:
    """A mode beyond 0o777, such as a decimal 660, is a ValueError that quotes it."""
    for mode in (660, 0o1777, -1):
        with pytest.raises(ValueError, match=f"mode={mode} is not a mode: expected 0 to 0o777"):
            bind_unix_socket(tmp_path / "socket", mode)
    assert os.listdir(tmp_path) == []


def test_a_path_may_be_bytes_and_need_not_be_utf8(tmp_path: Path) -> None:
    """str, bytes and PathLike name the same path; bytes that are no text come back as surrogates."""
    raw = os.fsencode(tmp_path) + b"/\xff"
    with bind_unix_socket(raw) as sock:
        assert sock.getsockname() == f"{tmp_path}/\udcff"
        with pytest.raises(OSError, match="Address already in use"):
            bind_unix_socket(f"{tmp_path}/\udcff")


def test_an_abstract_name_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged
) -> None:
    """'@' or NUL in front is an abstract name: no file, no lock, any mode; './@name' is a file."""
    monkeypatch.chdir(tmp_path)
    name = abstract_name()
    monkeypatch.delattr(fcntl, "flock")
    with bind_unix_socket(name, mode=-1) as sock:
        assert sock.getsockname() == b"\0" + name[1:].encode()
        for again in (name, "\0" + name[1:], os.fsencode(name), Path(name)):
            with unchanged(), pytest.raises(OSError, match=f"'{name}'") as caught:
                bind_unix_socket(again)
            assert caught.value.errno == errno.EADDRINUSE
            assert notes(caught) == [f"{name} {IN_USE}"]
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    bind_unix_socket("./@one").close()
    bind_unix_path("@two", 0o600, 1)[0].close()
    assert sorted(os.listdir(tmp_path)) == ["@one", "@two"]


def test_a_directory_that_is_missing_is_told_with_what_makes_it(tmp_path: Path, unchanged: Unchanged) -> None:
    """ENOENT names the directory, and the note the unit's setting; a file in its place is ENOTDIR."""
    missing = tmp_path / "missing"
    with unchanged(), pytest.raises(FileNotFoundError, match=f"'{missing}'") as caught:
        bind_unix_socket(missing / "socket")
    assert notes(caught) == [f"make the directory {missing} first: RuntimeDirectory= in the unit, or mkdir"]
    missing.touch()
    with unchanged(), pytest.raises(NotADirectoryError):
        bind_unix_socket(missing / "socket")


def test_so_reuseaddr_is_not_set_on_unix_sockets(tmp_path: Path) -> None:
    """It means nothing there."""
    with bind_unix_socket(tmp_path / "socket") as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0


@pytest.mark.parametrize("step", ["bind", "chmod", "listen"])
@pytest.mark.parametrize("error", [refusal(errno.EPERM), KeyboardInterrupt()])
@pytest.mark.parametrize("dead", [True, False])
def test_a_step_that_fails_leaves_nothing(  # noqa: PLR0917 - parameters and fixtures
    step: str,
    error: BaseException,
    dead: bool,
    tmp_path: Path,
    intrude: Intrude,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Unchanged,
) -> None:
    """Whichever step fails, and however, no descriptor and no path stays; an OSError names the path."""
    path = tmp_path / "socket"
    if dead:
        leave_dead(path)

    def fail(*_: object) -> None:
        raise error

    if step == "chmod":
        monkeypatch.setattr(os, "chmod", fail)
    else:
        intrude(**{step: fail})
    with umask(0o077), unchanged(), pytest.raises(type(error)) as caught:
        bind_unix_socket(path, 0o660)
    assert os.listdir(tmp_path) == []
    if isinstance(error, OSError):
        assert str(caught.value) == f"[Errno 1] Operation not permitted: '{path}'"


def test_a_refusal_of_the_kernel_itself_names_the_path(unchanged: Unchanged) -> None:
    """No fake: the kernel makes no sockets in /proc, and says so about the path that was asked for."""
    with unchanged(), pytest.raises(OSError, match="'/proc/sdlisten-test'"):
        bind_unix_socket("/proc/sdlisten-test")


def test_a_path_that_vanishes_while_it_is_asked_is_free(tmp_path: Path, intrude: Intrude) -> None:
    """A server that stops and removes its path between our look and our question is no hindrance."""
    path = tmp_path / "socket"
    leave_dead(path)
    intrude(connect_ex=lambda _probe: path.unlink(missing_ok=True))
    with bind_unix_socket(path) as sock:
        assert answers(path, sock)


def test_a_path_that_is_another_by_now_is_not_unlinked(
    tmp_path: Path, intrude: Intrude, unchanged: Unchanged
) -> None:
    """A server that knows no lock and took the path over while we asked keeps it."""
    path = tmp_path / "socket"
    leave_dead(path)
    with socket.socket(socket.AF_UNIX) as server:

        def take_over(probe: socket.socket) -> None:
            if probe.type == socket.SOCK_STREAM:
                path.rename(tmp_path / "dead")  # so that its inode number stays taken
                server.bind(os.fspath(path))

        intrude(connect_ex=take_over)
        with unchanged(), pytest.raises(OSError, match=f"'{path}'") as caught:
            bind_unix_socket(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert notes(caught) == [f"{path} {IN_USE}"]
        server.listen()
        server.setblocking(False)
        assert answers(path, server)


@pytest.mark.parametrize("put", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("late", [False, True])
def test_chmod_never_follows_what_was_put_in_the_place(
    put: Callable[[Path, Path], None], late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link put at the path before the chmod, or in the last instant, leaves its target's mode as it is."""
    path, victim, really_open, really_chmod = tmp_path / "socket", tmp_path / "victim", os.open, os.chmod
    victim.touch(0o600)

    def swap() -> None:
        path.unlink()
        put(path, victim)

    def swap_and_open(name: str, flags: int) -> int:
        if flags & os.O_PATH and not late:
            swap()
        return really_open(name, flags)

    def swap_and_chmod(name: str, mode: int) -> None:
        swap()
        really_chmod(name, mode)

    monkeypatch.setattr(os, "open", swap_and_open)
    monkeypatch.setattr(os, "chmod", swap_and_chmod)
    replaced = pytest.raises(FileExistsError, match=f"replaced by another file .*'{path}'")
    with umask(0o077), contextlib.nullcontext() if late else replaced:
        bind_unix_socket(path, 0o666).close()
    monkeypatch.undo()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert path.samefile(victim)


def test_where_the_unbound_socket_has_no_mode_it_is_set_before_anybody_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intrude: Intrude
) -> None:
    """On macOS there is neither fchmod() on sockets nor O_PATH: the path has its mode before listen()."""

    def fchmod(_fd: int, _mode: int) -> None:
        raise refusal(errno.EINVAL)

    path, seen = tmp_path / "socket", set()
    monkeypatch.setattr(os, "fchmod", fchmod)
    monkeypatch.delattr(os, "O_PATH")
    intrude(listen=lambda _sock: seen.add(stat.S_IMODE(os.lstat(path).st_mode)))
    with umask(0):
        bind_unix_socket(path, 0o600).close()
    assert seen == {0o600}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock on a directory as another starter does; gives a function that releases it."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def test_a_starter_waits_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another starter is at it nothing is looked at; then it goes on."""
    path, waits = tmp_path / "socket", []
    with locked(tmp_path) as release:

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            assert not path.exists()
            if len(waits) == 3:
                release()

        monkeypatch.setattr(time, "sleep", sleep)
        bind_unix_socket(path).close()
    assert len(waits) == 3


def test_nobody_comes_in_between_the_look_and_the_unlink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starter that comes while another is about to unlink the dead socket cannot bind, to lose it again."""
    path, really_unlink, unlinked = tmp_path / "socket", os.unlink, []
    leave_dead(path)

    def unlink(name: str) -> None:
        monkeypatch.setattr(os, "unlink", really_unlink)
        with pytest.raises(TimeoutError):
            bind_unix_socket(path)
        unlinked.append(name)
        really_unlink(name)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(binding, "_LOCK_SECONDS", 0.0)
    with bind_unix_socket(path) as sock:
        assert unlinked == [os.fspath(path)]
        assert answers(path, sock)


def test_a_lock_that_is_never_released_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged
) -> None:
    """A directory that somebody keeps locked is a TimeoutError that names it, not a daemon that hangs."""
    monkeypatch.setattr(binding, "_LOCK_SECONDS", 0.0)
    with (
        locked(tmp_path),
        unchanged(),
        pytest.raises(TimeoutError, match="has this directory locked") as caught,
    ):
        bind_unix_socket(tmp_path / "socket")
    assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, os.fspath(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_lock_is_released_for_a_forked_child_too(tmp_path: Path, intrude: Intrude) -> None:
    """A child that another thread forked meanwhile has our descriptor of the lock, but not the lock."""
    duplicates: list[int] = []

    def fork(_sock: socket.socket) -> None:
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if not duplicates and os.readlink(f"/proc/self/fd/{entry}") == os.fspath(tmp_path):
                    duplicates.append(os.dup(int(entry)))  # shares the lock as a child's does

    intrude(listen=fork)
    bind_unix_socket(tmp_path / "socket").close()
    assert len(duplicates) == 1
    with locked(tmp_path):
        os.close(duplicates[0])


def test_where_no_lock_can_be_had_nothing_is_unlinked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged
) -> None:
    """Without flock a free path is bound; a dead socket stays, and the note says who must remove it."""

    def flock(_fd: int, _operation: int) -> None:
        raise refusal(errno.ENOLCK)

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "socket"
    bind_unix_socket(path).close()
    with unchanged(), pytest.raises(OSError, match="Address already in use") as caught:
        bind_unix_socket(path)
    assert notes(caught) == [f"nobody holds {path}, but its directory cannot be locked: remove it by hand"]
    assert stat.S_ISSOCK(os.lstat(path).st_mode)


def test_a_directory_that_may_not_be_read_may_be_bound_in(public: Path, unchanged: Unchanged) -> None:
    """Write permission is enough for a free path; without read permission there is no lock, and no unlink."""
    public.chmod(0o333)
    path = public / "socket"
    try:
        with unprivileged():
            bind_unix_socket(path).close()
            with unchanged(), pytest.raises(OSError, match="Address already in use") as caught:
                bind_unix_socket(path)
        assert "cannot be locked" in notes(caught)[0]
    finally:
        public.chmod(0o700)
