"""What a restart of the service costs its clients, and what nothing may ever do to the socket: promise 1."""

from __future__ import annotations

import contextlib
import statistics
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.load import LoadProcess

from . import apps
from .container import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .machine import Machine

PORT, PATH = "*:8080", "/run/hello.sock"
QUEUED = 300

UNIX_TOO = "[Socket]\nListenStream=/run/hello.sock\nSocketMode=0660\n"
# The service starts when somebody opens the FIFO to write into it.
GATE = "[Service]\nExecStartPre=/bin/cat /run/gate\n"
# Without the ration of RestartSec=, as fast as systemd can; and the third start in 10 s, the third trigger in
# 2 s would be too many, had the intervals not been set to 0.
DIES_AT_ONCE = """
    [Unit]
    StartLimitBurst=2
    [Service]
    ExecStart=
    ExecStart=/bin/false
    Restart=no
"""
TRIGGERED_SELDOM = "[Socket]\nTriggerLimitBurst=2\n"
DEATHS = 6

CARELESS = {
    "careless.socket": """
        [Socket]
        ListenStream=7100
        ListenStream=/run/careless.sock
        SocketMode=0640
        Backlog=77
        FileDescriptorName=web
    """,
    "careless.service": f"[Service]\nExecStart={' '.join(apps.command('careless'))}\n",
}


@pytest.fixture
def hello(machine: Machine) -> Machine:
    """A machine with hello.socket, listening on a port and a path, and nobody behind it yet."""
    apps.install(machine)
    machine.units("hello.socket", "hello.service", extra={"hello.socket.d/path.conf": UNIX_TOO})
    machine.systemctl("start", "hello.socket")
    return machine


def is_active(machine: Machine, unit: str) -> str:
    """Return the state of a unit."""
    return machine.systemctl("is-active", unit, check=False)


def send_request(machine: Machine) -> socket.socket:
    """Connect, send a request, and do not wait for the answer."""
    connection = machine.connect(8080)
    connection.sendall(apps.REQUEST)
    return connection


def test_first_connection_starts_the_service(hello: Machine) -> None:
    """Nothing runs until the first client comes; it is answered by the main process of the service."""
    assert is_active(hello, "hello.service") == "inactive"

    pid = apps.get(hello)

    assert is_active(hello, "hello.service") == "active"
    assert hello.show("hello.service", "MainPID") == str(pid)


@pytest.mark.timeout(300)
def test_restarts_under_load(hello: Machine, rounds: Callable[[int], int]) -> None:
    """Fault 41: no request is lost in 20 restarts, and the sockets are the same all the time."""
    times = rounds(20)
    with LoadProcess(f"{hello.ip}:8080", mode="short", rate=300, timeout=40) as load:
        load.wait_started()
        seen = apps.restart(hello, times, PORT, PATH)
        result = load.stop()
    sys.stdout.write(f"{result}\nmedian of a restart: {statistics.median(seen['seconds']):.3f} s\n")

    assert result.clean, result
    assert len(set(seen["pids"])) == times + 1
    (state,) = seen["facts"]
    assert {address: found["backlog"] for address, found in state.items()} == {PORT: 4096, PATH: 4096}
    assert state[PATH]["mode"] == "0o140660"


def test_stop_leaves_the_socket_alone(hello: Machine) -> None:
    """`systemctl stop` of the service takes nothing from the sockets, and the next client starts it again."""
    before = apps.facts(hello, PORT, PATH)
    first = apps.get(hello)

    hello.systemctl("stop", "hello.service")

    assert is_active(hello, "hello.service") == "inactive"
    assert is_active(hello, "hello.socket") == "active"
    assert apps.facts(hello, PORT, PATH) == before
    assert apps.get(hello) != first


def test_queue_built_up_while_down(hello: Machine) -> None:
    """Who comes while the service is down or slow to start waits in the queue, and is answered."""
    hello.units(extra={"hello.service.d/gate.conf": GATE})
    hello.sh("mkfifo --mode=644 /run/gate")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(send_request(hello)) for _ in range(QUEUED)]
        assert hello.sh("ss -Hltn sport = :8080").split()[1] == str(QUEUED)
        hello.sh("echo >/run/gate; rm /run/gate")
        pids = {apps.pid_of(apps.read(connection)) for connection in connections}

    assert {hello.show("hello.service", "MainPID")} == {str(pid) for pid in pids}


def test_limits_do_not_take_the_socket_down(hello: Machine) -> None:
    """Fault 41: a service that dies again and again leaves the socket open; mended, it answers all."""
    drop_ins = {"hello.service.d/dies.conf": DIES_AT_ONCE, "hello.socket.d/seldom.conf": TRIGGERED_SELDOM}
    hello.units(extra=drop_ins)
    before = apps.facts(hello, PORT, PATH)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(send_request(hello)) for _ in range(QUEUED)]
        follow = "journalctl --follow --lines=0 --output=cat --unit=hello.service"
        hello.sh(f"{follow} | grep --max-count={DEATHS} 'Main process exited'")
        assert is_active(hello, "hello.socket") == "active"
        hello.sh("rm /etc/systemd/system/hello.service.d/dies.conf; systemctl daemon-reload")
        pids = {apps.pid_of(apps.read(connection)) for connection in connections}

    assert len(pids) == 1
    assert apps.facts(hello, PORT, PATH) == before


def test_share_in_careless_hands(machine: Machine) -> None:
    """What listen(1), shutdown() and a server do to a share() changes nothing for us and for systemd."""
    addresses = ("*:7100", "/run/careless.sock")
    apps.install(machine)
    machine.units(extra=CARELESS)
    machine.systemctl("start", "careless.socket")
    before = apps.facts(machine, *addresses)
    assert {found["backlog"] for found in before.values()} == {77}

    told: list[dict[str, Any]] = []
    for client in ("127.0.0.1:7100", "/run/careless.sock"):
        told += apps.ask(machine, client)[client]
        # It has closed all that it had; systemd listens again.
        eventually(lambda: is_active(machine, "careless.service"), "inactive".__eq__, what="its end")
        assert apps.facts(machine, *addresses) == before

    as_it_was = {"shutdown": "PermissionError", "backlog": 77}
    assert told == [{"address": "7100", **as_it_was}, {"address": "/run/careless.sock", **as_it_was}] * 2
