"""Listen as a manager: who said what over NOTIFY_SOCKET, and which descriptors came with it.

The receiving side of sd_notify(3), for the supervisor and for tests. Its rules are those of systemd's own
(src/core/manager.c, src/shared/notify-recv.c).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from array import array

from sdlisten.errors import MessageError
from sdlisten.message import FDS_MAX, MESSAGE_MAX, decode_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

__all__ = ("Received", "Receiver", "close_received")

# struct ucred of unix(7): pid_t, uid_t, gid_t.
_UCRED = "iII"
# struct linger of socket(7): whether, and seconds.
_LINGER = "ii"
# sun_path has 108 bytes; Linux takes a path that fills them, other readers of sockaddr_un want the NUL.
_PATH_MAX = 107


class Received:
    """One message: what was said, by whom, and the descriptors beside it.

    Attributes:
        assignments: Name to value, as `sdlisten.message.decode_message` reads them.
        pid: Process that sent it, in our pid namespace; the kernel vouches for it.
        uid: Its user.
        gid: Its group.
        fds: The descriptors, close-on-exec. This object owns them until `detach`: they are closed by `close`,
            and with it.
    """

    __slots__ = ("assignments", "fds", "gid", "pid", "uid")

    def __init__(
        self, assignments: dict[str, str], pid: int, uid: int, gid: int, fds: tuple[int, ...]
    ) -> None:
        self.assignments = assignments
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.fds = fds

    def detach(self) -> tuple[int, ...]:
        """Give the descriptors away: the caller *takes ownership*, and `fds` is empty from now on."""
        fds, self.fds = self.fds, ()
        return fds

    def close(self) -> None:
        """Close the descriptors that were not detached; a second call does nothing."""
        close_received(self.detach())

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Received {self.assignments} from pid={self.pid} uid={self.uid} fds={self.fds}>"


class Receiver:
    """A notification socket of its own, for one or many senders.

    It lies in a fresh directory with mode 0700, so that only our own user and root can send, or, with
    ``abstract=True``, under a random abstract name that every process of the network namespace can reach.

    Args:
        abstract: Use an abstract name.
        directory: Where to make the fresh directory; else the first that is writable of $RUNTIME_DIRECTORY,
            $TMPDIR, /tmp, /run, /dev/shm.

    Attributes:
        address: The value for NOTIFY_SOCKET.

    Raises:
        OSError: No directory is writable, or the socket cannot be made; nothing is left behind.
    """

    __slots__ = ("_directory", "_pid", "_socket", "address")

    def __init__(self, *, abstract: bool = False, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory: str | None = None
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            # Before bind: a message that arrives earlier would lack the sender's identity.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            if abstract:
                self.address = f"@sdlisten-{os.urandom(16).hex()}"
                self._socket.bind("\0" + self.address[1:])
            else:
                self._directory = _fresh_directory(directory)
                self.address = f"{self._directory}/notify"
                self._socket.bind(self.address)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to poll for messages; -1 once closed. *Borrows*: do not close it."""
        return self._socket.fileno()

    def receive(self) -> Received | None:
        """Take the next message, without waiting.

        A message ``BARRIER=1`` is answered here, by closing its descriptor: whoever calls again has done with
        the messages before. It is returned like any other, without descriptors.

        Returns:
            The message, whose descriptors the caller owns through it, or None if there is none.

        Raises:
            MessageError: What arrived is no message: malformed, truncated, from a sender without an identity
                in our pid namespace, or a barrier that is not alone with one descriptor. It is dropped whole,
                with its descriptors; the next call reads the next one.
            OSError: The receiver is closed.
        """
        space = socket.CMSG_SPACE(struct.calcsize(_UCRED)) + socket.CMSG_SPACE(FDS_MAX * array("i").itemsize)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MESSAGE_MAX, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        fds = tuple(_descriptors(ancillary))
        try:
            return _read(data, ancillary, flags, fds)
        except BaseException:
            close_received(fds)
            raise

    def close(self) -> None:
        """Close the socket and remove its directory, if that can be removed.

        A forked child leaves the directory to its parent.
        """
        self._socket.close()
        if self._directory is None or self._pid != os.getpid():
            return
        # Senders may remove it, leave files in it, make it theirs (ENOTEMPTY, EISDIR, EACCES), and the file
        # system may have become read-only (EROFS). What cannot be removed is no reason to stop serving.
        with contextlib.suppress(OSError):
            os.unlink(f"{self._directory}/notify")
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)
        self._directory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Receiver {self.address!r} fd={self.fileno()}>"


def _fresh_directory(parent: str | os.PathLike[str] | None) -> str:
    """Make a directory that is ours alone, short enough for a socket's address."""
    name = f"sdlisten-{os.urandom(8).hex()}"
    if parent is not None:
        path = f"{os.path.abspath(parent)}/{name}"
        os.mkdir(path, 0o700)
        return path
    # RUNTIME_DIRECTORY= of systemd.exec(5) may hold several, separated by colons.
    runtime_directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    # /dev/shm is there also in a container whose root is read-only.
    wishes = (runtime_directory, os.environ.get("TMPDIR", ""), "/tmp", "/run", "/dev/shm")  # noqa: S108 - 0700
    refusal: OSError = FileNotFoundError(errno.ENOENT, "no directory for a notification socket")
    for wish in wishes:
        path = f"{wish}/{name}"
        # An address is absolute, and what does not fit into it cannot be bound.
        if wish.startswith("/") and len(os.fsencode(f"{path}/notify")) <= _PATH_MAX:
            try:
                os.mkdir(path, 0o700)
            except OSError as error:
                refusal = error
            else:
                return path
    raise refusal


def _read(data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int, fds: tuple[int, ...]) -> Received:
    """Judge what recvmsg(2) returned; on an error the caller closes the descriptors."""
    if flags & socket.MSG_TRUNC:
        raise MessageError(f"a message over {MESSAGE_MAX} bytes (NOTIFY_BUFFER_MAX): dropped")
    if flags & socket.MSG_CTRUNC:
        # The kernel cuts the list where our table of descriptors is full, and closes the rest itself.
        raise MessageError(f"only {len(fds)} of a message's descriptors arrived: too many open files here?")
    pid, uid, gid = _credentials(ancillary)
    assignments = decode_message(data)
    if assignments.get("BARRIER") != "1":
        return Received(assignments, pid, uid, gid, fds)
    if len(assignments) != 1 or len(fds) != 1:
        others = len(assignments) - 1
        raise MessageError(
            f"BARRIER=1 with {others} other assignments and {len(fds)} descriptors; expected 0 and 1"
        )
    close_received(fds)
    return Received(assignments, pid, uid, gid, ())


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
    """All descriptors of a message: we own them as soon as recvmsg(2) returns."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # A truncated list may end inside a number.
            fds = array("i")
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            yield from fds


def _credentials(ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[int, int, int]:
    """Who sent it: pid, uid, gid."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, gid = struct.unpack(_UCRED, data)
            # pid 0: the sender is in a pid namespace that ours cannot see.
            if pid > 0:
                return pid, uid, gid
    raise MessageError("the sender's process is not visible from here (another pid namespace?): dropped")


def close_received(fds: Iterable[int]) -> None:
    """Close descriptors that came from somebody else, without waiting and whatever they are.

    A socket whose SO_LINGER has a time loses that: the last holder would wait for so long in close(2), also
    with O_NONBLOCK (inet_release of the kernel), and who else holds it cannot be known. What was sent still
    arrives; others who hold the socket only do not wait for it when they close.

    Args:
        fds: The descriptors; *taken over*.
    """
    for fd in fds:
        # It is closed also where close(2) reports a fault, as of a file on a network, which is the sender's.
        with contextlib.suppress(OSError):
            _stop_lingering(fd)
        with contextlib.suppress(OSError):
            os.close(fd)


def _stop_lingering(fd: int) -> None:
    sock = socket.socket(fileno=fd)  # ENOTSOCK: nothing else lingers
    try:
        size = struct.calcsize(_LINGER)
        lingers, seconds = struct.unpack(_LINGER, sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, size))
        # Without a time it is an order to reset the connection, which waits for nobody.
        if lingers and seconds:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(size))
    finally:
        sock.detach()
