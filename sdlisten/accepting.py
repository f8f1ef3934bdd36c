"""add_accept_handler(): hand every accepted connection to a callback, on the event loop.

What other accept loops do with the errors of accept(2): Tornado knows two and lets the rest escape into the
loop, which calls again at once (18,522 log records a second when descriptors run out). asyncio pauses for a
second on the four that mean "out of something". trio, whose reasoning this table follows, passes over what
concerns one connection and leaves the rest to its caller. Twisted keeps a descriptor in reserve to refuse
clients politely.

What this one does:

- Errors of one connection (`CONNECTION_ERRNOS`): the next one is accepted. Linux reports an error that
  waits on the new socket as an error of accept(); the listener is fine.
- Out of something (`CAPACITY_ERRNOS`), what nobody has heard of, and errors of one connection that never
  end: stop reading for a while, longer each time. The listener stays readable, so going on would be a busy
  loop; clients wait in the queue meanwhile.
- The listener is gone (`LISTENER_ERRNOS`): nothing will ever come; reported once, detached,
  `AcceptHandle.error`.

One wake-up of the loop accepts one connection, delivers it, and asks poll(2) whether more wait: half a
microsecond, where a last accept4() that fails costs five (it makes a socket before it looks at the queue).
Only if there are more does it go on, at most ``burst`` of them, because other callbacks of the loop want
their turn.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import select
import socket
import sys
import time
import warnings
import weakref
from types import MappingProxyType
from typing import cast

from sdlisten.descriptor import Kind, describe
from sdlisten.errors import DescriptorError
from sdlisten.listener import SHUT_DOWN, Listener, Origin, SharedSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any

__all__ = ("CAPACITY_ERRNOS", "CONNECTION_ERRNOS", "LISTENER_ERRNOS", "AcceptHandle", "add_accept_handler")

_logger = logging.getLogger("sdlisten.accepting")

CONNECTION_ERRNOS = MappingProxyType(
    {
        errno.ECONNABORTED: "the client was gone before we came: reset while it waited in the queue",
        errno.EPROTO: "the same on other systems (System V); Linux: a protocol error of this connection",
        errno.EPERM: "a firewall rule or a security module forbids this client",
        # What was already pending on the new socket, accept(2) "Error handling":
        errno.ETIMEDOUT: "the client stopped answering",
        errno.ENETDOWN: "the network towards the client is down",
        errno.ENETUNREACH: "no route to the network of the client",
        errno.EHOSTDOWN: "the host of the client is down",
        errno.EHOSTUNREACH: "no route to the host of the client",
        errno.ENOPROTOOPT: "a router said that the client's host does not speak the protocol",
        getattr(
            errno, "ENONET", errno.EHOSTDOWN
        ): "the host of the client is not on the network",  # Linux only
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

_REASONS = {**CONNECTION_ERRNOS, **CAPACITY_ERRNOS, **LISTENER_ERRNOS}

_FIRST_REST = 0.05  # seconds, doubled each time up to
_LONGEST_REST = 1.0
_REPORT_INTERVAL = 10.0  # seconds between two log lines about resting
# Errors of connections in a row. More is no row of unlucky clients: a seccomp filter answers accept4() with
# EPERM (systemd's SystemCallFilter=) and leaves the connection in the queue.
_MOST_PASSED_OVER = 100

_attached: weakref.WeakValueDictionary[tuple[int, int], AcceptHandle] = weakref.WeakValueDictionary()


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
            because epoll(7) goes on reporting a closed descriptor whose socket another process holds. Make
            a Listener of what a manager passed: of a bare socket nobody else is expected to change flags.
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
        RuntimeError: There is no event loop to attach to, or it is closed.
        TypeError: The callback is a coroutine function, the loop cannot watch descriptors, or the socket is
            of a class that accepts in its own way, such as ``ssl.SSLSocket``.
        ValueError: ``burst`` is less than 1, the listener is closed, or has a handler on this loop already.
        OSError: The socket is closed, or the loop refuses to watch one more.
    """
    if burst < 1:
        raise ValueError(f"burst={burst}: expected how many connections to accept per wake-up, 1 or more")
    if inspect.iscoroutinefunction(callback):
        raise TypeError(f"{callback!r} is a coroutine function, which nobody would await: start a task in it")
    bare = sock.socket if isinstance(sock, Listener) else sock
    if type(bare).accept is not socket.socket.accept:
        raise TypeError(f"{type(bare).__name__} has an accept() of its own, which would be passed by")
    found = describe(bare.fileno())
    if found.kind is not Kind.LISTENER:
        text = f"fd {found.fd} {found} does not listen: call listen() on it before add_accept_handler()"
        raise DescriptorError(text, fd=found.fd)
    loop = _event_loop(io_loop)
    key = id(loop), found.fd
    if key in _attached:  # a loop has one reader per descriptor: a second would silently replace the first
        raise ValueError(f"{_attached[key]!r} accepts on fd {found.fd} already: remove it first")
    handle = _attached[key] = AcceptHandle(sock, bare, callback, loop, burst)
    return handle


class AcceptHandle:
    """An attached accept handler; calling it is `remove`.

    Use it on the loop's own thread only.

    Attributes:
        error: Why the handler detached itself (one of `LISTENER_ERRNOS`); None otherwise.
    """

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
        self._sock = bare
        self._fd = bare.fileno()
        found = describe(self._fd)
        self._where = str(found)
        self._callback = callback
        self._loop = loop
        self._pid = os.getpid()
        self._burst = burst
        self._accept = _accepter(bare)
        # What every connection is, too. Asked of the kernel, because sock.proto is mostly 0, and asyncio sets
        # TCP_NODELAY only on a socket that says IPPROTO_TCP.
        self._family, self._type, self._proto = found.family, found.type, found.proto
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN | SHUT_DOWN)
        self._reading = self._paused = self._removed = False
        self._failures = 0  # in a row
        self._rest = 0.0
        self._rest_timer: asyncio.TimerHandle | None = None
        self._resting_since = 0.0
        self._reported = False
        self._report_after = 0.0
        self._watch()
        bare.setblocking(False)
        if self._listener is not None:
            self._listener.before_release.append(self.remove)

    def __repr__(self) -> str:
        state = "removed" if self._removed else "paused" if self._paused else "attached"
        return f"<AcceptHandle {self._where} {state}>"

    def remove(self) -> None:
        """Stop accepting for good; the callback is not called again, not even in the burst under way.

        The listener stays open and its queue fills. Harmless twice, from inside the callback, and after the
        loop was closed.
        """
        if self._removed:
            return
        self._removed = True
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        self._watch()
        _attached.pop((id(self._loop), self._fd), None)
        if self._listener is not None and self.remove in self._listener.before_release:
            self._listener.before_release.remove(self.remove)

    __call__ = remove

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
        if reading == self._reading or self._loop.is_closed():
            return
        self._reading = reading
        if os.getpid() != self._pid and self._loop.is_running() and _running_loop() is not self._loop:
            return  # we are a child forked out of the loop; epoll(7) is shared, and the parent needs it
        if reading:
            self._loop.add_reader(self._fd, self._on_readable)
        else:
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:  # noqa: C901 - the hot path: a call costs as much as all the branches
        accept, callback, shared, poll = self._accept, self._callback, self._shared, self._poll.poll
        family, kind, proto = self._family, self._type, self._proto
        for turn in range(self._burst):
            if not self._reading:  # removed, paused or resting by now
                return
            # Once there are more, the last accept() of a burst may fail, which is cheap among many. Not on a
            # shared listener: if O_NONBLOCK were cleared meanwhile, that accept() would block the loop.
            if turn and (turn == 1 or shared) and not poll(0):
                return
            try:
                if shared and turn == 0:
                    self._sock.setblocking(False)
                fd, address = accept()
            except BlockingIOError:
                self._nobody_there()
                return
            except OSError as error:
                self._failed(error)
                continue
            if self._failures:
                self._recovered()
            connection = socket.socket(family, kind, proto, fd)
            try:
                connection.setblocking(False)
                result = callback(connection, address)
                if result is not None:
                    self._refuse_awaitable(result)
            except Exception as error:  # noqa: BLE001 - reported; one client's trouble is not the others'
                self._lose(connection, error)
            except BaseException:
                connection.close()
                raise

    def _refuse_awaitable(self, result: object) -> None:
        if hasattr(result, "__await__"):
            # A coroutine that is closed, or a future that is cancelled, does not warn that nobody awaited it.
            drop = getattr(result, "close", None) or getattr(result, "cancel", None)
            if drop is not None:
                drop()
            raise TypeError(f"{self._callback!r} returned an awaitable, and nobody would await it")

    def _lose(self, connection: socket.socket, error: Exception) -> None:
        connection.close()
        message = f"the accept callback of {self._where} raised"
        self._loop.call_exception_handler({"message": message, "exception": error, "socket": connection})

    def _nobody_there(self) -> None:
        self._recovered()  # accept4() takes a free descriptor before it looks at the queue: there is one
        # Another holder of the listener was faster. Or it does not listen any more: after a shutdown() a
        # non-blocking accept4() on a unix socket says EAGAIN for ever, and the loop that it is readable.
        # (unix_accept() in Linux's af_unix.c: the wait that would find out, EINVAL, is skipped.)
        if any(events & SHUT_DOWN for _, events in self._poll.poll(0)):
            self._detach(OSError(errno.EINVAL, os.strerror(errno.EINVAL)))

    def _failed(self, error: OSError) -> None:
        self._failures += 1
        if error.errno in LISTENER_ERRNOS:
            self._detach(error)
        elif error.errno not in CONNECTION_ERRNOS or self._failures > _MOST_PASSED_OVER:
            self._take_a_rest(error)

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
            why = _REASONS.get(error.errno or 0, "not an error that accept(2) documents")
            _logger.warning("cannot accept on %s, clients wait: %s (%s)", self._where, error, why)

    def _wake(self) -> None:
        self._rest_timer = None
        self._watch()

    def _recovered(self) -> None:
        self._failures = 0
        self._rest = 0.0
        if self._reported:
            self._reported = False
            seconds = time.monotonic() - self._resting_since
            _logger.warning("accepting on %s again after %.1f s", self._where, seconds)

    def _detach(self, error: OSError) -> None:
        self.error = error
        self.remove()
        why = _REASONS[error.errno or 0]
        _logger.error("detached from %s, it will never accept again: %s (%s)", self._where, error, why)


def _event_loop(io_loop: object) -> asyncio.AbstractEventLoop:
    given = _running_loop() or _tornados_loop() if io_loop is None else io_loop
    if given is None:
        raise RuntimeError("no event loop: call add_accept_handler() from a running one, or give it io_loop=")
    loop: object = getattr(given, "asyncio_loop", given)  # a Tornado IOLoop runs on one
    if not hasattr(loop, "add_reader"):
        raise TypeError(
            f"io_loop={io_loop!r}: expected an asyncio loop with add_reader() or a Tornado IOLoop"
        )
    found = cast("asyncio.AbstractEventLoop", loop)
    if found.is_closed():
        raise RuntimeError(f"io_loop={io_loop!r}: {found} is closed")
    return found


def _running_loop() -> object:
    # Who has a loop has imported its module: we import none for those who have not.
    if "asyncio" in sys.modules:
        with contextlib.suppress(RuntimeError):
            return sys.modules["asyncio"].get_running_loop()
    return None


def _tornados_loop() -> object:
    # Where there is none, IOLoop.current() has asyncio make one, up to Python 3.13, that nobody would run or
    # close. 3.12 and 3.13 warn before they do: as an error, the warning is the answer.
    tornado = sys.modules.get("tornado.ioloop")
    if tornado is not None:
        with warnings.catch_warnings(), contextlib.suppress(DeprecationWarning):
            warnings.simplefilter("error", DeprecationWarning)
            return tornado.IOLoop.current(instance=False)
    return None


_HAS_PRIVATE_ACCEPT = hasattr(socket.socket, "_accept")


def _accepter(sock: socket.socket) -> Callable[[], tuple[int, Any]]:
    """Return a function that accepts one connection and returns its descriptor, close-on-exec, and address.

    That is ``socket._accept``, the only private name of the standard library that we use: accept() spends two
    microseconds more, in the properties family and type.
    """
    if _HAS_PRIVATE_ACCEPT:
        return sock._accept  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001 - probed, accept() else

    def accept() -> tuple[int, Any]:
        connection, address = sock.accept()
        return connection.detach(), address

    return accept
