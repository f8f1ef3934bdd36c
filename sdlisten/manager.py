"""The line to a manager: one message to its NOTIFY_SOCKET, or a barrier behind those sent before.

The addresses and ways of sending are those of sd_notify(3). As in libsystemd each message has a socket of its
own: a manager that was started anew is found again, and a fork breaks nothing.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import threading
import time
from array import array

from sdlisten.errors import BarrierTimeoutError, NotifyError
from sdlisten.message import encode_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ("Manager", "transmit", "wait_for")

_SILENCE = 60.0  # seconds between two reports
_VSOCK_TIMEOUT = 1.0  # seconds: a stream cannot be connected without waiting
_VSOCK_KINDS = {
    # A hypervisor may lack datagrams, as QEMU does: then as libsystemd since 253.
    "vsock": (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM),
    "vsock-dgram": (socket.SOCK_DGRAM,),
    "vsock-seqpacket": (socket.SOCK_SEQPACKET,),
    "vsock-stream": (socket.SOCK_STREAM,),
}
_NOT_SUPPORTED = (errno.ENODEV, errno.EOPNOTSUPP, errno.ESOCKTNOSUPPORT, errno.EPROTONOSUPPORT)
_PRIVILEGED_PORT_MAX = 1023
_VMADDR_ANY = 2**32 - 1


def _log(text: str) -> None:
    import logging  # noqa: PLC0415 - a program whose manager listens need not load it

    logging.getLogger("sdlisten.notifier").warning("%s", text)


class Manager:
    """A manager at an address. Threads may share it.

    Args:
        address: NOTIFY_SOCKET.
        report: Told of an `offer` that failed, once a minute at most. As a default it is logged, which may
            wait: a handler of logging writes to stderr, and that may be a pipe which nobody reads.

    Attributes:
        address: NOTIFY_SOCKET.
        lock: Held over a barrier; whoever holds it longer keeps the barriers of other threads away.
    """

    __slots__ = ("_pending", "_quiet_until", "_report", "_waited", "address", "lock")

    def __init__(self, address: str, report: Callable[[str], object] = _log) -> None:
        self.address = address
        self._report = report
        self.lock = threading.RLock()
        self._quiet_until = 0.0
        # A barrier that was not answered in time, and how long we have waited since the last answer.
        self._pending = -1
        self._waited = 0.0

    def __del__(self) -> None:
        self.close()

    @property
    def takes_descriptors(self) -> bool:
        """Whether descriptors can go along: not out of a virtual machine."""
        return not _is_vsock(self.address)

    def offer(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send without waiting; a failure is the manager's business: reported, once a minute at most.

        Args:
            data: A whole message.
            fds: Descriptors to go with it (*borrowed*).

        Returns:
            Whether it is in the manager's queue.
        """
        try:
            transmit(self.address, data, fds)
        except OSError as error:
            now = time.monotonic()
            if now >= self._quiet_until:
                self._quiet_until = now + _SILENCE
                self._report(self._text(error))
            return False
        return True

    def insist(self, data: bytes, fds: Sequence[int] = (), *, timeout: float = 0) -> None:
        """Send, waiting for room in the manager's queue.

        Args:
            data: A whole message.
            fds: Descriptors to go with it (*borrowed*).
            timeout: Seconds; as in `synchronise` they are not waited again for a manager that stays silent.

        Raises:
            BarrierTimeoutError: The queue was full for all that time.
            NotifyError: The manager cannot be reached.
        """
        begin = time.monotonic()
        try:
            self._send(data, fds, begin + timeout - self._waited)
        except BarrierTimeoutError:
            self._waited += time.monotonic() - begin
            raise

    def send_barrier(self) -> int:
        """Send, without waiting, one end of a pipe for the manager to close once it has done all sent before.

        Returns:
            The other end, non-blocking; the caller *takes ownership*.

        Raises:
            BarrierTimeoutError: The queue is full.
            NotifyError: The manager cannot be reached.
        """
        return self._send_barrier(0)

    def synchronise(self, timeout: float) -> None:
        """Wait until the manager has processed all messages sent before.

        Messages are processed in order: while an earlier barrier is unanswered a new one cannot be answered
        either, and what was waited for the one need not be waited again for the other. So a manager that
        never answers costs the longest of all time limits, and that once.

        Args:
            timeout: Seconds.

        Raises:
            BarrierTimeoutError: It did not answer in time.
            NotifyError: It cannot be reached.
        """
        begin = time.monotonic()
        deadline = begin + timeout
        if not self.lock.acquire(timeout=max(timeout, 0)):
            raise self._silent()
        try:
            if self._pending >= 0:
                self._await_answer(deadline)
            self._pending = self._send_barrier(deadline - self._waited)
            self._await_answer(deadline)
        except BarrierTimeoutError:
            self._waited += time.monotonic() - begin
            raise
        finally:
            self.lock.release()

    def close(self) -> None:
        """Drop the barrier that was not answered, if there is one; the line stays usable."""
        if self._pending >= 0:
            os.close(self._pending)
            self._pending = -1

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        try:
            transmit(self.address, data, fds, deadline=deadline)
        except BlockingIOError as error:
            raise BarrierTimeoutError(self._text("its queue is full")) from error
        except OSError as error:
            raise NotifyError(self._text(error)) from error
        if self._pending < 0:
            # It took this one, so where its queue was full it has gone on since.
            self._waited = 0.0

    def _send_barrier(self, deadline: float) -> int:
        if not self.takes_descriptors:
            raise NotifyError(self._text("a barrier needs a descriptor to go with it"))
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._send(encode_message("BARRIER=1", fd_count=1), (theirs,), deadline)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def _await_answer(self, deadline: float) -> None:
        if not wait_for(self._pending, 0, deadline - self._waited):
            raise self._silent()
        self.close()
        self._waited = 0.0

    def _silent(self) -> BarrierTimeoutError:
        return BarrierTimeoutError(self._text("it has not answered a barrier in time"))

    def _text(self, why: object) -> str:
        return f"the manager at NOTIFY_SOCKET={self.address!r} was not told: {why}"


def transmit(address: str, data: bytes, fds: Sequence[int] = (), *, deadline: float = 0) -> None:
    """Put one message into a manager's queue.

    Without a deadline this does not wait, except that a vsock address may take up to a second.

    Args:
        address: ``/path``, ``@abstract``, or ``vsock:CID:PORT``; for ``vsock`` also ``vsock-stream``,
            ``vsock-dgram`` and ``vsock-seqpacket``.
        data: The message.
        fds: Descriptors to go with it (*borrowed*).
        deadline: Until when, by `time.monotonic`, to wait for room in the queue.

    Raises:
        BlockingIOError: The queue is full, still.
        OSError: There is no such manager, it may not be spoken to, or the address is none.
    """
    if _is_vsock(address):
        if fds:
            raise OSError(errno.EOPNOTSUPP, "descriptors do not leave a virtual machine")
        _transmit_vsock(address, data)
        return
    path = os.fsencode(address)
    if path[:1] == b"@":
        path = b"\0" + path[1:]
    elif path[:1] != b"/":
        raise _not_an_address(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        # Connected, because only then poll(2) tells when the other's queue has room.
        sender.connect(path)
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        while True:
            try:
                sender.sendmsg([data], beside, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not wait_for(sender.fileno(), select.POLLOUT, deadline):
                    raise
            else:
                return


def wait_for(fd: int, events: int, deadline: float) -> bool:
    """Wait until a descriptor has one of the events, or hangs up; False once the time has passed.

    Args:
        fd: The descriptor (*borrowed*).
        events: Of poll(2).
        deadline: By `time.monotonic`; in the past for a look without waiting.
    """
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(math.ceil(max(deadline - time.monotonic(), 0) * 1000)))


def _is_vsock(address: str) -> bool:
    return address.partition(":")[0] in _VSOCK_KINDS


def _transmit_vsock(address: str, data: bytes) -> None:
    scheme, _, rest = address.partition(":")
    cid, _, port = rest.partition(":")
    # Unlike for a listener the CID must be given: "any" is nobody to speak to.
    if not (_is_number(cid) and _is_number(port)) or _VMADDR_ANY in (int(cid), int(port)):
        raise _not_an_address(address)
    with _open_vsock(_VSOCK_KINDS[scheme]) as sender:
        sender.settimeout(_VSOCK_TIMEOUT)
        _bind_privileged(sender)
        sender.connect((int(cid), int(port)))
        sender.sendall(data)
        if sender.type != socket.SOCK_DGRAM:
            # On a connection its end is the end of the message, and the manager closes when it has read that.
            sender.shutdown(socket.SHUT_WR)
            if sender.recv(1):
                raise OSError(errno.EPROTO, "it answered a notification")


def _open_vsock(kinds: Sequence[socket.SocketKind]) -> socket.socket:
    """Open a socket of the first kind that the hypervisor offers."""
    for kind in kinds[:-1]:
        try:
            return socket.socket(socket.AF_VSOCK, kind)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    return socket.socket(socket.AF_VSOCK, kinds[-1])


def _bind_privileged(sender: socket.socket) -> None:
    """Show by a port below 1024 that we may have one, as libsystemd does; whoever may not goes without."""
    for port in range(_PRIVILEGED_PORT_MAX, 0, -1):
        try:
            sender.bind((_VMADDR_ANY, port))
        except PermissionError:
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(_VMADDR_ANY))


def _not_an_address(address: str) -> OSError:
    return OSError(errno.EINVAL, f"{address!r} is no address; expected /path, @name or vsock:CID:PORT")
