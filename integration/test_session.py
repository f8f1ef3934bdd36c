"""A run leaves nothing behind, however it ends; and without an engine it says so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .session import LABEL, is_alive, remove_leftovers, session_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import docker

ROOT = Path(__file__).resolve().parent.parent

# A container of its own, and then a wait for the end.
WAITING_TEST = """\
import signal

def test_waits(plain):
    print("started", plain("sleep", "infinity").get_container_id(), flush=True)
    signal.pause()
"""


def _pytest(directory: Path) -> list[str]:
    """Return the words of a run of pytest with our fixtures, on a test that waits."""
    (directory / "test_waiting.py").write_text(WAITING_TEST)
    options = ["-q", "-s", "-ra", "-p", "integration.conftest", "-c", os.devnull, "--rootdir", str(directory)]
    return [sys.executable, "-m", "pytest", *options, str(directory)]


def _environ(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **more}


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_interrupted_run_leaves_nothing(
    engine: docker.DockerClient, tmp_path: Path, ending: signal.Signals
) -> None:
    """A run that is interrupted removes its containers; after one that was killed, the next run does."""
    with subprocess.Popen(_pytest(tmp_path), env=_environ({}), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        seen = []
        for line in run.stdout:
            seen.append(line)
            if "started" in line:
                break
        else:
            pytest.fail(f"the run ended before it had a container:\n{''.join(seen)}")
        session = session_of(run.pid)
        mine: dict[str, str | list[str] | bool] = {"label": f"{LABEL}={session}"}
        assert len(engine.containers.list(filters=mine)) == 1
        assert is_alive(session)
        run.send_signal(ending)
        run.stdout.read()
    assert not is_alive(session)
    if ending == signal.SIGKILL:
        assert len(remove_leftovers(engine)) == 2, "a container and a network"
    assert not engine.containers.list(all=True, filters=mine)
    assert not engine.networks.list(filters=mine)


@pytest.mark.parametrize("no_skip", ["0", "1"])
def test_without_an_engine(tmp_path: Path, no_skip: str) -> None:
    """Without an engine a test is skipped with the reason; with SDLISTEN_NO_SKIP=1 it fails with it."""
    environ = {"DOCKER_HOST": "unix:///nowhere", "SDLISTEN_NO_SKIP": no_skip}
    done = subprocess.run(
        _pytest(tmp_path), env=_environ(environ), capture_output=True, text=True, check=False
    )
    assert "DOCKER_HOST=unix:///nowhere does not answer" in done.stdout
    assert (done.returncode, "1 skipped" in done.stdout) == ((0, True) if no_skip == "0" else (1, False))


def test_session_of_another_host_is_not_judged() -> None:
    """A session of another host on the same engine counts as alive: its process cannot be seen from here."""
    assert is_alive("elsewhere.1.1")
    assert is_alive(session_of(os.getpid()))
    assert not is_alive(f"{socket.gethostname()}.{os.getpid()}.1")
