"""`Service`: one daemon from its first listener to its clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from sdlisten.listener import Listener
from sdlisten.notifier import Notifier, watchdog_timeout
from sdlisten.service.drain import drain
from sdlisten.service.endpoints import Endpoint, Endpoints
from sdlisten.service.protocol import ProtocolConnection
from sdlisten.service.report import Counters, DrainReport, Outcome
from sdlisten.service.rules import Rules
from sdlisten.service.served import ServedConnection
from sdlisten.service.table import Table
from sdlisten.service.upkeep import Lifeline, Reloads, Watchdog, forget_untaken

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable
    from ssl import SSLContext
    from typing import Any

    from sdlisten.service.connection import Connection
    from sdlisten.service.upkeep import Health, OnReload

__all__ = ("Service",)

_logger = logging.getLogger("sdlisten.service")


class Service:
    """A daemon on asyncio (or uvloop): accepts, tells the manager, reloads, drains, ends.

    It lives once: `start`, `stop`, and it is over. `sdlisten.serve` makes one, with signal handlers.

    What an earlier program stored with the manager (`Notifier.store`, `Notifier.store_state`) and nobody has
    taken when the service is ready is closed, and removed from the manager's store.

    Args:
        drain_timeout: Seconds from the order to stop until what is left is dropped. Keep it below the
            manager's patience: ``docker stop`` kills after 10 s; systemd is asked for as long as it takes.
        fresh_timeout: While draining, a connection on which nothing ever came is closed when it is so many
            seconds old.
        idle_timeout: While draining, a connection is closed when its client has been silent for so many
            seconds since its last answer; silence before the drain counts.
        exit_on_idle: Stop when there was no connection for so many seconds. Only if every listener was
            adopted: the manager then starts us again for the next client. None: never.
        max_connections: Accept no more while there are so many; clients wait in the listener's queue.
        on_reload: Called for `reload`; may return an awaitable. If it raises, the old configuration is
            expected to be in force still, and the manager is told what went wrong.
        on_drain: Called with each connection that has a request in progress when the drain begins: to tell
            a WebSocket or an event stream to end. May return an awaitable.
        health: Asked before each ping of the watchdog; may return an awaitable. True or None: alive. False,
            an error, or no answer yet: no ping. "trigger": the manager is to act now.
        notifier: The line to the manager; that of the process if None.

    Raises:
        ValueError: A number is negative, or ``max_connections`` is 0.
    """

    def __init__(
        self,
        *,
        drain_timeout: float = 8.0,
        fresh_timeout: float = 5.0,
        idle_timeout: float = 2.0,
        exit_on_idle: float | None = None,
        max_connections: int | None = None,
        on_reload: OnReload | None = None,
        on_drain: Callable[[Connection], object] | None = None,
        health: Health | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        if exit_on_idle is not None and exit_on_idle < 0:
            raise ValueError(f"exit_on_idle={exit_on_idle}: expected seconds, or None")
        if max_connections is not None and max_connections < 1:
            raise ValueError(f"max_connections={max_connections}: expected 1 or more, or None")
        self._rules = Rules(
            drain_timeout=drain_timeout, fresh_timeout=fresh_timeout, idle_timeout=idle_timeout
        )
        self._table = Table(self._changed)
        self._exit_on_idle = exit_on_idle
        self._idle_timer: asyncio.TimerHandle | None = None
        self._max_connections = max_connections
        self._full = False
        self._on_drain = on_drain
        self._notifier = Notifier.from_environ() if notifier is None else notifier
        self._watchdog = Watchdog(self._notifier, watchdog_timeout(), health)
        self._reloads = Reloads(self._notifier, on_reload)
        self._lifeline = Lifeline(self.stop)
        self._endpoints = Endpoints()
        self._passed: _Passed | None = None
        self._orders: deque[str] = deque()
        self._loop = _loop_of_this_thread()
        self._over: asyncio.Future[DrainReport] | None = None
        self._drain_task: asyncio.Task[None] | None = None

    @property
    def draining(self) -> bool:
        """Whether an order to stop has come."""
        return self._rules.draining

    @property
    def counters(self) -> Counters:
        """What was counted so far."""
        ended = self._table.ended
        return Counters(
            accepted=self._table.accepted,
            active=len(self._table),
            errors=self._table.errors,
            queued=self._endpoints.queued,
            **{outcome.value: ended[outcome] for outcome in Outcome},
        )

    def attach(
        self,
        listeners: Listener | Iterable[Listener],
        handler: Callable[[Connection], Awaitable[object]],
        *,
        ssl: SSLContext | None = None,
    ) -> None:
        """Serve what is accepted there with a coroutine function, a task for each connection.

        Args:
            listeners: *Takes ownership*: they are closed when the service stops accepting.
            handler: Called with each `Connection`, which is closed when it returns. What it raises is
                logged, and does not disturb the others.
            ssl: Serve TLS. The handler is called after the handshake.

        Raises:
            RuntimeError: The service has been started.
        """

        def serve(listener: Listener) -> Callable[[socket.socket, Any], None]:
            return lambda sock, peer: ServedConnection(sock, peer, listener, self._rules, self._table).start(
                handler, ssl
            )

        self._attach(listeners, serve)

    def attach_protocol(
        self,
        listeners: Listener | Iterable[Listener],
        factory: Callable[[], asyncio.BaseProtocol],
        *,
        ssl: SSLContext | None = None,
    ) -> None:
        """Serve what is accepted there with protocols, as ``loop.create_server`` does.

        Args:
            listeners: *Takes ownership*: they are closed when the service stops accepting.
            factory: Makes a protocol for each connection. One that has a method ``start_draining`` is told
                so when the drain begins; it should then close its transport as soon as it owes nothing.
            ssl: Serve TLS.

        Raises:
            RuntimeError: The service has been started.
        """

        def serve(_listener: Listener) -> Callable[[socket.socket, Any], None]:
            return lambda sock, _peer: ProtocolConnection(sock, self._rules, self._table).start(factory, ssl)

        self._attach(listeners, serve)

    def attach_connection(
        self,
        sock: socket.socket,
        handler: Callable[[Connection], Awaitable[object]],
        *,
        ssl: SSLContext | None = None,
    ) -> None:
        """Serve one connection that was passed (``Accept=yes``), and stop when it has ended.

        Args:
            sock: *Takes ownership*; made non-blocking and close-on-exec.
            handler: As for `attach`.
            ssl: Serve TLS.

        Raises:
            RuntimeError: The service has been started.
        """
        self._check_not_started()
        sock.setblocking(False)
        sock.set_inheritable(False)
        self._passed = _Passed(sock, handler, ssl)

    def start(self) -> None:
        """Begin to accept and say READY=1, soon: in the loop of the thread that made this object, or runs.

        `serve` does it too. Once is enough. What goes wrong, `serve` raises.

        Raises:
            RuntimeError: No event loop is known yet.
        """
        loop = self._loop or asyncio.get_running_loop()
        loop.call_soon_threadsafe(self._start, loop)

    def stop(self) -> None:
        """Order the drain. Again a second or more later: shorten what is left to a tenth, at least 1 s."""
        self._order("stop")

    def reload(self) -> None:
        """Order a reload; after the one that is under way, if there is one."""
        self._order("reload")

    async def serve(self) -> DrainReport:
        """Run until `stop`, or until idle for long enough, and to the end of the drain.

        If it is cancelled, everything is closed at once.

        Raises:
            RuntimeError: Nothing is attached.
            DescriptorError: A listener does not listen.
            OSError: A listener is closed.
            Exception: The drain failed, which is a defect; the connections are closed.
        """
        self._start(asyncio.get_running_loop())
        assert self._over is not None  # noqa: S101 - made by _start
        try:
            return await asyncio.shield(self._over)
        except asyncio.CancelledError:
            self._abandon()
            raise

    def _attach(
        self,
        listeners: Listener | Iterable[Listener],
        serve: Callable[[Listener], Callable[[socket.socket, Any], None]],
    ) -> None:
        self._check_not_started()
        for listener in (listeners,) if isinstance(listeners, Listener) else listeners:
            self._endpoints.add(Endpoint(listener, serve(listener)))

    def _check_not_started(self) -> None:
        if self._over is not None:
            raise RuntimeError("attach before start() or serve()")

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._over is not None:
            return
        self._loop = loop
        self._over = loop.create_future()
        try:
            if not (self._endpoints or self._passed):
                raise RuntimeError("attach a listener and its handler before serve()")  # noqa: TRY301
            if "stop" not in self._orders:
                self._begin(loop)
        except Exception as error:  # noqa: BLE001 - serve() raises it
            self._stop_accepting(accept_queued=False)
            self._over.set_exception(error)
        self._obey()

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._endpoints.arm(loop)
        if self._passed is not None:
            one = ServedConnection(self._passed.sock, self._passed.peer, None, self._rules, self._table)
            one.start(self._passed.handler, self._passed.ssl)
        # Only now: whoever waits for READY=1 connects at once.
        self._notifier.ready()
        forget_untaken(self._notifier)
        self._watchdog.start()
        self._lifeline.start()
        self._changed()

    def _order(self, what: str) -> None:
        # In this order, and looked for after the loop is known in _start: an order is never lost. Appending
        # and call_soon_threadsafe() are all that a signal handler may do in the middle of anything.
        self._orders.append(what)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: all is over
                self._loop.call_soon_threadsafe(self._obey)

    def _obey(self) -> None:
        while self._over is not None and self._orders:
            if self._over.done():
                self._orders.clear()
            elif self._orders.popleft() == "stop":
                self._stop()
            elif not self.draining:
                self._reloads.order()

    def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._rules.order(loop.time()):
            self._reloads.stop()
            self._notifier.stopping()
            self._stop_accepting(accept_queued=not self._full)
            self._drain_task = loop.create_task(self._drain())

    async def _drain(self) -> None:
        assert self._over is not None  # noqa: S101 - made by _start
        try:
            self._over.set_result(await drain(self._table, self._rules, self._notifier, self._on_drain))
        except asyncio.CancelledError:
            self._over.cancel()  # else serve() would wait for ever, where it was not cancelled itself
            raise
        except Exception as error:  # noqa: BLE001 - serve() raises it
            self._over.set_exception(error)
            for entry in self._table:
                entry.drop()
        finally:
            self._watchdog.stop()

    def _stop_accepting(self, *, accept_queued: bool) -> None:
        self._lifeline.stop()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._endpoints.close(accept_queued=accept_queued)
        if self._passed is not None and not self._table.accepted:
            self._passed.sock.close()

    def _abandon(self) -> None:
        if self._over is not None:
            self._over.cancel()
        self._reloads.stop()
        self._watchdog.stop()
        self._stop_accepting(accept_queued=False)
        if self._drain_task is not None:
            self._drain_task.cancel()
        for entry in self._table:
            entry.drop()

    def _changed(self) -> None:
        """Take note that a connection has come or gone."""
        if self.draining:
            return
        number = len(self._table)
        if self._max_connections is not None and (number >= self._max_connections) != self._full:
            self._full = not self._full
            self._endpoints.pause(self._full)
        if not number and self._passed is not None:
            self.stop()
        elif self._exit_on_idle is not None:
            self._watch_idleness(idle=not number)

    def _watch_idleness(self, *, idle: bool) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        # Whoever binds for himself is not started again by a client.
        if idle and self._endpoints.activated and self._loop and self._exit_on_idle is not None:
            self._idle_timer = self._loop.call_later(self._exit_on_idle, self._idle_over)

    def _idle_over(self) -> None:
        # Who comes before this look is served by us, who comes after it waits in the queue of the manager's
        # socket, which starts us again.
        self._endpoints.pause(True)
        if self._endpoints.somebody_waits():
            self._endpoints.pause(False)
            self._watch_idleness(idle=True)
        else:
            _logger.info("idle for %g s: stopping", self._exit_on_idle)
            self._stop()


class _Passed:
    """One connection that was passed, and what is to serve it."""

    __slots__ = ("handler", "peer", "sock", "ssl")

    def __init__(
        self,
        sock: socket.socket,
        handler: Callable[[Connection], Awaitable[object]],
        ssl: SSLContext | None,
    ) -> None:
        self.sock = sock
        self.handler = handler
        self.ssl = ssl
        try:
            self.peer: object = sock.getpeername()
        except OSError:
            self.peer = None  # the client has left already


def _loop_of_this_thread() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
