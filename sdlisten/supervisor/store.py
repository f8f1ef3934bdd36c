"""The descriptor store for the children: what FDSTORE=1 gave us is passed to each worker that starts later.

The rules are those of systemd (src/core/service.c): a name that is none becomes "stored", a descriptor that
is there already is not stored again, all of a name leave together, and without FDPOLL=0 what is hung up
leaves by itself.
"""

from __future__ import annotations

import fcntl
import os
import resource
import stat

from sdlisten.errors import MessageError
from sdlisten.message import check_fdname
from sdlisten.receiver import close_received

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdlisten.supervisor.loop import Loop

__all__ = ("STORE_MAX", "Store", "store_max")

STORE_MAX = 1000
"""Descriptors at most, whatever the limits: each of them is looked at for each start."""

# LISTEN_FDNAMES is one string of execve(2), 128 KiB at most (MAX_ARG_STRLEN); half is left to the sockets.
_NAMES_MAX = 64 * 1024
_DEFAULT_NAME = "stored"
_F_DUPFD_QUERY = 1027  # linux/fcntl.h, F_LINUX_SPECIFIC_BASE + 3; the fcntl module has it from 3.14 on


def store_max() -> int:
    """Return how many descriptors can be kept and still be passed to a worker.

    `sdlisten.spawn` needs two numbers for each. A quarter of RLIMIT_NOFILE is left to the sockets and to what
    each worker costs: three numbers.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(STORE_MAX, soft * 3 // 4 // 2)


class Store:
    """Descriptors kept over generations; it owns them until `close`.

    Attributes:
        limit: How many at most: `store_max` when it was made.
    """

    __slots__ = ("_files", "_kept", "_loop", "_names_size", "limit")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.limit = store_max()
        self._kept: dict[int, tuple[str, tuple[int, int]]] = {}
        self._files: dict[tuple[int, int], list[int]] = {}
        self._names_size = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def descriptors(self) -> list[tuple[int, str]]:
        """All of them with their names, for `sdlisten.spawn.spawn`; *borrowed*."""
        return [(fd, name) for fd, (name, _) in self._kept.items()]

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
            poll = fields.get("FDPOLL") != "0"
            fds = [fd for fd in fds if not self._keep(fd, name, poll=poll)]
        close_received(fds)

    def close(self) -> None:
        """Close all; harmless twice."""
        for fd in list(self._kept):
            self._remove(fd)

    def _keep(self, fd: int, name: str, *, poll: bool) -> bool:
        """Take a descriptor over, or return False."""
        size = len(name) + 1  # and the colon
        if len(self) >= self.limit or self._names_size + size > _NAMES_MAX:
            return False
        try:
            status = os.fstat(fd)
        except OSError:  # of a file on a network
            return False
        file = status.st_dev, status.st_ino
        if any(_is_same(fd, kept, status.st_mode) for kept in self._files.get(file, ())):
            return False
        self._kept[fd] = name, file
        self._files.setdefault(file, []).append(fd)
        self._names_size += size
        if poll:
            self._loop.watch(fd, lambda _events: self._remove(fd), 0)
        return True

    def _remove_all(self, name: str) -> None:
        for fd in [fd for fd, its_name in self.descriptors if its_name == name]:
            self._remove(fd)

    def _remove(self, fd: int) -> None:
        name, file = self._kept.pop(fd)
        self._files[file].remove(fd)
        if not self._files[file]:
            del self._files[file]
        self._names_size -= len(name) + 1
        self._loop.forget(fd)
        close_received((fd,))


def _is_same(fd: int, kept: int, mode: int) -> bool:
    """Tell whether two descriptors with the same inode are one open file.

    Both ends of a pipe have one inode, and all eventfds have. systemd asks kcmp(2), which Python lacks.
    """
    try:
        return bool(fcntl.fcntl(fd, _F_DUPFD_QUERY, kept))
    except OSError:
        # Before Linux 6.10. A socket cannot be opened twice; of all else both are kept.
        return stat.S_ISSOCK(mode)
