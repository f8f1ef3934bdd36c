"""add_accept_handler(): hand every accepted connection to a callback, on the event loop.

What other accept loops do with the errors of accept(2): Tornado knows two and lets the rest escape into the
loop, which calls again at once (18,522 log records a second when descriptors run out). asyncio pauses for a
second on the four that mean "out of something". trio, whose reasoning this table follows, passes over what
concerns one connection and leaves the rest to its caller. Twisted keeps a descriptor in reserve to refuse
clients politely.

What this one does:

- Errors of one connection (`CONNECTION_ERRNOS`): the next one is accepted. Linux reports an error that
  waits on the new socket as an error of accept(); the listener is fine.
- Out of something (`CAPACITY_ERRNOS`), and what nobody has heard of: stop reading for a while, longer each
  time. The listener stays readable, so going on would be a busy loop; clients wait in the queue meanwhile.
- The listener is gone (`LISTENER_ERRNOS`): nothing will ever come; reported once, detached,
  `AcceptHandle.error`.

One wake-up of the loop accepts one connection, delivers it, and asks poll(2) whether more wait: half a
microsecond, where a last accept4() that fails costs five (it makes a socket before it looks at the queue).
Only if there are more does it go on, at most ``burst`` of them, because other callbacks of the loop want
their turn.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import select
import socket
import sys
import time
from types import MappingProxyType
from typing import cast

from sdlisten.descriptor import Kind, describe
from sdlisten.errors import DescriptorError
from sdlisten.listener import Listener, Origin, SharedSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any

__all__ = (
    "CAPACITY_ERRNOS",
    "CONNECTION_ERRNOS",
    "LISTENER_ERRNOS",
    "AcceptHandle",
    "add_accept_handler",
)

logger = logging.getLogger("sdlisten.accepting")

CONNECTION_ERRNOS = MappingProxyType(
    {
        errno.ECONNABORTED: "the client was gone before we came: reset while it waited in the queue",
        errno.EPROTO: "the same on other systems (System V); Linux: a protocol error of this connection",
        errno.EPERM: "a firewall rule or a security module forbids this client",
        errno.ETIMEDOUT: "network error already pending on the new socket, accept(2) 'Error handling'",
        errno.ENETDOWN: "likewise",
        errno.ENETUNREACH: "likewise",
        errno.EHOSTDOWN: "likewise",
        errno.EHOSTUNREACH: "likewise",
        errno.ENOPROTOOPT: "likewise",
        getattr(errno, "ENONET", errno.ENETDOWN): "likewise; Linux only",
    }
)
"""Errors that concern one connection; the reason for each."""

CAPACITY_ERRNOS = MappingProxyType(
    {
        errno.EMFILE: "this process has RLIMIT_NOFILE descriptors open; LimitNOFILE= in the unit raises it",
        errno.ENFILE: "the system's table of open files is full, fs.file-max",
        errno.ENOBUFS: "no memory for socket buffers",
        errno.ENOMEM: "no memory",
    }
)
"""Errors that mean "not now"; what is lacking."""

LISTENER_ERRNOS = MappingProxyType(
    {
        errno.EINVAL: "it does not listen any more: some holder of the socket called shutdown() on it",
        errno.EBADF: "the descriptor was closed while the handler was attached",
        errno.ENOTSOCK: "the descriptor was closed and its number is another file's now",
        errno.EOPNOTSUPP: "it is no stream or seqpacket socket; accept(2)",
    }
)
"""Errors that mean the listener will never accept again; the reason for each."""

_FIRST_REST = 0.05  # seconds, doubled each time up to
_LONGEST_REST = 1.0
_REPORT_INTERVAL = 10.0  # seconds between two log lines about resting


def add_accept_handler(
    sock: Listener | socket.socket,
    callback: Callable[[socket.socket, Any], object],
    io_loop: object = None,
    *,
    burst: int = 32,
) -> AcceptHandle:
    """Call ``callback(connection, address)`` for every connection to a listener.

    The semantics are those of ``tornado.netutil.add_accept_handler``; the connections are non-blocking,
    errors cost no busy loop, and a callback that raises loses its own connection alone.

    Args:
        sock: A `Listener`, or a listening stream or seqpacket socket; borrowed, and made non-blocking.
            Closing a Listener detaches the handler; of a bare socket call `AcceptHandle.remove` first,
            because epoll(7) goes on reporting a closed descriptor whose socket another process holds.
        callback: Gets each connection, an exact ``socket.socket``, non-blocking and close-on-exec, which it
            owns, and the peer's address. If it raises, the connection is closed and the exception handler
            of the loop called. It must not return an awaitable: nobody would await it.
        io_loop: An asyncio event loop with ``add_reader`` (uvloop's too) or a Tornado IOLoop. None: the
            running loop, else Tornado's current one.
        burst: Accept at most this many connections before other callbacks of the loop have their turn.

    Returns:
        A handle; call it to stop accepting.

    Raises:
        DescriptorError: The socket does not listen.
        RuntimeError: There is no event loop to attach to.
        TypeError: The callback is a coroutine function, or the loop cannot watch descriptors.
        ValueError: ``burst`` is less than 1, or the listener is closed.
        OSError: The socket is closed.
    """
    if burst < 1:
        text = f"burst={burst}: expected how many connections to accept per wake-up, 1 or more"
        raise ValueError(text)
    if inspect.iscoroutinefunction(callback):
        text = (
            f"{callback!r} is a coroutine function, and nobody would await it: start a task from a function"
        )
        raise TypeError(text)
    bare = sock.socket if isinstance(sock, Listener) else sock
    found = describe(bare.fileno())
    if found.kind is not Kind.LISTENER:
        text = f"fd {found.fd} {found} does not listen: call listen() on it before add_accept_handler()"
        raise DescriptorError(text, fd=found.fd)
    return AcceptHandle(sock, bare, callback, _event_loop(io_loop), burst)


class AcceptHandle:
    """An attached accept handler; calling it is `remove`.

    Use it on the loop's own thread only.

    Attributes:
        error: Why the handler detached itself (one of `LISTENER_ERRNOS`); None otherwise.
    """

    __slots__ = (
        "_accept",
        "_burst",
        "_callback",
        "_fd",
        "_listener",
        "_loop",
        "_paused",
        "_poll",
        "_reading",
        "_removed",
        "_report_after",
        "_reported",
        "_rest",
        "_rest_timer",
        "_resting_since",
        "_shared",
        "_where",
        "error",
    )

    def __init__(
        self,
        sock: Listener | socket.socket,
        bare: socket.socket,
        callback: Callable[[socket.socket, Any], object],
        loop: asyncio.AbstractEventLoop,
        burst: int,
    ) -> None:
        self.error: OSError | None = None
        self._listener = sock if isinstance(sock, Listener) else None
        # O_NONBLOCK belongs to the open file description, and so to every holder: systemd clears it when it
        # starts another service of the same .socket unit (measured, 252 to 262).
        self._shared = isinstance(sock, SharedSocket) or (
            self._listener is not None and self._listener.origin is not Origin.BOUND
        )
        self._fd = bare.fileno()
        self._where = str(describe(self._fd))
        self._callback = callback
        self._loop = loop
        self._burst = burst
        self._accept = _accepter(bare)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._reading = self._paused = self._removed = False
        self._rest = 0.0
        self._rest_timer: asyncio.TimerHandle | None = None
        self._resting_since = 0.0
        self._reported = False
        self._report_after = 0.0
        bare.setblocking(False)
        self._watch()
        if self._listener is not None:
            self._listener.before_release.append(self.remove)

    def __repr__(self) -> str:
        state = "removed" if self._removed else "paused" if self._paused else "attached"
        return f"<AcceptHandle {self._where} {state}>"

    def __call__(self) -> None:
        """Stop accepting, as `remove`."""
        self.remove()

    def remove(self) -> None:
        """Stop accepting for good; the callback is not called again, not even in the burst under way.

        The listener stays open and its queue fills. Harmless twice, from inside the callback, and after the
        loop was closed.
        """
        self._removed = True
        self._watch()
        if self._listener is not None and self.remove in self._listener.before_release:
            self._listener.before_release.remove(self.remove)

    def pause(self) -> None:
        """Stop accepting until `resume`; connections wait in the queue of the listener. Harmless twice."""
        self._paused = True
        self._watch()

    def resume(self) -> None:
        """Accept again after `pause`. Harmless if not paused, and after `remove`."""
        self._paused = False
        self._watch()

    def _watch(self) -> None:
        """Make the loop watch the listener, or not, as the state says."""
        reading = not (self._removed or self._paused or self._rest_timer)
        if self._removed and self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        if reading == self._reading or self._loop.is_closed():
            return
        if reading:
            self._loop.add_reader(self._fd, self._on_readable)
        else:
            self._loop.remove_reader(self._fd)
        self._reading = reading

    def _on_readable(self) -> None:
        if self._shared:
            os.set_blocking(self._fd, False)
        for turn in range(self._burst):
            if not self._accept_one():
                return
            # Once there are more, the last accept() of a burst may fail, which is cheap among many. Not on a
            # shared listener: if O_NONBLOCK were cleared meanwhile, that accept() would block the loop.
            if (turn == 0 or self._shared) and not self._poll.poll(0):
                return

    def _accept_one(self) -> bool:
        """Accept and deliver one connection; returns whether there is a point in trying another."""
        try:
            connection, address = self._accept()
        except BlockingIOError:
            return False  # another holder of the listener was faster
        except OSError as error:
            if error.errno in LISTENER_ERRNOS:
                self._fail(error)
            elif error.errno not in CONNECTION_ERRNOS:
                self._take_a_rest(error)
        else:
            if self._rest:
                self._rested()
            self._deliver(connection, address)
        return self._reading  # not if it was removed or paused meanwhile, by the callback for one

    def _deliver(self, connection: socket.socket, address: object) -> None:
        try:
            result = self._callback(connection, address)
            if result is not None and hasattr(result, "__await__"):
                _discard(result)
                text = f"{self._callback!r} returned an awaitable, and nobody would await it"
                raise TypeError(text)  # noqa: TRY301 - handled as any other error of the callback
        except Exception as error:  # noqa: BLE001 - reported; one client's trouble is not the others'
            connection.close()
            message = f"the accept callback of {self._where} raised"
            self._loop.call_exception_handler({"message": message, "exception": error, "socket": connection})
        except BaseException:
            connection.close()
            raise

    def _take_a_rest(self, error: OSError) -> None:
        now = time.monotonic()
        if not self._rest:
            self._resting_since = now
        self._rest = min(self._rest * 2 or _FIRST_REST, _LONGEST_REST)
        self._rest_timer = self._loop.call_later(self._rest, self._wake)
        self._watch()
        if now >= self._report_after:
            self._report_after = now + _REPORT_INTERVAL
            self._reported = True
            why = CAPACITY_ERRNOS.get(error.errno or 0, "not an error that accept(2) documents")
            logger.warning("cannot accept on %s, clients wait: %s (%s)", self._where, error, why)

    def _wake(self) -> None:
        self._rest_timer = None
        self._watch()

    def _rested(self) -> None:
        self._rest = 0.0
        if self._reported:
            self._reported = False
            seconds = time.monotonic() - self._resting_since
            logger.warning("accepting on %s again after %.1f s", self._where, seconds)

    def _fail(self, error: OSError) -> None:
        self.error = error
        self.remove()
        why = LISTENER_ERRNOS[error.errno or 0]
        logger.error("detached from %s, it will never accept again: %s (%s)", self._where, error, why)


def _event_loop(io_loop: object) -> asyncio.AbstractEventLoop:
    given = _current_loop() if io_loop is None else io_loop
    loop: object = getattr(given, "asyncio_loop", given)  # a Tornado IOLoop runs on one
    if not hasattr(loop, "add_reader"):
        text = f"io_loop={io_loop!r}: expected an asyncio event loop with add_reader(), or a Tornado IOLoop"
        raise TypeError(text)
    return cast("asyncio.AbstractEventLoop", loop)


def _current_loop() -> object:
    # Who has a loop has imported its module; we import none for those who have not.
    if "asyncio" in sys.modules:
        try:
            return sys.modules["asyncio"].get_running_loop()
        except RuntimeError:
            pass  # none runs in this thread; Tornado's may be about to
    if "tornado.ioloop" in sys.modules:
        current = sys.modules["tornado.ioloop"].IOLoop.current(instance=False)
        if current is not None:
            return current
    text = "add_accept_handler() needs an event loop: call it from a running one, or give io_loop="
    raise RuntimeError(text)


def _discard(awaitable: object) -> None:
    """Drop a coroutine (close) or a future (cancel) without a warning that nobody awaited it."""
    for method in ("close", "cancel"):
        if hasattr(awaitable, method):
            getattr(awaitable, method)()
            return


_HAS_PRIVATE_ACCEPT = hasattr(socket.socket, "_accept")


def _accepter(sock: socket.socket) -> Callable[[], tuple[socket.socket, Any]]:
    """Return a function that accepts one: an exact ``socket.socket``, non-blocking and close-on-exec."""
    if not _HAS_PRIVATE_ACCEPT:
        return lambda: _unblocked(*sock.accept())
    # accept() spends two microseconds in the IntEnum properties family and type; _accept() is the
    # accept4(SOCK_CLOEXEC) beneath it, and the only private name of the standard library that we use.
    accept = sock._accept  # type: ignore[attr-defined]  # noqa: SLF001 - probed above, accept() else
    family, proto = sock.family.value, sock.proto
    # SOCK_NONBLOCK is for the constructor: without it, socket.setdefaulttimeout() would cost one more ioctl.
    kind = sock.type.value | socket.SOCK_NONBLOCK

    def accept_one() -> tuple[socket.socket, Any]:
        fd, address = accept()
        return _unblocked(socket.socket(family, kind, proto, fd), address)

    return accept_one


def _unblocked(connection: socket.socket, address: object) -> tuple[socket.socket, Any]:
    connection.setblocking(False)
    return connection, address
