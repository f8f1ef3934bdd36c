"""The sockets that a supervisor holds: bound, adopted by address or name, or passed on as they came."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from sdlisten.activation import listen_fds
from sdlisten.address import parse_named_address
from sdlisten.adopt_or_bind import listen
from sdlisten.descriptor import describe, listen_queue
from sdlisten.errors import NotActivatedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from sdlisten.inherited import InheritedFd
    from sdlisten.listener import Listener

__all__ = ("Sockets",)


class Sockets:
    """What every generation gets; it owns the descriptors until `close`.

    Attributes:
        descriptors: In order, each with its name, for `sdlisten.spawn.spawn`; *borrowed*.
    """

    __slots__ = ("_as_it_was", "_listeners", "_passed", "descriptors")

    def __init__(self, listeners: Iterable[Listener] = (), passed: Iterable[InheritedFd] = ()) -> None:
        """Take ownership; `obtain` is the way in."""
        self._listeners = tuple(listeners)
        self._passed = tuple(passed)
        self.descriptors: Sequence[tuple[int, str]] = [
            *((listener.fileno(), listener.name or "unknown") for listener in self._listeners),
            *((inherited.fd, _name_on_the_way(inherited)) for inherited in self._passed),
        ]

        queues = {fd: listen_queue(fd) for fd, _ in self.descriptors}
        self._as_it_was: dict[int, tuple[Any, int]] = {
            fd: (describe(fd).sockname, queue[1]) for fd, queue in queues.items() if queue
        }

    @property
    def listening(self) -> list[int]:
        """Those that listen, and that can be watched for not doing so any more; *borrowed*."""
        return list(self._as_it_was)

    def listen_again(self, fd: int) -> None:
        """Undo the shutdown(2) by some worker, which ends a listener for all who hold it.

        Raises:
            OSError: It cannot be undone: a unix socket stays shut down.
        """
        sockname, backlog = self._as_it_was[fd]
        with contextlib.closing(socket.socket(fileno=os.dup(fd))) as sock:
            with contextlib.suppress(OSError):  # EINVAL: it still has its port, unless that was bound as 0
                sock.bind(sockname)
            sock.listen(backlog)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or sock.family == socket.AF_UNIX:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    @classmethod
    def obtain(cls, words: Sequence[str]) -> Sockets:
        """Adopt or bind what the words say; without words take everything that was passed.

        Raises:
            AddressError: A word is no address.
            ActivationError: What was passed does not fit, or there is nothing.
            OSError: An address cannot be bound; notes say what to do about it.
        """
        if not words:
            passed = listen_fds()
            if not passed:
                raise NotActivatedError(
                    "no sockets were passed, and there is no -l to bind one; see sdlisten run --help"
                )
            return cls(passed=passed)
        wanted = [parse_named_address(word) for word in words]
        listeners: list[Listener] = []
        try:
            for name, address in wanted:
                listeners += listen(str(address), name=name)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return cls(listeners)

    def set_blocking(self, blocking: bool) -> None:
        """Let accept(2) wait, as systemd does by default, or not; it is so for all who hold the sockets."""
        for fd, _ in self.descriptors:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.set_blocking(fd, blocking)

    def status(self) -> list[dict[str, object]]:
        """Describe each, and how full the queues of the listeners are, for ``sdlisten ctl status``."""
        return [_describe(fd, name) for fd, name in self.descriptors]

    def close(self) -> None:
        """Close all, and remove the unix paths that we bound; harmless twice."""
        for listener in self._listeners:
            listener.close()
        passed, self._passed = self._passed, ()
        for inherited in passed:
            os.close(inherited.fd)
        self.descriptors = ()
        self._as_it_was = {}


def _name_on_the_way(inherited: InheritedFd) -> str:
    """Return the name that the manager gave: what its store keeps for `Notifier.store` has a prefix."""
    name = inherited.name
    stored = inherited.stored and name != "stored" and not name.startswith("sdlisten.")
    return f"sdlisten.f.{name}" if stored else name


def _describe(fd: int, name: str) -> dict[str, object]:
    found = describe(fd)
    queue = listen_queue(fd) or (None, None)
    return {
        "name": name,
        "address": str(found),
        "kind": found.kind.value,
        "queued": queue[0],
        "backlog": queue[1],
    }
