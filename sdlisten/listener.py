"""One listening socket, its name, where it came from, and who owns it.

A `Listener` owns its descriptor. What is given away is a duplicate that cannot change the listener for its
other holders: the manager, sibling services, the generation before and the one after. They all share one
open file description, and with it the backlog, O_NONBLOCK, and the end that shutdown(2) puts to it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import socket
import time

from sdlisten.descriptor import describe, listen_queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

__all__ = ("SHUT_DOWN", "Listener", "Listeners", "Origin", "SharedSocket")

SHUT_DOWN = select.POLLHUP | getattr(select, "POLLRDHUP", 0)  # the latter is Linux's
"""What poll(2) reports of a listener that some holder has shut down."""

_Socket = socket.socket  # Listener.socket hides the module in its class


class Origin(enum.Enum):
    """Where a listener came from."""

    ADOPTED = "adopted"
    """The manager passed it and holds it too."""
    BOUND = "bound"
    """This process bound it."""
    STORED = "stored"
    """The manager's fd store kept it over a restart."""


class SharedSocket(socket.socket):
    """A duplicate of a listener to give away: it accepts, and cannot change the listener it shares.

    Servers call ``listen()`` on whatever they are given, and with it replace the backlog for every holder
    of the socket (asyncio: 4096 becomes 100). A ``shutdown()`` would end the listener for all of them, the
    manager included. A server that listens in C on the bare descriptor (uvloop) passes by this class: tell
    it ``backlog=listener.backlog``.
    """

    __slots__ = ()

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: the socket listens already, with the backlog its owner chose.

        Args:
            backlog: Ignored.
        """

    def shutdown(self, how: int, /) -> None:  # noqa: ARG002 - the signature of socket.shutdown()
        """Refuse to end the listener for its other holders.

        Args:
            how: Ignored.

        Raises:
            PermissionError: Always (EPERM). Close the duplicate instead.
        """
        raise PermissionError(
            errno.EPERM,
            "shutdown() would end this listener for every process that holds it; close() this duplicate",
        )


class Listener:
    """A listening stream or seqpacket socket: non-blocking, close-on-exec, owned.

    Attributes:
        name: The FileDescriptorName it was passed or bound under; "" if it has none.
        origin: Where it came from.
        sockname: What ``getsockname()`` says.
        address: The address as a word of ``ListenStream=``, with the port that was really bound; "" if the
            family has none.
        before_release: Called, last one first, before the socket is closed or detached. Whoever watches the
            descriptor unregisters here: an epoll(7) registration outlives ``close()`` while another process
            holds the socket too.
    """

    __slots__ = ("_created", "_socket", "address", "before_release", "name", "origin", "sockname")

    def __init__(
        self, sock: _Socket, *, name: str, origin: Origin, created: tuple[int, int] | None = None
    ) -> None:
        """Take ownership of a listening socket and make it non-blocking and close-on-exec.

        Args:
            sock: The socket; taken over.
            name: Its FileDescriptorName.
            origin: Where it came from.
            created: (st_dev, st_ino) of the path, if this process created it by binding.

        Raises:
            OSError: The socket is closed.
        """
        found = describe(sock.fileno())
        sock.setblocking(False)
        sock.set_inheritable(False)
        self._socket: _Socket | None = sock
        self._created = (os.getpid(), *created) if created else None
        self.name = name
        self.origin = origin
        self.sockname = found.sockname
        self.address = str(found.address or "")
        self.before_release: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        state = f"fd={self.fileno()}" if self.fileno() >= 0 else "closed"
        return f"<Listener {self.name!r} {self.address} {self.origin.value} {state}>"

    @property
    def socket(self) -> _Socket:
        """The socket; borrowed: do not close it, and give `share` to anything that might.

        Raises:
            ValueError: It was detached or closed.
        """
        if self._socket is None:
            text = f"the listener {self.name!r} at {self.address} is closed or detached"
            raise ValueError(text)
        return self._socket

    @property
    def backlog(self) -> int | None:
        """The limit of the accept queue as the kernel has it, in connections; None where it does not tell."""
        found = listen_queue(self.socket.fileno())
        return found[1] if found else None

    @property
    def queued(self) -> int | None:
        """How many connections wait to be accepted now; None where the kernel does not tell."""
        found = listen_queue(self.socket.fileno())
        return found[0] if found else None

    def fileno(self) -> int:
        """Return the descriptor, borrowed; -1 once it is closed or detached."""
        return -1 if self._socket is None else self._socket.fileno()

    def accept(self, timeout: float | None = None) -> tuple[_Socket, Any]:
        """Wait for a connection and take it; for programs without an event loop.

        Args:
            timeout: Seconds to wait; None waits for ever.

        Returns:
            The connection, owned by the caller, blocking and close-on-exec, and the peer's address.

        Raises:
            TimeoutError: Nobody connected in time.
            OSError: As accept(2); EINVAL once some holder has called shutdown() on it.
            ValueError: The listener is closed.
        """
        sock = self.socket
        poller = select.poll()
        poller.register(sock, select.POLLIN | SHUT_DOWN)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            ready = poller.poll(left)
            if not ready:
                text = f"nobody connected to {self.address} within {timeout} s"
                raise TimeoutError(text)
            # Another holder may have cleared the flag that we share; a connection that somebody else has
            # taken meanwhile would then block us beyond the timeout.
            os.set_blocking(sock.fileno(), False)
            try:
                return sock.accept()
            except BlockingIOError:
                # Somebody else has taken it; or a unix listener was shut down, where accept4(2) says EAGAIN.
                if any(events & SHUT_DOWN for _, events in ready):
                    text = f"{self.address} does not listen any more: some holder called shutdown() on it"
                    raise OSError(errno.EINVAL, text) from None

    def share(self) -> SharedSocket:
        """Return a duplicate for a server that wants a socket of its own; the caller owns it.

        It is non-blocking and close-on-exec; its ``listen()`` does nothing and its ``shutdown()`` raises.

        Raises:
            OSError: No descriptor is free (EMFILE).
            ValueError: The listener is closed.
        """
        sock = self.socket
        duplicate = os.dup(sock.fileno())
        try:
            shared = SharedSocket(sock.family, sock.type, sock.proto, duplicate)
        except BaseException:
            os.close(duplicate)
            raise
        # For the object, which does not learn it from the descriptor; and another holder may have cleared it.
        shared.setblocking(False)
        return shared

    def detach(self) -> _Socket:
        """Give the socket up to the caller, who owns it from now on, and with it the path of a unix socket.

        Raises:
            ValueError: The listener is closed.
        """
        sock = self.socket
        self._release()
        return sock

    def close(self) -> None:
        """Close our descriptor; the manager's stays open and goes on queueing connections. Harmless twice.

        A unix path is removed only by the process that bound it, and only while it still is that socket.
        """
        sock, created = self._socket, self._created
        if sock is None:
            return
        self._release()
        try:
            # Remove before closing: while the socket is alive no other server takes the path over.
            if created and created[0] == os.getpid():
                _unlink_same(str(self.sockname), created[1:])
        finally:
            sock.close()

    def _release(self) -> None:
        while self.before_release:
            self.before_release.pop()()
        self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _unlink_same(path: str, identity: tuple[int, int]) -> None:
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(path)
    except OSError as error:
        # ENOENT: somebody was faster; ENOTDIR likewise. A path that may not be removed (EACCES, EPERM,
        # EROFS) is a stale socket, which the next bind replaces: no reason to fail in close().
        if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}:
            raise


class Listeners(tuple[Listener, ...]):
    """The listeners of one endpoint, as a tuple; closes them all, also at the end of a ``with`` block."""

    __slots__ = ()

    def close(self) -> None:
        """Close every listener, the others too if one of them fails. Harmless twice."""
        with contextlib.ExitStack() as stack:
            for listener in reversed(self):
                stack.callback(listener.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
