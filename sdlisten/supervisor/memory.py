"""When memory runs out, let the kernel take the generation on trial, not the one that serves.

Left alone it kills who has most. That is the old generation: it is loaded, while the new one grows towards
the same size. (Two of 60 MB in a container of 112 MB: the one that served was killed each time.)
"""

from __future__ import annotations

import contextlib
import os

from sdlisten.supervisor.family import family, has_own_proc

__all__ = ("Expendable",)

_FIRST = b"1000"  # proc_pid_oom_score_adj(5): the first to be killed


class Expendable:
    """A process that has just been started, and is killed before all others until it is spared.

    It may always be made easier to kill. The way back is written through a descriptor that is opened at once:
    later the program may be one that others may not look into (it has file capabilities).

    Args:
        pid: The process; if it has ended already, nothing happens.
    """

    __slots__ = ("_fd",)

    def __init__(self, pid: int) -> None:
        self._fd = -1
        if not has_own_proc():
            return
        with contextlib.suppress(OSError):  # it has ended
            self._fd = _open(pid)
            os.pwrite(self._fd, _FIRST, 0)

    def spare(self, pid: int) -> None:
        """Make it, and what it has started since, as hard to kill as we are; not who has chosen otherwise."""
        if self._fd < 0:
            return
        _spare(self._fd)
        for process, _ in family(pid):
            if process != pid:
                with contextlib.suppress(OSError):
                    fd = _open(process)
                    _spare(fd)
                    os.close(fd)
        self.close()

    def close(self) -> None:
        """Leave it as it is. Harmless twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open(process: int) -> int:
    return os.open(f"/proc/{process}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)


def _spare(fd: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "rb") as ours:  # it has ended
        if os.pread(fd, 16, 0).strip() == _FIRST:
            os.pwrite(fd, ours.read(), 0)
