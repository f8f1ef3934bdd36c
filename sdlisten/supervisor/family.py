"""A worker with all that it has started: for what a process passes on to its children at fork(2)."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("family", "has_own_proc")


def family(pid: int) -> Iterator[tuple[int, list[int]]]:
    """Give a process and its threads, then those of the processes that it and they have started.

    Each is given before its children are looked for: what is changed of it then holds for those to come.
    """
    threads = _names(f"/proc/{pid}/task") if has_own_proc() else []
    yield pid, [int(thread) for thread in threads] or [pid]
    for thread in threads:
        for child in _children(pid, thread):
            yield from family(child)


def has_own_proc() -> bool:
    """Return whether the numbers in /proc are our pids.

    In a PID namespace that still has the /proc of another one (``unshare --pid``) they are strangers'.
    """
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:  # it is not mounted
        return False


def _children(pid: int, thread: str) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as children:
        return [int(child) for child in children.read().split()]
    return []


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # it has ended
        return []
