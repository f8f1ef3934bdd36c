"""A daemon on Service under real systemd: ready, reload, watchdog, and an end that loses nobody."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from typing import TYPE_CHECKING

import pytest

from sdlisten.load import LoadProcess

from . import apps
from .container import eventually
from .machine import UNITS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from sdlisten.load import Result

    from .machine import Machine

PORT = 7300
CONFIG = "/opt/worker.conf"
DROP_INS = UNITS / "hello.service.d"
CLIENTS = 8
# Requests per second and clients of each mode: three loads share two cores with the daemon and systemd.
LOADS = {"short": (100.0, 24), "slow": (0.0, 24), "keep": (300.0, 24)}

WORKER = {
    "worker.socket": f"""
        [Socket]
        ListenStream={PORT}
        TriggerLimitIntervalSec=0
    """,
    "worker.service": f"""
        [Unit]
        StartLimitIntervalSec=0
        [Service]
        Type=notify
        ExecStart={" ".join(apps.command("worker"))}
        NonBlocking=yes
        KillMode=mixed
        Restart=on-failure
    """,
}


@pytest.fixture
def worker(machine: Machine) -> Machine:
    """A machine with worker.socket, and nobody behind it yet."""
    apps.install(machine)
    machine.put({CONFIG: "0 at start"})
    machine.units(extra=WORKER)
    machine.systemctl("start", "worker.socket")
    return machine


@pytest.fixture
def hello(machine: Machine) -> Machine:
    """A machine with hello.socket, and nobody behind it yet."""
    machine.units("hello.socket", "hello.service")
    machine.systemctl("start", "hello.socket")
    return machine


class Client:
    """A connection to a worker."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def send(self, line: str) -> None:
        """Send a request."""
        self.sock.sendall(f"{line}\n".encode())

    def receive(self) -> str:
        """Receive an answer; "" at the end of the connection."""
        try:
            return self._file.readline().decode().strip()
        except ConnectionResetError:
            return ""

    def ask(self, line: str) -> str:
        """Send a request and receive the answer."""
        self.send(line)
        return self.receive()


@contextlib.contextmanager
def client(machine: Machine) -> Iterator[Client]:
    """Connect to the worker of a machine."""
    with machine.connect(PORT) as sock:
        sock.settimeout(30)
        yield Client(sock)


def ask(machine: Machine, line: str) -> str:
    """Ask the worker of a machine, on a new connection."""
    with client(machine) as one:
        return one.ask(line)


def drop_in(machine: Machine, name: str, unit: str = "worker.service") -> None:
    """Install one of the drop-ins for hello.service, for that or another unit."""
    machine.units(extra={f"{unit}.d/drop-in.conf": (DROP_INS / name).read_text()})


def way_to_reload(machine: Machine) -> str:
    """Return the name of the drop-in by which this version of systemd reloads."""
    return "notify-reload.conf" if machine.release.systemd >= 253 else "reload-252.conf"


def test_drop_ins_are_clean(hello: Machine) -> None:
    """`systemd-analyze verify` has nothing to say to the drop-ins that are meant for this version."""
    for name in ["notify.conf", way_to_reload(hello)]:
        drop_in(hello, name, "hello.service")
        assert hello.run(["systemd-analyze", "verify", "hello.socket", "hello.service"]).output == ""


def test_ready_gates_start(hello: Machine) -> None:
    """`systemctl start` returns when the daemon accepts, however long it takes to get there."""
    drop_in(hello, "notify.conf", "hello.service")
    hello.units(extra={"hello.service.d/slow.conf": "[Service]\nEnvironment=HELLO_START_DELAY=1\n"})

    hello.systemctl("start", "hello.service")

    began, ready = (
        int(hello.show("hello.service", name))
        for name in ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    )
    assert ready - began >= 1_000_000
    assert str(apps.get(hello)) == hello.show("hello.service", "MainPID")


def test_reload_returns_when_it_is_complete(worker: Machine) -> None:
    """What the daemon has read anew is in force when `systemctl reload` returns, however long it took."""
    drop_in(worker, way_to_reload(worker))
    pid = ask(worker, "pid")
    for number, seconds in enumerate((0, 0.3, 0, 0.3)):
        worker.put({CONFIG: f"{seconds} number {number}"})
        worker.systemctl("reload", "worker.service")
        assert ask(worker, "config") == f"number {number}"
    assert ask(worker, "pid") == pid


def test_failing_reload(worker: Machine) -> None:
    """Fault 41: a reload that fails leaves all as it was, and says why; a good one clears that."""
    drop_in(worker, way_to_reload(worker))
    pid = ask(worker, "pid")
    worker.put({CONFIG: "0.1 bad luck"})

    worker.systemctl("reload", "worker.service")

    status = worker.systemctl("status", "worker.service")
    assert re.search(r"Active: active \(running\)", status)
    assert re.search(r"Status: \"reload failed: OSError\(8, 'bad luck'\)\"", status)
    assert re.search(r"Error: .*8 \(Exec format error\)", status)
    assert (ask(worker, "config"), ask(worker, "pid")) == ("at start", pid)

    worker.put({CONFIG: "0 mended"})
    worker.systemctl("reload", "worker.service")
    assert ask(worker, "config") == "mended"
    assert [worker.show("worker.service", name) for name in ("StatusText", "StatusErrno")] == ["", "0"]


def test_watchdog(worker: Machine) -> None:
    """A daemon whose loop stands still is killed and started again, also if no client waits."""
    drop_in(worker, "notify.conf")
    worker.units(extra={"worker.service.d/often.conf": "[Service]\nWatchdogSec=1\n"})
    pid = ask(worker, "pid")
    with client(worker) as hung:
        hung.send("hang")
        assert hung.receive() == ""
    eventually(
        lambda: worker.show("worker.service", "MainPID"), lambda now: now not in {"0", pid}, what="a restart"
    )
    assert ask(worker, "pid") == worker.show("worker.service", "MainPID")
    assert worker.show("worker.service", "NRestarts") == "1"
    assert "Watchdog timeout" in worker.journal("worker.service")


def stop_while_answering(machine: Machine, seconds: float) -> list[str]:
    """Stop the worker while it owes each of CLIENTS an answer that takes so long; return what they get."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(machine)) for _ in range(CLIENTS)]
        for one in clients:
            assert one.ask("pid")
            one.send(f"wait {seconds}")
        # A later answer on the same loop: all of the above were read.
        assert ask(machine, "pid")
        machine.systemctl("stop", "worker.service")
        return [one.receive() for one in clients]


def test_drain_longer_than_the_timeout(worker: Machine) -> None:
    """Fault 41: the drain asks for the time that it takes: TimeoutStopSec= may be shorter. Nobody is lost."""
    drop_in(worker, "notify.conf")
    worker.units(extra={"worker.service.d/short.conf": "[Service]\nTimeoutStopSec=2\n"})
    pid = ask(worker, "pid")

    assert stop_while_answering(worker, 2.8) == [pid] * CLIENTS

    assert worker.show("worker.service", "Result") == "success"
    journal = worker.journal("worker.service")
    assert f"draining: open={CLIENTS}" in journal
    assert re.search(rf"drained in .* finished={CLIENTS} .* dropped=0", journal)


def test_drain_that_is_cut_off(worker: Machine) -> None:
    """Where the manager does not listen it kills: the last line in the journal says how many were open."""
    mute = "[Service]\nType=exec\nNotifyAccess=none\nTimeoutStopSec=2\n"
    worker.units(extra={"worker.service.d/mute.conf": mute})
    ask(worker, "pid")

    lost = stop_while_answering(worker, 2.8).count("")

    assert worker.show("worker.service", "Result") == "timeout"
    left = re.findall(r"draining: open=(\d+)", worker.journal("worker.service"))
    assert lost == CLIENTS
    assert int(left[-1]) >= lost


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kill_mode", ["mixed", "control-group"])
def test_restart_and_stop_under_load(hello: Machine, rounds: Callable[[int], int], kill_mode: str) -> None:
    """Fault 41: 20 restarts and stops lose no request of any mode; what ends idle is counted."""
    drop_in(hello, "notify.conf", "hello.service")
    hello.units(extra={"hello.service.d/kill.conf": f"[Service]\nKillMode={kill_mode}\n"})
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                LoadProcess(f"{hello.ip}:8080", mode=mode, rate=rate, clients=clients, timeout=60)
            )
            for mode, (rate, clients) in LOADS.items()
        ]
        for load in loads:
            load.wait_started()
        for _ in range(rounds(20)):
            hello.systemctl("restart", "hello.service")
            apps.get(hello)
            # The clients start it again.
            hello.systemctl("stop", "hello.service")
            apps.get(hello)
        results = [load.stop() for load in loads]
        hello.systemctl("stop", "hello.service")
    drained = drains(hello)
    report(f"{hello.release.id} KillMode={kill_mode}, {len(drained) - 1} times", results, drained, began)

    assert len(drained) == 2 * rounds(20) + 1
    for result in results:
        assert result.clean, result
        assert len(result.pids) > rounds(20)
        assert result.closed_idle <= sum(one["closed_idle"] for one in drained)
    assert sum(one["dropped"] for one in drained) == 0


def drains(machine: Machine) -> list[dict[str, int]]:
    """Return what the daemon has logged of its drains, each as its counts."""
    lines = re.findall(r"drained in [\d.]+ s: (.*)", machine.journal("hello.service"))
    return [{name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)} for line in lines]


def report(what: str, results: list[Result], drained: list[dict[str, int]], began: float) -> None:
    """Print what was measured."""
    sums = {name: sum(one[name] for one in drained) for name in drained[0]}
    sys.stdout.write(f"\n{what}, {time.monotonic() - began:.1f} s; drains: {sums}\n")
    for result in results:
        sys.stdout.write(
            f"  {result.mode}: {result.requests} requests, {result.failed} failed, {len(result.pids)} pids, "
            f"closed idle {result.closed_idle}, announced {result.close_announced}, "
            f"p99 {result.p99 * 1e3:.0f} ms, max {result.max * 1e3:.0f} ms\n"
        )


def test_idle_connections_are_counted(hello: Machine) -> None:
    """Connections that are silent for longer than the daemon waits are closed without a word, and counted."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(hello.connect(8080)) for _ in range(CLIENTS)]
        for sock in idle:
            sock.sendall(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"Connection: keep-alive" in sock.recv(65536)
        hello.systemctl("restart", "hello.service")
        assert [sock.recv(1) for sock in idle] == [b""] * CLIENTS
    assert [one["closed_idle"] for one in drains(hello)] == [CLIENTS]


def test_exit_on_idle(worker: Machine, rounds: Callable[[int], int]) -> None:
    """Clients that come at the very moment of an exit for want of them are answered, by the next start."""
    command = " ".join(apps.command("worker", "0"))
    worker.units(extra={"worker.service.d/idle.conf": f"[Service]\nExecStart=\nExecStart={command}\n"})

    pids = [ask(worker, "pid") for _ in range(rounds(34))]

    assert all(pid.isdigit() for pid in pids)
    assert len(set(pids)) > 1
    assert worker.systemctl("is-active", "worker.socket") == "active"


def test_one_process_for_each_connection(machine: Machine) -> None:
    """Started by Accept=yes, the daemon answers its one client and ends well."""
    machine.units("hello-accept.socket", "hello-accept@.service")
    machine.systemctl("start", "hello-accept.socket")

    pids = {apps.get(machine, 8081) for _ in range(3)}

    assert len(pids) == 3
    instances = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "hello-accept@*.service"]
    eventually(lambda: machine.sh(instances), "".__eq__, what="the end of all instances")
    journal = machine.journal("hello-accept@*.service")
    assert journal.count("drained in ") == 3
    assert "Failed with result" not in journal
