"""`sdlisten run` under systemd, from the drop-ins that people copy: reloads, bad deploys, the stop.

Fault 41 is what systemd does to a service; it is tested here, in `test_restart` and in `test_service`.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.load import LoadProcess

from . import apps
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
    """Fault 41: `systemctl reload` rolls again and again, and of all kinds of requests none fails."""
    start(machine, EXEC_RELOAD)
    reload_again_and_again(machine, rounds(5))


@pytest.mark.timeout(300)
@since_notify_reload
def test_notify_reloads_under_load(machine: Machine, rounds: Callable[[int], int]) -> None:
    """The same with Type=notify-reload, where systemd itself sends SIGHUP and waits for READY=1."""
    start(machine, NOTIFY_RELOAD)
    reload_again_and_again(machine, rounds(5))
    assert machine.show(UNIT, "Type") == "notify-reload"


def test_bad_deploy(machine: Machine) -> None:
    """Fault 41: a version that does not start makes `systemctl reload` fail and say why."""
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
    """Fault 41: `systemctl stop` during a roll finishes what was begun, and ends clean in both kill modes."""
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


def begin(machine: Machine) -> socket.socket:
    """Return a connection that a worker serves, with a request that is only half sent."""
    client = machine.connect(8080)
    client.sendall(PAGE)
    assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
    client.sendall(PAGE[:10])
    return client


def finish(client: socket.socket) -> None:
    """Send the rest; it is answered, as the last one."""
    client.sendall(PAGE[10:])
    received = read_to_end(client)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n"), received
    assert b"Connection: close\r\n" in received


def ended_well(machine: Machine) -> None:
    """Wait until the unit has ended, and check how."""
    ended = eventually(lambda: machine.show(UNIT, "ActiveState"), {"inactive", "failed"}.__contains__)
    written = machine.journal(UNIT)
    assert ended == "inactive", written
    assert machine.show(UNIT, "Result") == "success"
    assert machine.show(UNIT, "NRestarts") == "0"
    assert "SIGKILL" not in written
    assert "killing worker" not in written


def test_restarts_under_load(machine: Machine, rounds: Callable[[int], int]) -> None:
    """Fault 41: `systemctl restart` makes clients wait, and none of their requests fails."""
    start(machine, EXEC_RELOAD)
    with under_load(machine):
        for _ in range(rounds(3)):
            machine.systemctl("restart", UNIT, timeout=60)
    assert status(machine)["generation"] == 1
    assert machine.journal(UNIT).count("sdlisten: stopped") == rounds(3)


def test_reexec_while_it_drains(machine: Machine) -> None:
    """Fault 41: systemd may execute itself anew during the drain of a roll, and of a stop."""
    start(machine, EXEC_RELOAD)
    pid = machine.show(UNIT, "MainPID")
    with begin(machine) as client:
        machine.systemctl("reload", UNIT, timeout=60)
        assert {one["state"] for one in status(machine)["generations"]} == {"serving", "draining"}
        machine.systemctl("daemon-reexec")
        finish(client)
    assert [machine.show(UNIT, name) for name in ("ActiveState", "MainPID")] == ["active", pid]
    machine.systemctl("reload", UNIT, timeout=60)
    assert status(machine)["rolls"] == 2

    with begin(machine) as client:
        machine.systemctl("stop", "--no-block", "hello.socket", UNIT)
        eventually(lambda: status(machine)["phase"], "stopping".__eq__, what="the stop")
        machine.systemctl("daemon-reexec")
        finish(client)
    ended_well(machine)


# What begins to count when the stop does.
SHORT = {"TimeoutStopSec": "TimeoutStopSec=2\n", "watchdog": "WatchdogSec=1\n"}


@pytest.mark.parametrize("limit", SHORT)
def test_drain_longer_than_a_limit(machine: Machine, limit: str) -> None:
    """Fault 41: a drain may outlast TimeoutStopSec= and WatchdogSec=: it asks for time, and shows life."""
    start_app(machine, EXEC_RELOAD, SHORT[limit])
    with begin(machine) as client:
        machine.systemctl("stop", "--no-block", "hello.socket", UNIT)
        began = eventually(lambda: status(machine), lambda now: now["phase"] == "stopping", what="the stop")
        eventually(lambda: status(machine)["uptime"], lambda now: now > began["uptime"] + 3, what="3 s")
        finish(client)
    ended_well(machine)


@pytest.mark.parametrize("units", [["hello.socket"], ["hello.socket", UNIT]], ids=["socket", "both"])
def test_restart_of_the_socket(machine: Machine, units: list[str], rounds: Callable[[int], int]) -> None:
    """Fault 41: whoever restarts the socket gets a new one, and a service on it; what was begun is finished.

    Allowed: clients are refused or reset while there is no socket.
    """
    start(machine, EXEC_RELOAD)
    for _ in range(rounds(3)):
        machine.systemctl("reset-failed", "hello.socket")  # forgets how often it was started: 5 in 10 s
        with begin(machine) as client:
            machine.systemctl("restart", "--no-block", *units)
            eventually(lambda: status(machine)["phase"], "stopping".__eq__, what="the stop")
            finish(client)
        eventually(
            lambda: machine.systemctl("list-jobs", "--no-legend"), "".__eq__, what="the end of the jobs"
        )
        assert machine.show("hello.socket", "ActiveState") == "active", machine.journal("hello.socket", UNIT)
        apps.get(machine)
        assert machine.show(UNIT, "ActiveState") == "active"
        assert '"systemd",pid=1' in machine.sh("ss -Hltnp sport = :8080")
    assert "bound name=" not in machine.journal(UNIT)
    machine.systemctl("reload", UNIT, timeout=60)


def read_to_end(client: socket.socket) -> bytes:
    """Read until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))
