"""The listeners of a service: armed together, paused together, given up together."""

from __future__ import annotations

import contextlib
import select

from sdlisten.accepting import add_accept_handler
from sdlisten.listener import Origin

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable
    from typing import Any

    from sdlisten.accepting import AcceptHandle
    from sdlisten.listener import Listener

__all__ = ("Endpoint", "Endpoints")


class Endpoint:
    """A listener, what to do with its connections, and the handle to stop that.

    Args:
        listener: *Takes ownership*.
        accepted: Called with each connection and the peer's address.
    """

    __slots__ = ("accepted", "handle", "listener")

    def __init__(self, listener: Listener, accepted: Callable[[socket.socket, Any], None]) -> None:
        self.listener = listener
        self.accepted = accepted
        self.handle: AcceptHandle | None = None

    def close(self, *, accept_queued: bool) -> None:
        """Stop accepting, then drop our descriptor: in this order, epoll(7) outlives a close."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            if accept_queued and self.listener.origin is Origin.BOUND:
                self._accept_queued()
        self.listener.close()

    def _accept_queued(self) -> None:
        """Accept what waits in a queue that nobody else will look at: it ends with the socket."""
        with contextlib.suppress(OSError):  # TimeoutError: that was all
            for _ in range(self.listener.queued or 0):
                sock, peer = self.listener.accept(0)
                sock.setblocking(False)
                self.accepted(sock, peer)


class Endpoints:
    """All listeners of a service."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: list[Endpoint] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def activated(self) -> bool:
        """Whether the manager holds all of them, and starts us again for the next client."""
        return all(endpoint.listener.origin is Origin.ADOPTED for endpoint in self._all)

    @property
    def queued(self) -> int:
        """How many connections wait in our queues now, as far as the kernel tells."""
        return sum(endpoint.listener.queued or 0 for endpoint in self._all if endpoint.listener.fileno() >= 0)

    def add(self, endpoint: Endpoint) -> None:
        """Take one more in, not armed yet."""
        self._all.append(endpoint)

    def arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to accept on all.

        Raises:
            DescriptorError: One does not listen.
            ValueError: One is closed.
        """
        for endpoint in self._all:
            endpoint.handle = add_accept_handler(endpoint.listener, endpoint.accepted, loop)

    def pause(self, paused: bool) -> None:
        """Accept nothing for now, or go on."""
        for endpoint in self._all:
            if endpoint.handle is not None:
                (endpoint.handle.pause if paused else endpoint.handle.resume)()

    def somebody_waits(self) -> bool:
        """Return whether a connection waits to be accepted."""
        poller = select.poll()
        for endpoint in self._all:
            poller.register(endpoint.listener.fileno(), select.POLLIN)
        return bool(poller.poll(0))

    def close(self, *, accept_queued: bool) -> None:
        """Stop accepting on all for good.

        Args:
            accept_queued: Accept first what waits where nobody but us holds the socket.
        """
        for endpoint in self._all:
            endpoint.close(accept_queued=accept_queued)
