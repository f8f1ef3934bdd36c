"""`sdlisten run` under systemd, from the drop-ins that people copy: reloads, bad deploys, the stop."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.load import LoadProcess

from .container import eventually
from .machine import UNITS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

    from sdlisten.load import Result

    from .machine import Machine

UNIT = "hello.service"
# What `systemctl reload` starts and fails with the roll; what systemd does itself, and cannot see fail.
EXEC_RELOAD = "hello.service.d/supervised.conf"
NOTIFY_RELOAD = "hello.service.d/supervised-notify-reload.conf"
since_notify_reload = pytest.mark.systemd(since=253)

# All at once: a roll meets new connections, late senders, idle connections, and some that are never idle.
LOADS: Mapping[str, Mapping[str, Any]] = {
    "short": {"mode": "short", "clients": 12, "rate": 100},
    "slow": {"mode": "slow", "clients": 12},
    "keep": {"mode": "keep", "clients": 12, "rate": 150},
    "keep without pause": {"mode": "keep", "clients": 1, "rate": 0},
}

# A program that a test can replace, as a deploy does.
APP = "/srv/hello-app.py"
GOOD = "import sys\nfrom sdlisten.hello import main\nsys.exit(main())\n"
BROKEN = "raise RuntimeError('a broken version')\n"
HANGS = "import time\ntime.sleep(600)\n"

PAGE = b"GET / HTTP/1.1\r\nHost: hello\r\n\r\n"


def start(machine: Machine, drop_in: str) -> None:
    """Install hello with a drop-in and start it."""
    machine.units("hello.socket", UNIT, drop_in)
    machine.systemctl("start", "hello.socket", UNIT)


def start_app(machine: Machine, drop_in: str, more: str = "") -> None:
    """Start it so that the program is the file `APP`, with `more` in the drop-in."""
    text = (UNITS / drop_in).read_text()
    assert text.count("-m sdlisten.hello") == 1
    machine.put({APP: GOOD})
    machine.units("hello.socket", UNIT, extra={drop_in: text.replace("-m sdlisten.hello", APP) + more})
    machine.systemctl("start", "hello.socket", UNIT)


def status(machine: Machine) -> dict[str, Any]:
    """Return what ``sdlisten ctl status --json`` says."""
    words = ["sdlisten", "ctl", "--control", "/run/hello/control", "status", "--json"]
    found: dict[str, Any] = json.loads(machine.sh(words, check=False))
    return found


@contextlib.contextmanager
def under_load(machine: Machine) -> Iterator[dict[str, Result]]:
    """Run all loads during the block; afterwards the value has their results, and none has a failure."""
    results: dict[str, Result] = {}
    with contextlib.ExitStack() as stack:
        loads = {
            name: stack.enter_context(LoadProcess(f"{machine.ip}:8080", quiet=True, **options))
            for name, options in LOADS.items()
        }
        for load in loads.values():
            load.wait_started()
        yield results
        results.update({name: load.stop() for name, load in loads.items()})
    print(*results.values(), sep="\n")  # noqa: T201 -- the figures, for whoever asks pytest for them
    assert not [str(result) for result in results.values() if not result.clean]


def reload_again_and_again(machine: Machine, rounds: int) -> None:
    """Reload so often, under load; each roll is a success and no request fails."""
    with under_load(machine) as results:
        for _ in range(rounds):
            machine.systemctl("reload", UNIT, timeout=60)
    seen = status(machine)
    assert (seen["rolls"], seen["refused"], seen["restarts"], seen["killed"]) == (rounds, 0, 0, 0)
    assert machine.show(UNIT, "StatusText") == f"generation {rounds + 1} serves"
    # Two workers in each generation, and new connections for all of them.
    assert len(results["short"].pids) > rounds


@pytest.mark.timeout(300)
def test_reloads_under_load(machine: Machine, rounds: Callable[[int], int]) -> None:
    """`systemctl reload` rolls again and again, and of all kinds of requests none fails."""
    start(machine, EXEC_RELOAD)
    reload_again_and_again(machine, rounds(20))


@pytest.mark.timeout(300)
@since_notify_reload
def test_notify_reloads_under_load(machine: Machine, rounds: Callable[[int], int]) -> None:
    """The same with Type=notify-reload, where systemd itself sends SIGHUP and waits for READY=1."""
    start(machine, NOTIFY_RELOAD)
    reload_again_and_again(machine, rounds(20))
    assert machine.show(UNIT, "Type") == "notify-reload"


def test_bad_deploy(machine: Machine) -> None:
    """A version that does not start makes `systemctl reload` fail and say why; clients see nothing of it."""
    start_app(machine, EXEC_RELOAD)
    with under_load(machine):
        machine.put({APP: BROKEN})
        assert machine.run(["systemctl", "reload", UNIT], timeout=60).code == 1
        assert machine.show(UNIT, "ActiveState") == "active"
        assert "generation 2 was refused" in machine.show(UNIT, "StatusText")
        machine.put({APP: GOOD})
        machine.systemctl("reload", UNIT, timeout=60)
    written = machine.journal(UNIT)
    assert "the roll to generation 2 was refused: a worker exited with 1" in written
    assert "It wrote last:" in written
    assert "RuntimeError: a broken version" in written
    assert machine.show(UNIT, "StatusText") == "generation 3 serves"
    seen = status(machine)
    assert (seen["generation"], seen["rolls"], seen["refused"]) == (3, 1, 1)


@since_notify_reload
def test_bad_deploy_that_systemd_cannot_see(machine: Machine) -> None:
    """Under Type=notify-reload a refused roll ends the reload well, and the status says what happened."""
    start_app(machine, NOTIFY_RELOAD)
    with under_load(machine):
        machine.put({APP: BROKEN})
        machine.systemctl("reload", UNIT, timeout=60)
        # READY=1, which ends the reload, comes a moment before the text.
        text = eventually(lambda: machine.show(UNIT, "StatusText"), lambda text: "refused" in text)
        assert text == "the roll to generation 2 was refused: a worker exited with 1"
        assert machine.show(UNIT, "ActiveState") == "active"
        machine.put({APP: GOOD})
        machine.systemctl("reload", UNIT, timeout=60)
    assert machine.show(UNIT, "StatusText") == "generation 3 serves"


def test_bad_first_version(machine: Machine) -> None:
    """If already the first generation fails, so does the start of the unit, with its exit code."""
    start_app(machine, EXEC_RELOAD)
    machine.systemctl("stop", UNIT)
    machine.put({APP: "import sys\nsys.exit(78)\n"})
    assert machine.run(["systemctl", "start", UNIT]).code == 1
    assert machine.show(UNIT, "ExecMainStatus") == "78"
    # As the unit says of 78, it is not tried again.
    assert machine.show(UNIT, "ActiveState") == "failed"
    assert machine.show(UNIT, "NRestarts") == "0"


@pytest.mark.parametrize("kill_mode", ["mixed", "control-group"])
def test_stop_during_a_roll(machine: Machine, kill_mode: str) -> None:
    """`systemctl stop` during a roll finishes what was begun, and ends clean in both kill modes."""
    start_app(machine, EXEC_RELOAD, f"KillMode={kill_mode}\n")
    machine.put({APP: HANGS})
    machine.systemctl("reload", "--no-block", UNIT)
    eventually(lambda: status(machine)["phase"], "rolling".__eq__, what="the roll")
    with machine.connect(8080) as client:
        client.sendall(PAGE)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")  # a worker has it
        client.sendall(PAGE[:10])
        machine.systemctl("stop", "--no-block", "hello.socket", UNIT)
        eventually(lambda: machine.show(UNIT, "ActiveState"), "deactivating".__eq__, what="the stop")
        client.sendall(PAGE[10:])
        answer = read_to_end(client)
    assert b"Connection: close\r\n" in answer
    ended = eventually(lambda: machine.show(UNIT, "ActiveState"), {"inactive", "failed"}.__contains__)
    assert ended == "inactive", machine.journal(UNIT)
    assert machine.show(UNIT, "Result") == "success"
    assert machine.show(UNIT, "ExecMainStatus") == "0"
    written = machine.journal(UNIT)
    if kill_mode == "mixed":  # else the new generation may hear of it first
        assert "the roll was given up: told to stop" in written
    assert "SIGKILL" not in written
    assert "Traceback" not in written
    with pytest.raises(ConnectionRefusedError):
        machine.connect(8080)


def read_to_end(client: socket.socket) -> bytes:
    """Read until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))
