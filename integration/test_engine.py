"""Who starts and stops the engine, and when: the real keeper in a container, with a fake dockerd below it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import engine as module
from .engine import answers, status

if TYPE_CHECKING:
    from collections.abc import Callable

    import docker

    from .container import Plain

# Answers _ping where dockerd would, and ends on SIGTERM.
FAKE_DOCKERD = """\
#!/usr/bin/python3
import os, socket
path = "/var/run/docker.sock"
if os.path.exists(path):
    os.unlink(path)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nOK")
"""

# A session: says whether the engine was started for it, and keeps its lease until its stdin ends.
SESSION = """\
from engine import lease
with lease() as started:
    print(started, flush=True)
    input()
"""

# What the tests below share: sessions as processes, and what is to be seen of dockerd.
PRELUDE = f"""\
import contextlib, os, select, signal, subprocess, sys
sys.path.insert(0, "/opt/keeper")
import engine

@contextlib.contextmanager
def session():
    words = [sys.executable, "-c", {SESSION!r}]
    with subprocess.Popen(words, cwd="/opt/keeper", stdin=-1, stdout=-1, text=True) as process:
        yield process, process.stdout.readline().strip()

def end(process):
    process.stdin.write("\\n")
    process.stdin.flush()
    assert process.wait(10) == 0

def dockerd():
    words = ["pgrep", "-f", "^/usr/bin/python3 /usr/local/bin/dockerd"]
    found = subprocess.run(words, capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]

def await_end(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            assert select.select([pidfd], [], [], 10)[0], f"{{pid}} did not end within 10 s"
            os.close(pidfd)
    assert not engine.answers()
"""


@pytest.fixture
def bare(plain: Callable[..., Plain]) -> Plain:
    """A container in which a fake dockerd is installed, and nothing answers."""
    container = plain("sleep", "infinity", tini=True)
    container.put(
        {
            "/opt/keeper/engine.py": Path(module.__file__),
            "/opt/keeper/prelude.py": PRELUDE,
            "/usr/local/bin/dockerd": FAKE_DOCKERD,
            **{f"/usr/local/bin/{name}": "#!/bin/sh\n" for name in ("iptables", "mmdebstrap")},
        }
    )
    return container


def scenario(container: Plain, text: str) -> None:
    """Run `text` after the prelude in `container`."""
    container.sh(["python3", "-c", "from prelude import *\n" + text], env={"PYTHONPATH": "/opt/keeper"})


def command(container: Plain, word: str) -> tuple[int, str]:
    """Run ``engine.py word``; returns exit code and output."""
    return container.run(["python3", "/opt/keeper/engine.py", word])


def test_engine_answers(engine: docker.DockerClient) -> None:
    """An engine answers, and its status tells whether it is ours."""
    answered, sentence = status()
    assert engine.ping()
    assert answers()
    assert answered
    assert sentence.startswith(("our engine answers", "an engine answers that is not ours"))


def test_up_and_down(bare: Plain) -> None:
    """`up` starts an engine that stays, `down` stops it, and saying either twice is harmless."""
    assert command(bare, "status") == (1, "engine: no engine answers\n")
    assert command(bare, "down") == (0, "engine: no engine runs\n")
    assert command(bare, "up") == (0, "engine: started; it stays until `down`\n")
    assert command(bare, "up") == (0, "engine: ours runs already; it now stays until `down`\n")
    code, sentence = command(bare, "status")
    assert code == 0
    assert "our engine answers; it runs until `down`" in sentence
    assert command(bare, "down") == (0, "engine: stopped\n")
    assert command(bare, "status") == (1, "engine: no engine answers\n")
    scenario(bare, "assert not dockerd()")


def test_foreign_engine_is_untouched(bare: Plain) -> None:
    """An engine that is not ours is used, and neither `down` nor the end of a session stops it."""
    scenario(
        bare,
        """
foreign = subprocess.Popen(["dockerd"])
while not engine.answers():
    assert foreign.poll() is None
with session() as (process, started):
    assert started == "False"
    end(process)
assert engine.up() == engine.down() == "an engine that is not ours answers: untouched"
assert foreign.poll() is None
foreign.kill()
""",
    )


def test_session_starts_and_stops_the_engine(bare: Plain) -> None:
    """When a session that started the engine has ended, dockerd has, too."""
    scenario(
        bare,
        """
with session() as (process, started):
    assert started == "True"
    assert engine.answers()
    end(process)
assert not dockerd()
""",
    )


def test_last_session_stops_the_engine(bare: Plain) -> None:
    """The engine outlives the session that started it while another uses it; and all of them, if told."""
    scenario(
        bare,
        """
with session() as (first, started), session() as (second, found):
    assert (started, found) == ("True", "False")
    end(first)
    assert engine.answers()
    pids = dockerd()
    end(second)
await_end(pids)

with session() as (process, started):
    assert started == "True"
    assert "stays" in engine.up()
    end(process)
assert engine.answers()
assert engine.down() == "stopped"
""",
    )


def test_down_waits_for_sessions(bare: Plain) -> None:
    """`down` does not pull the engine away under a session; the engine then ends with it."""
    scenario(
        bare,
        """
engine.STOP_SECONDS = 0.3
engine.up()
with session() as (process, started):
    assert started == "False"
    assert engine.down() == "a session still uses it: it stops with the last one"
    assert engine.answers()
    pids = dockerd()
    end(process)
await_end(pids)
""",
    )


def test_killed_session_leaves_no_engine(bare: Plain) -> None:
    """After SIGKILL of the only session dockerd ends, and after SIGKILL of the keeper as well."""
    scenario(
        bare,
        """
with session() as (process, started):
    pids = dockerd()
    process.kill()
await_end(pids)

engine.up()
pids = dockerd()
os.kill(int((engine.STATE / "keeper.pid").read_text()), signal.SIGKILL)
await_end(pids)
assert engine.down() == "no engine runs"
with session() as (process, started):
    assert started == "True"
    end(process)
""",
    )


def test_reason_why_none_can_be_started(bare: Plain) -> None:
    """The error says why none can be started: not root, a dead DOCKER_HOST, what a failing dockerd says."""
    lease = "from engine import lease\nwith lease(): pass"
    as_nobody = bare.run(["python3", "-c", lease], user="nobody", env={"PYTHONPATH": "/opt/keeper"})
    assert "EngineUnavailableError: no docker engine answers, and starting one takes root" in as_nobody.output
    named = {"PYTHONPATH": "/opt/keeper", "DOCKER_HOST": "unix:///nowhere"}
    assert (
        "DOCKER_HOST=unix:///nowhere does not answer" in bare.run(["python3", "-c", lease], env=named).output
    )
    bare.put({"/usr/local/bin/dockerd": "#!/bin/sh\necho 'no such graph driver' >&2; exit 1\n"})
    assert (
        "no such graph driver" in bare.run(["python3", "-c", lease], env={"PYTHONPATH": "/opt/keeper"}).output
    )
    assert command(bare, "status") == (1, "engine: no engine answers\n")
