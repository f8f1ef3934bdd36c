"""The clients and the loop that drives them.

One thread over one selector, instead of asyncio or a thread for each client. On a core shared with the server
a request costs half of what it does in asyncio streams (13 instead of 25 µs of CPU on a kept connection,
60 instead of 134 µs on a new one), no other thread can delay a time stamp, and the loop can sleep precisely:
epoll_wait(2) counts in milliseconds, which would add half of one to every latency; select(2) counts in
microseconds, and an epoll or kqueue descriptor can be waited for like any other.
"""

from __future__ import annotations

import heapq
import math
import select
import selectors
import socket
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from sdlisten.address import (
    AbstractAddress,
    HostAddress,
    InetAddress,
    PortAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
)
from sdlisten.load.client import Client
from sdlisten.load.result import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdlisten.address import Address
    from sdlisten.load.result import Result

__all__ = ("RATES", "Engine", "Load")

# Requests per second of each mode. slow is a closed loop: that keeps every client where a restart can hit it.
RATES = {"short": 600.0, "slow": 0.0, "keep": 1200.0}

# Seconds within which stop(), the end and progress are noticed.
_TICK = 0.1
# Seconds between two calls of progress.
_PROGRESS = 1.0
_VMADDR_ANY, _VMADDR_LOCAL = 0xFFFFFFFF, 1


class Load:
    """A load that runs in the calling thread, once. It changes nothing in the process: no signal, no thread.

    It wants a process with fewer than 1,024 open descriptors (select(2)) and one that does little else:
    another thread that holds the GIL shows as `Result.lag`. `LoadProcess` has both.

    Args:
        address: An address word; see `sdlisten.address`. A port alone means 127.0.0.1, and of a host name the
            first address is taken.
        mode: ``short``, ``slow`` or ``keep``.
        clients: How many requests can be in flight at once, each on a connection of its own.
        rate: Requests per second of all clients together; 0: each asks again as soon as it is answered.
            None: what is usual for the mode (600, 0, 1200).
        timeout: Seconds after which a request that was begun has failed.
        delay: Seconds between connecting and sending, in mode ``slow``.

    Raises:
        AddressError: ``address`` is no address.
        OSError: The host name cannot be resolved.
        ValueError: Another argument makes no sense.
    """

    def __init__(
        self,
        address: str | int,
        *,
        mode: str = "short",
        clients: int = 24,
        rate: float | None = None,
        timeout: float = 10.0,
        delay: float = 0.2,
    ) -> None:
        if mode not in RATES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(RATES)}")
        if clients < 1:
            raise ValueError(f"clients is {clients}, expected at least 1")
        rate = RATES[mode] if rate is None else rate
        for name, seconds in {"rate": rate, "delay": delay, "timeout": timeout}.items():
            if not 0 <= seconds < math.inf or (name == "timeout" and not seconds):
                raise ValueError(
                    f"{name} is {seconds}, expected a number above 0, or 0 for a rate or a delay"
                )
        self.address = str(address)
        self.mode = mode
        self.clients = clients
        self.rate = rate
        self.timeout = timeout
        self.delay = delay if mode == "slow" else 0.0
        self.family, self.sockaddr = _endpoint(parse_address(address))
        last = b"" if mode == "keep" else b"Connection: close\r\n"
        self.request = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + last + b"\r\n"
        self._stops = 0

    def stop(self) -> None:
        """Make `run` return when the requests in flight have ended; called a second time, at once.

        Does not wait. Safe from signal handlers and other threads; noticed within a tenth of a second.
        """
        self._stops += 1

    def run(
        self,
        seconds: float | None = None,
        *,
        requests: int | None = None,
        progress: Callable[[Result], None] | None = None,
        started: Callable[[], None] | None = None,
    ) -> Result:
        """Run until `stop`, or until so many seconds have gone or so many requests were begun.

        Args:
            seconds: After which no request is begun any more; None: no limit.
            requests: How many are begun; None: no limit.
            progress: Called each second with what was counted so far.
            started: Called once, when there are as many good answers as clients.

        Raises:
            OSError: Too many open files.
        """
        engine = Engine(self, math.inf if requests is None else requests)
        end = math.inf if seconds is None else engine.start + seconds
        told = engine.start
        try:
            while True:
                now = time.monotonic()
                engine.settle(now)
                if self._stops or now >= end:
                    engine.limit = engine.begun
                engine.begin(now)
                if self._stops > 1 or (engine.begun >= engine.limit and not engine.active):
                    engine.tally.counts["abandoned"] += len(engine.active)
                    return engine.result(now)
                if started and engine.tally.counts["ok"] >= self.clients:
                    started()
                    started = None
                if progress and now - told >= _PROGRESS:
                    told = now
                    progress(engine.result(now))
                engine.sleep(now)
        finally:
            engine.close()


class Engine:
    """The state of one run: who is free, who has a request in flight, who waits for a moment."""

    def __init__(self, load: Load, limit: float) -> None:
        self.load = load
        self.limit = limit
        self.begun = 0
        self.tally = Tally(load.address, load.mode, load.clients, load.rate)
        self.selector = selectors.DefaultSelector()
        self.free: deque[Client] = deque()
        # In the order in which they began, which is that of their deadlines.
        self.active: OrderedDict[Client, None] = OrderedDict()
        self._moments: list[tuple[float, int]] = []
        self._clients = [Client(self, number) for number in range(load.clients)]
        self.start = time.monotonic()
        for client in self._clients:
            # A closed loop of slow requests would march in step.
            spread = 0.0 if load.rate else load.delay * client.number / load.clients
            self.wake(client, self.start + spread)

    def wake(self, client: Client, when: float) -> None:
        """Call ``client.awake`` at that moment, unless it is given another one before."""
        client.wake_at = when
        heapq.heappush(self._moments, (when, client.number))

    def settle(self, now: float) -> None:
        """Do what has become possible or due, except new requests."""
        for key, _ in self.selector.select(0):
            key.data.ready(key.fileobj, now)
        while self._moments and self._moments[0][0] <= now:
            when, number = heapq.heappop(self._moments)
            client = self._clients[number]
            if client.wake_at == when:
                self.tally.lag = max(self.tally.lag, now - when)
                client.awake(now)
        while self.active and self.oldest.deadline <= now:
            self.oldest.expire(now)

    def begin(self, now: float) -> None:
        """Begin the requests that are due, on clients that are free; each client at most once."""
        for _ in range(len(self.free)):
            planned = self._next_planned()
            if planned > now:
                break
            self.begun += 1
            client = self.free.popleft()
            self.tally.lag = max(self.tally.lag, now - max(planned, client.free_at))
            client.begin(planned, now)

    def sleep(self, now: float) -> None:
        """Wait until a socket is ready or something is due."""
        until = min(now + _TICK, self._next_planned())
        if self._moments:
            until = min(until, self._moments[0][0])
        if self.active:
            until = min(until, self.oldest.deadline)
        pause = until - time.monotonic()
        if pause > 0:
            select.select([self.selector], [], [], pause)

    @property
    def oldest(self) -> Client:
        """The client that began first of those that are active."""
        return next(iter(self.active))

    def result(self, now: float) -> Result:
        """Return what was counted so far."""
        return self.tally.result(now, now - self.start)

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            client.drop()
        self.selector.close()

    def _next_planned(self) -> float:
        """Return for when the next request is planned that a free client could take."""
        if not self.free or self.begun >= self.limit:
            return math.inf
        return self.start + self.begun / self.load.rate if self.load.rate else self.free[0].free_at


def _endpoint(address: Address) -> tuple[int, tuple[str | int | bytes, ...] | str | bytes]:
    """Return the family and the address to connect to.

    Raises:
        OSError: A host name or a scope is not known.
    """
    match address:
        case UnixAddress(path=path):
            return socket.AF_UNIX, path
        case AbstractAddress(name=name):
            return socket.AF_UNIX, b"\0" + name
        case VsockAddress(cid=cid, port=port):
            return socket.AF_VSOCK, (_VMADDR_LOCAL if cid == _VMADDR_ANY else cid, port)
        case InetAddress(host=host, port=port, scope=scope):
            # Every address (0.0.0.0, ::) means loopback where it is connected to.
            host = f"{host}%{scope}" if scope else host
        case HostAddress(host=host, port=port):
            pass
        case PortAddress(port=port):
            host = "127.0.0.1"
        case _:
            raise TypeError(f"{type(address).__name__} is nothing to connect to")
    family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, sockaddr
