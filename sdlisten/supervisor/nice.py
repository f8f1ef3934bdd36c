"""Start workers niced, so that their imports do not slow those that serve; take it back when they serve.

The way back is the point: without CAP_SYS_NICE the kernel lets a process only become nicer, down to what
RLIMIT_NICE allows (setpriority(2), getrlimit(2)). A worker that could not come back would stay slow for ever.
"""

from __future__ import annotations

import contextlib
import os
import resource

from sdlisten.supervisor.family import family

__all__ = ("can_return", "lower", "restore")

_CAP_SYS_NICE = 1 << 23  # linux/capability.h
_RLIMIT_NICE_ZERO = 20  # RLIMIT_NICE counts from 20 for nice 0 downwards: 1 to 40 for 19 to -20


def can_return() -> bool:
    """Return whether a child of ours can get our own priority back after it was lowered."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if soft == resource.RLIM_INFINITY or _RLIMIT_NICE_ZERO - soft <= nice:
        return True
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & _CAP_SYS_NICE)
    return False


def lower(pid: int, nice: int) -> None:
    """Lower the priority of a process that has just been started, by so much."""
    with contextlib.suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)


def restore(pid: int) -> None:
    """Give our own priority back to a process, its threads, and the processes that it has started since."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # On Linux the priority belongs to the thread, and each new thread and process inherits it.
    for _, threads in family(pid):
        for thread in threads:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, nice)
