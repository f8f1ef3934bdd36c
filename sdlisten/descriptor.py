"""What one descriptor is: its kind, its address, its queue. Asks the kernel and changes nothing.

Kinds come from fstat(2) and from the family, SO_TYPE, SO_PROTOCOL and SO_ACCEPTCONN of socket(7), never from
the position or the name of a descriptor: managers pass files, FIFOs, message queues, datagram and connected
sockets in the same range as listeners.
"""

from __future__ import annotations

import enum
import os
import socket
import stat
import struct

from sdlisten.address import PortAddress, address_of_sockname

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.address import Address

__all__ = ("Descriptor", "Kind", "describe", "listen_queue")


class Kind(enum.Enum):
    """What a descriptor is good for."""

    LISTENER = "listener"
    """A stream or seqpacket socket that listens: accept(2) works."""
    CONNECTION = "connection"
    """A connected stream or seqpacket socket, as ``Accept=yes`` passes it."""
    DATAGRAM = "datagram socket"
    SOCKET = "socket"
    """Any other socket: netlink, raw, or a stream that neither listens nor is connected."""
    FIFO = "FIFO"
    FILE = "file"
    DIRECTORY = "directory"
    DEVICE = "device"
    MESSAGE_QUEUE = "message queue"
    MEMFD = "memfd"
    OTHER = "descriptor"
    """None of these, such as an eventfd."""

    @property
    def is_socket(self) -> bool:
        """Whether socket calls work on it."""
        return self in _SOCKETS


_SOCKETS = frozenset({Kind.LISTENER, Kind.CONNECTION, Kind.DATAGRAM, Kind.SOCKET})
_CONNECTING = frozenset({socket.SOCK_STREAM, socket.SOCK_SEQPACKET})
_NONBLOCK: int = getattr(socket, "SOCK_NONBLOCK", 0)  # macOS has neither this nor SO_PROTOCOL and TCP_INFO
_QUEUE_SIZE = 80  # FILENT_SIZE of the kernel's ipc/mqueue.c


class Descriptor:
    """What the kernel said of a descriptor when it was asked.

    Attributes:
        fd: Its number; borrowed.
        kind: What it is.
        family, type, proto: As in socket(2), SO_TYPE and SO_PROTOCOL, plain ints; -1 if it is no socket, or
            if the system does not tell (the protocol, on macOS).
        sockname: What ``getsockname()`` returns; None if it is no socket.
        address: The listening address, if it has one that can be written as a word.
        identity: (st_dev, st_ino) of the open file, which tell whether the number still means the same one.
    """

    __slots__ = ("address", "family", "fd", "identity", "kind", "proto", "sockname", "type")

    def __init__(self, fd: int, kind: Kind, identity: tuple[int, int]) -> None:
        self.fd = fd
        self.kind = kind
        self.identity = identity
        self.family = self.type = self.proto = -1
        self.sockname: object = None
        self.address: Address | None = None

    def __str__(self) -> str:
        if isinstance(self.address, PortAddress):
            return f"[::]:{self.address.port}"
        return str(self.address) if self.address else self.kind.value


def describe(fd: int) -> Descriptor:
    """Ask the kernel what a descriptor is.

    Args:
        fd: Its number; borrowed, and neither its flags nor its file are changed.

    Raises:
        OSError: It is not open (EBADF).
    """
    status = os.fstat(fd)
    identity = (status.st_dev, status.st_ino)
    if stat.S_ISSOCK(status.st_mode):
        return _describe_socket(fd, identity)
    return Descriptor(fd, _kind_of_file(fd, status), identity)


def _borrow(fd: int) -> socket.SocketType:
    # An explicit SOCK_NONBLOCK keeps the constructor from calling ioctl(FIONBIO) when the program has used
    # socket.setdefaulttimeout(). Family -1: found out by the constructor.
    return socket.SocketType(-1, _NONBLOCK, 0, fd)


def _describe_socket(fd: int, identity: tuple[int, int]) -> Descriptor:
    found = Descriptor(fd, Kind.SOCKET, identity)
    borrowed = _borrow(fd)
    try:
        found.family = borrowed.family
        found.type = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if hasattr(socket, "SO_PROTOCOL"):
            found.proto = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        found.sockname = borrowed.getsockname()
        if found.type in _CONNECTING:
            found.kind = _kind_of_stream(borrowed)
            v6 = found.family == socket.AF_INET6
            v6only = v6 and bool(borrowed.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            found.address = address_of_sockname(found.family, found.sockname, v6only=v6only)
        elif found.type == socket.SOCK_DGRAM and found.family != getattr(socket, "AF_NETLINK", -1):
            found.kind = Kind.DATAGRAM
    finally:
        borrowed.detach()
    return found


def _kind_of_stream(borrowed: socket.SocketType) -> Kind:
    if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Kind.LISTENER
    try:
        borrowed.getpeername()
    except OSError:  # ENOTCONN; or EINVAL, once the peer has reset the connection
        return Kind.SOCKET
    return Kind.CONNECTION


def _kind_of_file(fd: int, status: os.stat_result) -> Kind:
    for kind, matches in (
        (Kind.FIFO, stat.S_ISFIFO),
        (Kind.DIRECTORY, stat.S_ISDIR),
        (Kind.DEVICE, stat.S_ISCHR),
        (Kind.DEVICE, stat.S_ISBLK),
    ):
        if matches(status.st_mode):
            return kind
    if not stat.S_ISREG(status.st_mode):
        return Kind.OTHER
    # The file systems of queues and memfds have no disk, which spares other files the questions.
    if os.major(status.st_dev) != 0:
        return Kind.FILE
    if _proc_link(fd).startswith("/memfd:"):
        return Kind.MEMFD
    return Kind.MESSAGE_QUEUE if _is_message_queue(fd, status) else Kind.FILE


def _is_message_queue(fd: int, status: os.stat_result) -> bool:
    # mq_overview(7): the descriptor of a queue is a file descriptor, and reads like the file in /dev/mqueue,
    # which always has this size. No other file is read: what /proc/kmsg tells is gone from the kernel's log.
    try:
        return status.st_size == _QUEUE_SIZE and os.pread(fd, 6, 0) == b"QSIZE:"
    except OSError:  # not readable: opened for writing alone, or no file that can be read at an offset
        return False


def _proc_link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no /proc here: a memfd counts as the file it looks like
        return ""


def listen_queue(fd: int) -> tuple[int, int] | None:
    """Ask how many connections wait in a listener's queue, and how many may.

    The two figures that ``ss -l`` shows as Recv-Q and Send-Q.

    Args:
        fd: A listener; borrowed.

    Returns:
        (waiting, backlog), or None where the kernel does not tell: on macOS, for a VM socket, or for a unix
        socket if netlink is not allowed (``RestrictAddressFamilies=`` without AF_NETLINK) or it comes from
        another network namespace.

    Raises:
        OSError: It is not an open socket.
    """
    borrowed = _borrow(fd)
    try:
        if borrowed.family == socket.AF_UNIX:
            return _unix_queue(os.fstat(fd).st_ino)
        try:
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        except (AttributeError, OSError):  # macOS; EOPNOTSUPP, ENOPROTOOPT: not TCP
            return None
    finally:
        borrowed.detach()
    # struct tcp_info of linux/tcp.h: for a listener tcpi_unacked (at 24) is the length of the queue and
    # tcpi_sacked (at 28) its limit.
    waiting, backlog = struct.unpack_from("=II", info, 24)
    return waiting, backlog


_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NETLINK_SOCK_DIAG = 4
_UDIAG_SHOW_RQLEN = 0x10
_UNIX_DIAG_RQLEN = 4
_ANY_STATE = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFF
_HEADERS = 32  # struct nlmsghdr and struct unix_diag_msg, 16 bytes each


def _unix_queue(inode: int) -> tuple[int, int] | None:
    # A unix socket has no TCP_INFO; sock_diag(7) is what ss asks. The inode of fstat() is the one it goes by.
    request = struct.pack(
        "=IHHII BBHIIIII",
        40,
        _SOCK_DIAG_BY_FAMILY,
        _NLM_F_REQUEST,
        0,
        0,
        socket.AF_UNIX,
        0,
        0,
        _ANY_STATE,
        inode & 0xFFFFFFFF,
        _UDIAG_SHOW_RQLEN,
        _NO_COOKIE,
        _NO_COOKIE,
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.setblocking(False)
            netlink.send(request)
            answer = netlink.recv(4096)
    except (AttributeError, OSError):  # macOS; forbidden by a sandbox; a kernel without unix_diag
        return None
    (kind,) = struct.unpack_from("=H", answer, 4)
    if kind != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR: no such socket in this network namespace
        return None
    offset = _HEADERS
    while offset + 4 <= len(answer):
        length, attribute = struct.unpack_from("=HH", answer, offset)
        if attribute == _UNIX_DIAG_RQLEN:
            waiting, backlog = struct.unpack_from("=II", answer, offset + 4)
            return waiting, backlog
        offset += (length + 3) & ~3 or 4
    return None
