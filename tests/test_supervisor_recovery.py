"""What a supervisor survives: workers that cannot be started, or end at the worst moment."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdlisten.supervisor.loop import Loop

from .supervised import SECONDS, app, gone, supervisors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .supervised import Running

# Ends as soon as it is started.
BROKEN = "raise SystemExit(1)"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Give a function that starts a supervisor; what it started is gone afterwards."""
    with supervisors(tmp_path) as start:
        yield start


def waits_for(path: Path, then: str) -> str:
    """Return code that waits until somebody writes to a FIFO."""
    return f"open({str(path)!r}).read()\n{then}"


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended and is not reaped yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_worker_can_be_started(run: Callable[..., Running], tmp_path: Path) -> None:
    """A roll of which no worker can be started is refused; the old generation hears nothing of it."""
    variables = tmp_path / "env"
    variables.touch()
    running = run("--workers", "2", "--env-file", str(variables))
    variables.unlink()

    answer = running.roll()

    assert (answer["code"], answer["outcome"]) == (3, "refused")
    assert str(variables) in answer["stderr"]
    assert running.get()[1] == 1
    variables.touch()
    assert running.roll()["code"] == 0
    assert running.settled()["refused"] == 1


def test_replacements_end_at_once(run: Callable[..., Running]) -> None:
    """Many workers end together, and those that replace them end as soon as they start: it goes on trying."""
    running = run("--workers", "12")
    old = running.pids()
    running.deploy(BROKEN)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    running.until(lambda facts: facts["restarts"] > len(old))

    running.deploy(app())

    assert running.roll()["code"] == 0
    facts = running.settled()
    assert len(facts["generations"][0]["workers"]) == len(old)
    for pid in old:
        gone(pid)


def test_flag_that_all_share(run: Callable[..., Running], tmp_path: Path) -> None:
    """O_NONBLOCK is not taken away from a generation that serves; it is, when nobody serves any more."""
    running = run(text=app("print('first', blocking, flush=True)"))
    running.reads("first True")
    other = tmp_path / "other.py"
    other.write_text(app("print('other', blocking, flush=True)"))

    assert running.roll([sys.executable, "-I", "-S", str(other)])["code"] == 0
    running.reads("other False")
    (pid,) = running.settled()["generations"][0]["workers"]
    os.kill(pid["pid"], signal.SIGKILL)

    running.reads("other True")


@pytest.mark.parametrize("path", ["ends well", "crashes"])
def test_ready_are_the_last_words(run: Callable[..., Running], tmp_path: Path, path: str) -> None:
    """READY=1 that is read after the end of its sender makes no generation of dead workers serve."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = 0 if path == "ends well" else 1
    running = run()
    running.deploy(app(waits_for(fifo, f"say('READY=1'); os._exit({code})")))
    running.ask("roll")
    facts = running.until(lambda facts: len([one for one in facts["generations"] if one["workers"]]) == 2)
    (trial,) = (one["workers"][0]["pid"] for one in facts["generations"] if one["number"] == 2)

    os.kill(running.daemon.pid, signal.SIGSTOP)
    with fifo.open("w"):
        pass
    deadline = time.monotonic() + SECONDS
    while not is_zombie(trial):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)
    os.kill(running.daemon.pid, signal.SIGCONT)

    running.until(lambda facts: facts["refused"] == 1)
    assert running.get()[1] == 1


def test_orphans_of_a_crash(run: Callable[..., Running]) -> None:
    """What a worker has forked is told to stop when the worker crashes: it would go on to accept."""
    fork = """
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("orphan", os.getpid(), flush=True)
    signal.pause()
"""
    running = run(text=app(fork))
    running.reads("orphan")
    orphan = int(running.daemon.output.partition("orphan ")[2].split()[0])

    os.kill(running.pids()[0], signal.SIGSEGV)

    gone(orphan)
    assert running.until(lambda facts: facts["restarts"] == 1)


def test_standard_descriptors_are_closed(run: Callable[..., Running]) -> None:
    """Started without 0, 1 and 2, it puts nothing of its own there, and workers find them open."""
    running = run(wrapper=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])

    for pid in (running.daemon.pid, running.pids()[0]):
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        # With a control socket what workers write to 2 comes to us.
        assert links[:2] == ["/dev/null"] * 2
        assert links[2] == "/dev/null" or pid != running.daemon.pid


def test_more_workers_than_descriptors(run: Callable[..., Running]) -> None:
    """A number of workers of which no roll could come is refused before anything starts, with the limits."""
    limited = ["sh", "-c", 'ulimit -Sn 100 && exec "$@"', "sh"]
    running = run("--workers", "50", ready=False, wrapper=limited)

    running.reads("--workers 50 needs up to 465 descriptors, and RLIMIT_NOFILE is 100: raise it")
    assert running.daemon.terminate(SECONDS) == 2


def test_hang_up_that_was_ignored(run: Callable[..., Running]) -> None:
    """Under nohup(1) SIGHUP stays ignored; everything else is heard."""
    running = run(wrapper=["sh", "-c", 'trap "" HUP; exec "$@"', "sh"])

    os.kill(running.daemon.pid, signal.SIGHUP)

    assert running.roll()["code"] == 0
    assert running.settled()["rolls"] == 1
    assert running.daemon.terminate(SECONDS) == 0


def test_number_of_a_descriptor_that_was_closed() -> None:
    """What happened to a descriptor is not told to whoever has its number since."""
    loop = Loop()
    (first, its_end), (second, other_end) = os.pipe(), os.pipe()
    called = []

    def replace(_events: int) -> None:
        called.append("first")
        loop.forget(second)
        os.dup2(its_end, second)  # nothing to read there, and never will be
        loop.watch(second, lambda _events: called.append("the number of the second"))

    loop.watch(first, replace)
    loop.watch(second, lambda _events: called.append("second"))
    os.write(its_end, b"x")
    os.write(other_end, b"x")

    loop.wait(time.monotonic() + SECONDS)

    assert called == ["first"]
    for fd in (first, its_end, second, other_end):
        os.close(fd)
