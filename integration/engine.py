"""A docker engine for the tests: the one that answers, or one of our own for as long as somebody uses it.

Tests hold a `lease`. If an engine answers it is used and left alone. Otherwise, as root on a Debian host, the
missing packages are installed and a *keeper* process is started, whose child is dockerd. No pid file is ever
trusted; the kernel's own records decide:

- Every session holds a shared flock(2) on one file for as long as it lives. The keeper waits for the
  exclusive lock on it, which the kernel grants when the last session has ended, in whatever way (SIGKILL
  too), and then stops dockerd. Sessions may overlap; none pulls the engine away under another.
- dockerd gets SIGTERM from the kernel should the keeper itself be killed (PR_SET_PDEATHSIG).
- The keeper holds an exclusive lock on the file with its pid: free lock, no keeper.

By hand::

    python integration/engine.py up        start one that stays, unless an engine answers
    python integration/engine.py down      stop it, once no session uses it; never an engine that is not ours
    python integration/engine.py status    what answers, and whose it is (exit code 1: nothing does)

Only the standard library is used here: this file also runs before any virtual environment exists.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import IO

__all__ = ("EngineUnavailableError", "answers", "down", "install", "lease", "status", "up")

# In /run, not in a cache: the engine is one per machine (one /run/docker.sock), so its locks are too, however
# the environment of a session says; only root writes here; a reboot empties it.
STATE = Path("/run/sdlisten-engine")
LOG = STATE / "dockerd.log"

SOCKET = "/var/run/docker.sock"
READY_SECONDS = 30.0
STOP_SECONDS = 30.0

# program that must be found -> Debian package that has it
ENGINE_PROGRAMS = {"dockerd": "docker.io", "iptables": "iptables", "mmdebstrap": "mmdebstrap"}


class EngineUnavailableError(Exception):
    """No engine answers and none can be started; the text says why and what to do."""


def answers() -> bool:
    """Whether the engine that docker clients would use answers now."""
    host = os.environ.get("DOCKER_HOST", f"unix://{SOCKET}")
    if host.startswith("unix://"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as ping:
            ping.settimeout(5)
            ping.connect(host.removeprefix("unix://"))
            ping.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in ping.recv(64)
    # Elsewhere, or named by a docker context: only the CLI knows.
    docker = shutil.which("docker")
    if docker is None:
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run([docker, "info"], capture_output=True, timeout=10, check=False).returncode == 0
    return False


def install(programs: Iterable[str], packages: Mapping[str, str] = ENGINE_PROGRAMS) -> None:
    """Install the Debian packages of those `programs` that are not found.

    Args:
        programs: Which must be found afterwards.
        packages: Which package has which program.

    Raises:
        EngineUnavailableError: One is missing, and this is not root or not a Debian host, or apt-get failed.
    """
    missing = sorted({packages[program] for program in programs if shutil.which(program) is None})
    if not missing:
        return
    wish = f"apt-get install {' '.join(missing)}"
    apt = shutil.which("apt-get")
    if os.geteuid() != 0 or apt is None:
        why = "this is not a Debian host" if apt is None else "this is not root"
        raise EngineUnavailableError(f"missing: {', '.join(missing)}, and {why}. Wanted: {wish}")
    command = [apt, "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (
        ["update"],
        ["install", "--yes", "--no-install-recommends", *missing, "ca-certificates"],
    ):
        done = subprocess.run(
            command + arguments,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise EngineUnavailableError(f"{wish} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}")


@contextlib.contextmanager
def lease() -> Iterator[bool]:
    """An engine that answers for as long as the block runs; the value tells whether it was started for it.

    Raises:
        EngineUnavailableError: None answers, and none can be started here.
    """
    if os.geteuid() != 0:
        if not answers():
            raise EngineUnavailableError("no docker engine answers, and starting one takes root")
        yield False
        return
    keeper = None
    try:
        with _using():
            keeper = _start_unless_one_answers()
            yield keeper is not None
    finally:
        if keeper is not None:
            _await_stop(keeper)


def up() -> str:
    """Start an engine that stays until `down`, unless one answers; returns a sentence that says which."""
    if os.geteuid() != 0 and not answers():
        raise EngineUnavailableError("no docker engine answers, and starting one takes root")
    if _keeper_pid() is None and answers():
        return "an engine that is not ours answers: untouched"
    with _using():
        (STATE / "stay").touch()
        try:
            keeper = _start_unless_one_answers()
        except BaseException:
            (STATE / "stay").unlink()
            raise
    if keeper is None:
        return "ours runs already; it now stays until `down`"
    _let_go(keeper)
    return "started; it stays until `down`"


def down() -> str:
    """Stop the engine that we started, once no session uses it; returns what was done, in words."""
    pid = _keeper_pid()
    if pid is None:
        return "an engine that is not ours answers: untouched" if answers() else "no engine runs"
    (STATE / "stay").unlink(missing_ok=True)
    keeper = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(keeper, signal.SIGTERM)
        stopped, _, _ = select.select([keeper], [], [], STOP_SECONDS)
    finally:
        os.close(keeper)
    return "stopped" if stopped else "a session still uses it: it stops with the last one"


def status() -> tuple[bool, str]:
    """Whether an engine answers, and a sentence that says whose it is."""
    pid = _keeper_pid()
    if not answers():
        return False, "no engine answers" + (
            f", though our keeper runs (pid {pid}); see {LOG}" if pid else ""
        )
    if pid is None:
        return True, "an engine answers that is not ours"
    until = "until `down`" if (STATE / "stay").exists() else "until its last session ends"
    return True, f"our engine answers; it runs {until} (keeper pid {pid}, log {LOG})"


@contextlib.contextmanager
def _using() -> Iterator[None]:
    """Keep a running keeper from stopping its dockerd during the block."""
    STATE.mkdir(mode=0o755, exist_ok=True)
    with (STATE / "users.lock").open("a") as users:
        # Waits only for a keeper that was granted the exclusive lock and is stopping its dockerd.
        fcntl.flock(users, fcntl.LOCK_SH)
        yield


def _start_unless_one_answers() -> subprocess.Popen[bytes] | None:
    """Return a keeper whose dockerd answers, or None if an engine answers already."""
    with (STATE / "start.lock").open("a") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        if answers():
            return None
        if "DOCKER_HOST" in os.environ:
            host = os.environ["DOCKER_HOST"]
            raise EngineUnavailableError(
                f"DOCKER_HOST={host} does not answer: start it, or unset the variable"
            )
        install(ENGINE_PROGRAMS)
        if answers():  # the package has started its service: a host whose own manager looks after it
            return None
        keeper = subprocess.Popen(
            [sys.executable, "-I", __file__, "keep"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        if _told(keeper) != b"ready\n":
            keeper.wait()
            tail = LOG.read_text(errors="replace")[-1500:] if LOG.exists() else "(no log)"
            raise EngineUnavailableError(f"dockerd did not come up within {READY_SECONDS:.0f} s:\n{tail}")
        return keeper


def _await_stop(keeper: subprocess.Popen[bytes]) -> None:
    """Wait until the keeper of a session that gave up its lease has stopped dockerd; not if others use it."""
    if keeper.stdout and select.select([keeper.stdout], [], [], 1.0)[0] and _told(keeper) == b"stopping\n":
        keeper.wait(STOP_SECONDS)
    _let_go(keeper)


def _let_go(keeper: subprocess.Popen[bytes]) -> None:
    """Leave a keeper that may still run to itself, without the ResourceWarning of Popen and its pipe."""
    keeper.returncode = keeper.poll() or 0
    if keeper.stdout:
        keeper.stdout.close()


def _told(keeper: subprocess.Popen[bytes]) -> bytes:
    """Read the next line of the keeper; empty at its end."""
    return keeper.stdout.readline() if keeper.stdout else b""


def _keeper_pid() -> int | None:
    """Return the pid of the running keeper; None without one, whatever its file says."""
    with contextlib.suppress(FileNotFoundError), (STATE / "keeper.pid").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read())
    return None


def _keep() -> int:
    """Be the keeper: run dockerd until nobody uses it. Prints ``ready``, and at last ``stopping``."""
    with (STATE / "keeper.pid").open("a") as mine, (STATE / "users.lock").open("a") as users:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine.truncate(0)
        mine.write(str(os.getpid()))
        mine.flush()
        with LOG.open("wb") as log:
            dockerd = _dockerd(log)
        # Blocked only now, or dockerd would inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
        deadline = time.monotonic() + READY_SECONDS
        while not answers():
            if dockerd.poll() is not None or time.monotonic() > deadline:
                return _stop(dockerd) or 1
            time.sleep(0.05)  # a listening socket announces itself to nobody
        _tell("ready")
        while True:
            if (STATE / "stay").exists():
                signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
            fcntl.flock(users, fcntl.LOCK_EX)
            if dockerd.poll() is not None or not (STATE / "stay").exists():
                _tell("stopping")
                return _stop(dockerd)
            fcntl.flock(users, fcntl.LOCK_UN)


def _dockerd(log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start dockerd as a child that does not outlive this process."""
    pid_file = STATE / "dockerd.pid"
    # dockerd refuses to start while its pid file names any living process; by the keeper's lock it is stale.
    pid_file.unlink(missing_ok=True)
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "dockerd", "--pidfile", pid_file],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _stop(dockerd: subprocess.Popen[bytes]) -> int:
    dockerd.terminate()
    try:
        dockerd.wait(STOP_SECONDS - 5)
    except subprocess.TimeoutExpired:
        dockerd.kill()
        dockerd.wait()
    return 0


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the session that started us may be gone
        os.write(1, line.encode() + b"\n")


def main() -> int:
    """Run one of the commands up, down and status."""
    parser = argparse.ArgumentParser(description="A docker engine for the integration tests.")
    parser.add_argument("command", choices=("up", "down", "status", "keep"), metavar="up|down|status")
    command = parser.parse_args().command
    if command == "keep":
        return _keep()
    try:
        answered, sentence = status() if command == "status" else (True, up() if command == "up" else down())
    except EngineUnavailableError as error:
        answered, sentence = False, str(error)
    print(f"engine: {sentence}")  # noqa: T201 -- what a command says
    return 0 if answered else 1


if __name__ == "__main__":
    sys.exit(main())
