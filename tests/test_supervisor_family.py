"""A worker's family: who is there, who has gone, and where /proc does not tell."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

from sdlisten.supervisor import family as module
from sdlisten.supervisor.family import family, has_own_proc

if TYPE_CHECKING:
    import pytest

PARENT = """
import os, signal, threading
child = os.fork()
if not child:
    signal.pause()
threading.Thread(target=signal.pause, daemon=True).start()
print(child, len(os.listdir("/proc/self/task")), flush=True)
input()
os.kill(child, signal.SIGKILL)
os.wait()
os._exit(0)
"""


def test_children_and_threads() -> None:
    """Threads come with their process, and children with what they have started."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        assert parent.stdin
        child, threads = map(int, parent.stdout.readline().split())

        found = dict(family(parent.pid))

        assert set(found) == {parent.pid, child}
        assert len(found[parent.pid]) == threads == 2
        assert found[child] == [child]
        parent.stdin.write("\n")


def test_who_has_gone() -> None:
    """A process that has ended is given alone, and has no children."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()

    assert list(family(gone.pid)) == [(gone.pid, [gone.pid])]
    assert module._children(gone.pid, str(gone.pid)) == []


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is not mounted nothing is known beyond the process itself."""

    def fail(_path: str) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "readlink", fail)

    assert not has_own_proc()
    assert list(family(os.getpid())) == [(os.getpid(), [os.getpid()])]
    monkeypatch.undo()  # the check for leaks reads links
