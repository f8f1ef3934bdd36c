"""The descriptor store for the children: what FDSTORE=1 gave us is passed to each worker that starts later.

The rules are those of systemd (src/core/service.c): a name that is none becomes "stored", a descriptor that
is there already is not stored again, all of a name leave together, and without FDPOLL=0 what is hung up
leaves by itself.
"""

from __future__ import annotations

import os

from sdlisten.errors import MessageError
from sdlisten.message import check_fdname

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdlisten.supervisor.loop import Loop

__all__ = ("STORE_MAX", "Store")

STORE_MAX = 1000
"""Descriptors at most: the next worker must hold them all, and 1024 is what it may open by default."""

_DEFAULT_NAME = "stored"


class Store:
    """Descriptors kept over generations; it owns them until `close`."""

    __slots__ = ("_kept", "_loop")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._kept: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def descriptors(self) -> list[tuple[int, str]]:
        """All of them with their names, for `sdlisten.spawn.spawn`; *borrowed*."""
        return list(self._kept.items())

    def heed(self, fields: Mapping[str, str], fds: Sequence[int]) -> None:
        """Do what a message says of the store.

        Args:
            fields: The message.
            fds: What came with it; *taken over*.
        """
        name = fields.get("FDNAME", _DEFAULT_NAME)
        try:
            check_fdname(name)
        except MessageError:
            name = _DEFAULT_NAME
        if fields.get("FDSTOREREMOVE") == "1":
            if "FDNAME" in fields:
                self._remove_all(name)
        elif fields.get("FDSTORE") == "1":
            while fds and len(self) < STORE_MAX:
                self._keep(fds[0], name, poll=fields.get("FDPOLL") != "0")
                fds = fds[1:]
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        """Close all; harmless twice."""
        for fd in list(self._kept):
            self._remove(fd)

    def _keep(self, fd: int, name: str, *, poll: bool) -> None:
        if any(os.path.sameopenfile(fd, kept) for kept in self._kept):
            os.close(fd)
            return
        self._kept[fd] = name
        if poll:
            self._loop.watch(fd, lambda _events: self._remove(fd), 0)

    def _remove_all(self, name: str) -> None:
        for fd in [fd for fd, its_name in self._kept.items() if its_name == name]:
            self._remove(fd)

    def _remove(self, fd: int) -> None:
        del self._kept[fd]
        self._loop.forget(fd)
        os.close(fd)
