"""What the kernel says of real descriptors, of every kind that a manager can pass."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest

from sdlisten.address import AbstractAddress, InetAddress, PortAddress, UnixAddress, VsockAddress
from sdlisten.descriptor import Descriptor, Kind, describe, listen_queue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IPPROTO_MPTCP = 262


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


def new_socket(family: int, kind: int, proto: int = 0) -> socket.socket:
    """Make a socket, if this kernel has such."""
    try:
        return socket.socket(family, kind, proto)
    except OSError as error:
        missing(f"this kernel has no socket({family}, {kind}, {proto}): {error}")


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a bare descriptor in the end."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def message_queue(flags: int = os.O_RDONLY) -> Iterator[int]:
    """Make a POSIX message queue that has no name any more, as ListenMessageQueue= does."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"/sdlisten-test-{os.getpid()}".encode()
    fd = libc.mq_open(name, flags | os.O_CREAT, 0o600, None)
    if fd < 0:
        missing(f"mq_open: {os.strerror(ctypes.get_errno())}")
    libc.mq_unlink(name)
    with opened(fd):
        yield fd


def seen_by_ss(*words: str) -> tuple[int, int] | None:
    """Return what ss(8) shows of one listener as Recv-Q and Send-Q."""
    program = shutil.which("ss")
    if program is None:
        missing("ss (iproute2) is not installed")
    done = subprocess.run([program, "-lnH", *words], capture_output=True, text=True, check=True)
    columns = done.stdout.split()
    at = columns.index("LISTEN")
    return int(columns[at + 1]), int(columns[at + 2])


def connect_all(listener: socket.socket, count: int, stack: contextlib.ExitStack) -> None:
    """Fill a queue with connections that nobody accepts."""
    for _ in range(count):
        client = stack.enter_context(socket.socket(listener.family, listener.type))
        client.connect(listener.getsockname())


@pytest.fixture(params=[None, 5.0], ids=["no default timeout", "default timeout"])
def _default_timeout(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with and without socket.setdefaulttimeout(), which makes new socket objects non-blocking."""
    socket.setdefaulttimeout(request.param)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("_default_timeout")
@pytest.mark.parametrize("blocking", [True, False])
def test_asking_changes_nothing(tcp: socket.socket, *, blocking: bool) -> None:
    """O_NONBLOCK, which all holders share, close-on-exec and the descriptor itself stay as they are."""
    os.set_blocking(tcp.fileno(), blocking)
    os.set_inheritable(tcp.fileno(), True)

    assert describe(tcp.fileno()).kind is Kind.LISTENER
    assert listen_queue(tcp.fileno()) == (0, 77)

    assert os.get_blocking(tcp.fileno()) is blocking
    assert os.get_inheritable(tcp.fileno()) is True


def test_tcp(tcp: socket.socket) -> None:
    """A TCP listener is one, with family, type and protocol as socket(2) would want them."""
    found = describe(tcp.fileno())
    status = os.fstat(tcp.fileno())

    assert found.fd == tcp.fileno()
    assert found.kind is Kind.LISTENER
    assert (found.family, found.type, found.proto) == (
        socket.AF_INET,
        socket.SOCK_STREAM,
        socket.IPPROTO_TCP,
    )
    assert found.sockname == tcp.getsockname()
    assert found.address == InetAddress("127.0.0.1", tcp.getsockname()[1])
    assert found.identity == (status.st_dev, status.st_ino)
    assert str(found) == f"127.0.0.1:{tcp.getsockname()[1]}"


@pytest.mark.parametrize("v6only", [True, False])
def test_tcp_on_every_interface(*, v6only: bool) -> None:
    """[::] is the bare port where it takes IPv4 as well, and is written as ss and systemctl write it."""
    with new_socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        try:
            sock.bind(("::", 0))
        except OSError as error:
            missing(f"this machine has no IPv6: {error}")
        sock.listen()
        found = describe(sock.fileno())
        port = sock.getsockname()[1]

    assert found.address == (InetAddress("::", port) if v6only else PortAddress(port))
    assert str(found) == f"[::]:{port}"


def test_mptcp() -> None:
    """An MPTCP listener is told from a TCP one by its protocol, and has its queue."""
    with new_socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(9)
        found = describe(sock.fileno())
        queue = listen_queue(sock.fileno())

    assert (found.kind, found.proto) == (Kind.LISTENER, IPPROTO_MPTCP)
    assert queue == (0, 9)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_unix(tmp_path: Path, kind: socket.SocketKind) -> None:
    """Stream and seqpacket listeners have their path, also one that is not UTF-8."""
    path = os.fsdecode(os.fsencode(tmp_path / "x") + b"\xff")
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(path)
        sock.listen()
        found = describe(sock.fileno())

    assert (found.kind, found.family, found.type) == (Kind.LISTENER, socket.AF_UNIX, kind)
    assert found.address == UnixAddress(path)


def test_abstract() -> None:
    """A listener in the abstract namespace has its name, here one that the kernel chose."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")
        sock.listen()
        found = describe(sock.fileno())
        name = sock.getsockname()

    assert found.address == AbstractAddress(name[1:])
    assert len(name) == 6


def test_vsock() -> None:
    """A VM socket has its word too, and no queue that the kernel would tell."""
    with new_socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        sock.listen()
        found = describe(sock.fileno())
        queue = listen_queue(sock.fileno())
        port = sock.getsockname()[1]

    assert (found.kind, found.family) == (Kind.LISTENER, socket.AF_VSOCK)
    assert found.address == VsockAddress(socket.VMADDR_CID_ANY, port)
    assert str(found) == f"vsock::{port}"
    assert queue is None


def test_connections(tcp: socket.socket) -> None:
    """A connection, as Accept=yes passes it, is one on either side, also after the peer's end of file."""
    with socket.create_connection(tcp.getsockname()) as client:
        server, _ = tcp.accept()
        with server:
            assert describe(server.fileno()).kind is Kind.CONNECTION
            assert describe(client.fileno()).kind is Kind.CONNECTION
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            assert describe(server.fileno()).kind is Kind.CONNECTION


def test_a_reset_connection_is_a_mere_socket(tcp: socket.socket) -> None:
    """Once the peer has reset it, the kernel does not know any more that it was a connection."""
    client = socket.create_connection(tcp.getsockname())
    server, _ = tcp.accept()
    with server:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with pytest.raises(ConnectionResetError):
            server.recv(1)
        found = describe(server.fileno())

    assert found.kind is Kind.SOCKET
    assert found.kind.is_socket


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_unix_connections(kind: socket.SocketKind) -> None:
    """Ends of a socketpair, as the fd store keeps them, are connections without an address."""
    with contextlib.ExitStack() as stack:
        left, right = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, kind))
        found = describe(left.fileno())
        right.close()
        without_peer = describe(left.fileno())

    assert (found.kind, found.address, found.sockname) == (Kind.CONNECTION, None, "")
    assert str(found) == "connection"
    assert without_peer.kind is Kind.CONNECTION


SOCKETS = [
    (socket.AF_INET, socket.SOCK_STREAM, Kind.SOCKET),
    (socket.AF_UNIX, socket.SOCK_STREAM, Kind.SOCKET),
    (socket.AF_INET, socket.SOCK_DGRAM, Kind.DATAGRAM),
    (socket.AF_UNIX, socket.SOCK_DGRAM, Kind.DATAGRAM),
    (socket.AF_NETLINK, socket.SOCK_RAW, Kind.SOCKET),
    (socket.AF_NETLINK, socket.SOCK_DGRAM, Kind.SOCKET),
]


@pytest.mark.parametrize(("family", "type_", "kind"), SOCKETS)
def test_other_sockets(family: int, type_: int, kind: Kind) -> None:
    """What neither listens nor is connected is a socket, a datagram one if it is; netlink is neither."""
    with new_socket(family, type_) as sock:
        found = describe(sock.fileno())

    assert (found.kind, found.family, found.type) == (kind, family, type_)
    assert found.kind.is_socket
    assert str(found) == kind.value or found.address is not None


def test_a_bound_stream_does_not_listen_yet() -> None:
    """Without listen(2) it is a mere socket, whatever its address says."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        found = describe(sock.fileno())
        queue = listen_queue(sock.fileno())

    assert found.kind is Kind.SOCKET
    assert queue is not None


def test_files(tmp_path: Path) -> None:
    """Regular files, directories and devices are what they are."""
    with (tmp_path / "file").open("w") as file:
        assert describe(file.fileno()).kind is Kind.FILE
    with opened(os.open(tmp_path, os.O_RDONLY)) as fd:
        assert describe(fd).kind is Kind.DIRECTORY
    with opened(os.open("/dev/null", os.O_RDONLY)) as fd:
        found = describe(fd)
    assert (found.kind, found.family, found.type, found.proto) == (Kind.DEVICE, -1, -1, -1)
    assert (found.sockname, found.address, str(found)) == (None, None, "device")
    assert not found.kind.is_socket


def test_files_that_are_on_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of procfs, on no disk like message queues, is a file, and not read: some forget what was."""
    monkeypatch.setattr("sdlisten.descriptor.os.pread", lambda *_: pytest.fail("was read"))
    with opened(os.open("/proc/self/status", os.O_RDONLY)) as fd:
        assert os.major(os.fstat(fd).st_dev) == 0
        assert describe(fd).kind is Kind.FILE


def test_fifos() -> None:
    """Either end of a pipe is a FIFO."""
    reader, writer = os.pipe()
    with opened(reader), opened(writer):
        assert describe(reader).kind is Kind.FIFO
        assert describe(writer).kind is Kind.FIFO


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_message_queues(flags: int) -> None:
    """A message queue, as systemd opens it (read-only) or for both ways, is told from a file."""
    with message_queue(flags) as fd:
        assert describe(fd).kind is Kind.MESSAGE_QUEUE


def test_a_message_queue_for_writing_alone_looks_like_a_file() -> None:
    """What cannot be read cannot be recognised; systemd passes none."""
    with message_queue(os.O_WRONLY) as fd:
        assert describe(fd).kind is Kind.FILE


@pytest.mark.parametrize("content", [b"", b"x" * 80, b"QSIZE:", b"QSIZE:" + b"x" * 75])
def test_memfds(content: bytes) -> None:
    """A memfd is one whatever is written in it, and its offset stays."""
    with opened(os.memfd_create("state")) as fd:
        os.write(fd, content)
        assert describe(fd).kind is Kind.MEMFD
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(content)


def test_memfds_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is not mounted a memfd counts as a file."""

    def no_proc(path: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr("sdlisten.descriptor.os.readlink", no_proc)
    with opened(os.memfd_create("state")) as fd:
        assert describe(fd).kind is Kind.FILE


def test_what_is_none_of_these() -> None:
    """An eventfd, whose mode has no type at all, is a descriptor."""
    with opened(os.eventfd(0)) as fd:
        found = describe(fd)

    assert (found.kind, str(found)) == (Kind.OTHER, "descriptor")


def test_closed() -> None:
    """A number that is not open is EBADF."""
    with socket.socket() as sock:
        fd = sock.fileno()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        describe(fd)
    assert caught.value.errno == errno.EBADF


def test_the_queue_is_what_ss_shows(tmp_path: Path, tcp: socket.socket) -> None:
    """Waiting connections and backlog of TCP and unix listeners are the figures of ss."""
    with contextlib.ExitStack() as stack:
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        path = tmp_path / "x"
        unix.bind(os.fspath(path))
        unix.listen(33)
        connect_all(tcp, 3, stack)
        connect_all(unix, 2, stack)

        assert listen_queue(tcp.fileno()) == (3, 77)
        assert listen_queue(unix.fileno()) == (2, 33)
        assert seen_by_ss("-t", f"sport = :{tcp.getsockname()[1]}") == (3, 77)
        assert seen_by_ss("-x", f"src = unix:{path}") == (2, 33)


def test_the_queue_of_seqpacket_and_abstract_listeners() -> None:
    """Any unix listener has figures."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.bind("")
        sock.listen(5)
        connect_all(sock, 1, stack)

        assert listen_queue(sock.fileno()) == (1, 5)


def test_no_queue() -> None:
    """What is not a stream has no queue, what is no socket is an error."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        assert listen_queue(sock.fileno()) is None
    with opened(os.eventfd(0)) as fd, pytest.raises(OSError, match="non-socket"):
        listen_queue(fd)


class Netlink(socket.socket):
    """A socket that gets an answer of our making; the kernel's own ones have one attribute of interest."""

    answer = b""

    def recv(self, _bufsize: int, _flags: int = 0, /) -> bytes:
        """Return the answer."""
        return self.answer


ATTRIBUTE = struct.Struct("=HH II")
HEADER = struct.pack("=IHHII", 0, 20, 0, 0, 0) + bytes(16)
ANSWERS = {
    "after another one": (
        HEADER + struct.pack("=HHBxxx", 5, 6, 0) + struct.pack("=HHII", 12, 4, 7, 8),
        (7, 8),
    ),
    "not there": (HEADER + struct.pack("=HHBxxx", 5, 6, 0), None),
    "nothing there": (HEADER, None),
    "empty attribute": (HEADER + struct.pack("=HH", 0, 6), None),
}


@pytest.mark.parametrize(("answer", "queue"), ANSWERS.values(), ids=ANSWERS)
def test_answers_of_other_kernels(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, queue: tuple[int, int] | None
) -> None:
    """The attribute is found wherever it stands, and may be missing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")
        sock.listen()
        monkeypatch.setattr(Netlink, "answer", answer)
        monkeypatch.setattr("sdlisten.descriptor.socket.socket", Netlink)

        assert listen_queue(sock.fileno()) == queue


def test_no_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sandbox forbids netlink (RestrictAddressFamilies=) the queue of a unix socket is not known."""

    class Forbidden(socket.socket):
        """What seccomp makes of socket(AF_NETLINK, ...)."""

        def __init__(self, *_: object) -> None:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("")
        sock.listen()
        monkeypatch.setattr("sdlisten.descriptor.socket.socket", Forbidden)

        assert listen_queue(sock.fileno()) is None


def test_listeners_of_another_network_namespace() -> None:
    """Netlink tells only of our own namespace; TCP asks the socket itself and always knows."""
    unshare = shutil.which("unshare")
    if unshare is None:
        missing("unshare (util-linux) is not installed")
    script = (
        "import sys; from sdlisten.descriptor import *; print(*map(listen_queue, map(int, sys.argv[1:])))"
    )
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0), backlog=7) as tcp:
        unix.bind("")
        unix.listen(5)
        fds = [unix.fileno(), tcp.fileno()]
        command = [unshare, "--user", "--net", sys.executable, "-c", script, *map(str, fds)]
        done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=False)
    if done.returncode and "unshare" in done.stderr:
        missing(f"no network namespace: {done.stderr.strip()}")

    assert (done.stdout, done.stderr) == ("None (0, 7)\n", "")


def test_without_what_only_linux_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS listeners are described too, without protocol and queue: it binds there, for development."""
    for name in ("SO_PROTOCOL", "TCP_INFO", "AF_NETLINK", "AF_VSOCK"):
        monkeypatch.delattr(f"sdlisten.descriptor.socket.{name}")
    monkeypatch.setattr("sdlisten.descriptor._NONBLOCK", 0)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("")
        unix.listen()
        found = [describe(sock.fileno()) for sock in (tcp, unix)]

        assert [listen_queue(sock.fileno()) for sock in (tcp, unix)] == [None, None]
        assert [one.kind for one in found] == [Kind.LISTENER, Kind.LISTENER]
        assert found[0].address == InetAddress(*tcp.getsockname())


def test_descriptors_are_plain() -> None:
    """A description has no more than what is documented, so that ten thousand of them stay small."""
    assert not hasattr(Descriptor(3, Kind.FILE, (0, 0)), "__dict__")
