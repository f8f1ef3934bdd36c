"""The descriptor store of a manager: what fits, and to know for certain what is kept.

systemd says nothing to an ``FDSTORE=1`` that it refuses: the store may be full, be absent
(FileDescriptorStoreMax= is 0), or be closed to the sender (NotifyAccess=), and a barrier is answered all the
same. See sd_notify(3) and systemd's FILE_DESCRIPTOR_STORE.
"""

from __future__ import annotations

import os
import select
import socket
import time

from sdlisten.errors import BarrierTimeoutError, MessageError, NotifyError, StoreRefusedError
from sdlisten.message import FDS_MAX, assignment, encode_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sdlisten.manager import Manager

__all__ = ("passable", "store", "store_confirmed", "store_message")

_CANARY = "sdlisten.canary"
_CANARIES = 100  # at a time: twice as many descriptors are open meanwhile
# The next start must hold all that is stored; where nobody raised it the soft limit of open files is 1024.
_STORE_MAX = 1000
# LISTEN_FDNAMES is one string of execve(2), 128 KiB at most (MAX_ARG_STRLEN); half is left to the sockets.
_STORED_NAMES_MAX = 64 * 1024
_REFUSAL = (
    0.1  # seconds after a barrier by which a manager has closed what it refused: it does so on the side
)
_CONFIRMATION = 2.0  # seconds to wait for a silent manager, once: see Manager.synchronise


def passable(stored_name: str) -> int:
    """Return how many descriptors of one name can be passed to a start; with more there is none."""
    return min(_STORE_MAX, _STORED_NAMES_MAX // (len(stored_name) + 1))


def store_message(stored_name: str, count: int, *, poll: bool) -> bytes:
    """Write the message that stores descriptors under a name.

    Raises:
        MessageError: The name is invalid, or there are no descriptors, or more than `passable`.
    """
    most = passable(stored_name)
    if count > most:
        raise MessageError(
            f"{count} descriptors to store; at most {most} of this name can be passed to a start"
        )
    lines = ["FDSTORE=1", assignment("FDNAME", stored_name), *(() if poll else ("FDPOLL=0",))]
    return encode_message(*lines, fd_count=min(count, FDS_MAX))


def store(manager: Manager, data: bytes, fds: Sequence[int]) -> bool:
    """Send descriptors to be stored (*borrowed*), in as many messages as they need; False if one fails."""
    return all(manager.offer(data, some) for some in _batches(fds, FDS_MAX))


def store_confirmed(manager: Manager, data: bytes, fds: Sequence[int]) -> None:
    """Store as many descriptors as there is room for, and return when it is certain that all are kept.

    The room is found out first. Then which ones are kept is certain also if not all are, and a store of one
    can keep one.

    Args:
        manager: Where they go.
        data: The message that goes with each batch of them, see `store_message`.
        fds: The descriptors (*borrowed*).

    Raises:
        StoreRefusedError: Not all are kept; it says how many are.
        BarrierTimeoutError: The manager is silent.
        NotifyError: It cannot be reached, or there is no descriptor left to ask it with.
    """
    if not manager.lock.acquire(timeout=_CONFIRMATION):
        raise BarrierTimeoutError("another thread is still waiting for the manager")
    kept = 0
    try:
        for some in _batches(fds, _CANARIES):
            room = _room(manager, len(some))
            if room:
                manager.insist(data, some[:room], timeout=_CONFIRMATION)
            kept += room
            if room < len(some):
                break
        if kept:
            manager.synchronise(_CONFIRMATION)
    finally:
        manager.lock.release()
    if kept < len(fds):
        why = "its store is full, FileDescriptorStoreMax= is 0, or NotifyAccess= forbids"
        raise StoreRefusedError(f"the manager keeps {kept} of {len(fds)} descriptors: {why}", kept=kept)


def _room(manager: Manager, wanted: int) -> int:
    """Find out how many more descriptors the store takes, up to some number.

    It is given ends of socket pairs. Those that it closes hang up the other ends, a moment after a barrier at
    the latest; the others it keeps, and is told to remove before the real ones come.
    """
    name = assignment("FDNAME", f"{_CANARY}.{os.getpid()}")
    canaries: list[tuple[socket.socket, socket.socket]] = []
    try:
        try:
            canaries.extend(socket.socketpair() for _ in range(wanted))
        except OSError as error:
            raise NotifyError(f"no descriptors to ask the manager with: {error}") from error
        # Without FDPOLL=0: being polled, they leave the store by themselves if we die meanwhile.
        data = encode_message("FDSTORE=1", name, fd_count=wanted)
        theirs = [canary.fileno() for _, canary in canaries]
        manager.insist(data, theirs, timeout=_CONFIRMATION)
        for _, canary in canaries:
            canary.close()
        manager.synchronise(_CONFIRMATION)
        room = wanted - _hung_up(canary.fileno() for canary, _ in canaries)
        if room:
            data = encode_message("FDSTOREREMOVE=1", name)
            manager.insist(data, timeout=_CONFIRMATION)
        return room
    finally:
        for pair in canaries:
            for canary in pair:
                canary.close()


def _hung_up(fds: Iterable[int]) -> int:
    """Count those that hang up while a manager may still be closing what it refused."""
    poll = select.poll()
    waiting = set(fds)
    for fd in waiting:
        poll.register(fd, 0)
    count = 0
    deadline = time.monotonic() + _REFUSAL
    while count < len(waiting):
        events = poll.poll(max(deadline - time.monotonic(), 0) * 1000)
        if not events:
            break
        for fd, _ in events:
            poll.unregister(fd)
        count += len(events)
    return count


def _batches(fds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (fds[start : start + size] for start in range(0, len(fds), size))
