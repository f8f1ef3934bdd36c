"""What clients, the kernel and the clock do to a roll: faults as in `test_supervisor`, by the same numbers.

Unless a docstring allows it, no request is refused, reset, or left without its whole answer. After each test
the supervisor has the descriptors it had before, no process is left, and the port is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sdlisten.load import LoadProcess

from .supervised import SECONDS, answer, app, children, descriptors, gone, is_free, supervisors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from .supervised import Running

BIG = 10_000_000

# A daemon on `sdlisten.serve`, with requests that are not over in a moment.
SERVICE = r"""
import asyncio, os
import sdlisten

draining = asyncio.Event()

def told_to_drain(connection):
    draining.set()

def page(connection, body):
    close = "close" if connection.closing else "keep-alive"
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: {close}\r\n\r\n"
    return head.encode() + body

async def handler(connection):
    reader, writer = connection.streams()
    body = f"{os.getpid()} {os.environ['SDLISTEN_GENERATION']} \n".encode()
    while await connection.idle():
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1]
        if path == b"/big":
            writer.write(page(connection, bytes(#BIG)))
        elif path == b"/late":
            print("late", flush=True)
            await draining.wait()
            writer.write(page(connection, body))
        elif path == b"/upload":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            writer.write(page(connection, body))
        elif path in {b"/events", b"/socket"}:
            events = path == b"/events"
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" if events else b"HTTP/1.1 101 Switching\r\n\r\n")
            await draining.wait()
            # RFC 6455, 7.4: 1012 is "service restart".
            writer.write(b"data: bye\n\n" if events else b"\x88\x02\x03\xf4")
            return
        else:
            writer.write(page(connection, body))
        await writer.drain()
        if connection.closing:
            return

sdlisten.serve(handler, #OPTIONS)
"""

HALF_AN_UPLOAD = 50_000
PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def service(**options: float) -> str:
    """Return that program, with options of `sdlisten.Service`."""
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return SERVICE.replace("#BIG", str(BIG)).replace("#OPTIONS", words or "on_drain=told_to_drain")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Give a function that starts a supervisor; afterwards one generation serves, then nothing is left."""
    started: list[tuple[Running, list[str]]] = []
    with supervisors(tmp_path) as start:

        def begin(*options: str, text: str, command: Sequence[str] | None = None) -> Running:
            running = start(*options, text=text, command=command)
            started.append((running, opened(running)))
            return running

        yield begin
        for running, before in started:
            assert_clean(running, before)


def opened(running: Running) -> list[str]:
    """Return what the supervisor has open while one generation serves."""
    running.settled()
    return descriptors(running.daemon.pid)


def assert_clean(running: Running, before: list[str]) -> None:
    """Check what has to be true whatever a test did: descriptors, processes, the port."""
    assert opened(running) == before
    pids = running.pids()
    assert children(running.daemon.pid) == sorted(pids)
    assert "Traceback" not in running.daemon.output
    assert running.daemon.terminate(SECONDS) == 0
    for pid in pids:
        gone(pid)
    running.daemon.listeners.close()
    assert is_free(running.address)


@pytest.fixture
def serve(run: Callable[..., Running], tmp_path: Path) -> Callable[..., Running]:
    """Give a function that starts a supervisor of `SERVICE`."""
    command = [sys.executable, str(tmp_path / "app.py")]
    return lambda *options, text="": run(*options, text=text or service(), command=command)


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    """Give a function that connects, and sends; closed afterwards."""
    with contextlib.ExitStack() as stack:

        def begin(running: Running, sends: bytes = b"", *, buffer: int = 0) -> socket.socket:
            sock = stack.enter_context(socket.socket())
            sock.settimeout(SECONDS)
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.connect(running.address)
            sock.sendall(sends)
            return sock

        yield begin


def page_of(path: str) -> bytes:
    """Write a request for a path of `SERVICE`."""
    return PAGE.replace(b" / ", f" {path} ".encode())


def read_all(sock: socket.socket) -> bytes:
    """Read to the end, or to the reset that comes instead."""
    received: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        received.extend(iter(lambda: sock.recv(1 << 16), b""))
    return b"".join(received)


def drains(running: Running) -> list[dict[str, int]]:
    """Return the counts of the drains that are over."""
    lines = re.findall(r"drained in [\d.]+ s: (.*)", running.daemon.output)
    return [{name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)} for line in lines]


def generation(received: bytes) -> int:
    """Return which generation answered."""
    return int(received.split()[-1])


def take_descriptors(pid: int) -> tuple[int, int]:
    """Leave a process no number for another descriptor; returns the limits that it had."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - taken), limits[1]))
    return limits


def test_a_version_that_never_accepts(
    run: Callable[..., Running], connect: Callable[..., socket.socket]
) -> None:
    """Fault 6: READY=1, and never accepts: clients wait, `ctl status` shows it, a good roll answers all."""
    running = run(text=app())
    running.deploy(app(ready="signal.pause()"))
    assert running.roll()["code"] == 0
    running.settled()
    clients = [connect(running, PAGE) for _ in range(8)]
    running.until(lambda facts: facts["listeners"][0]["queued"] == len(clients))
    words = [sys.executable, "-m", "sdlisten", "ctl", "--control", running.control, "status", "--json"]
    seen = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    assert (seen["listeners"][0]["queued"], seen["generation"]) == (len(clients), 2)

    running.deploy(app())
    assert running.roll()["code"] == 0
    assert {generation(read_all(client)) for client in clients} == {3}


def test_requests_that_cross_an_idle_close(
    serve: Callable[..., Running], rounds: Callable[[int], int]
) -> None:
    """Fault 24: a request that comes as its connection is closed for silence is answered, or was never begun.

    Each client asks every 0.2 s, and the old generations close after about that. Allowed: no byte of an
    answer, on a connection that was closed for its silence, and counted so. A client may then ask again.
    """
    timeouts = [0.15, 0.199, 0.1995, 0.2, 0.2005, 0.25] * rounds(1)
    running = serve(text=service(idle_timeout=timeouts[0]))
    with LoadProcess(running.word, mode="keep", clients=50, rate=250, quiet=True) as load:
        load.wait_started()
        for seconds in [*timeouts[1:], 2]:
            running.deploy(service(idle_timeout=seconds))
            assert running.roll()["code"] == 0
            running.settled()
        result = load.stop()

    counts = drains(running)
    assert len(counts) == len(timeouts)
    closed = sum(one["closed_idle"] + one["dropped"] for one in counts)
    assert result.failed == result.reset + result.empty, result
    assert result.failed + result.closed_idle <= closed, result
    assert closed > 0
    assert result.close_announced > 0


def test_a_slow_reader(serve: Callable[..., Running], connect: Callable[..., socket.socket]) -> None:
    """Fault 25: who takes 10 MB in time gets them; allowed: who takes nothing is cut off, and counted."""
    running = serve("--drain-timeout", "3", text=service(drain_timeout=3))
    never, slow = (connect(running, page_of("/big"), buffer=1 << 16) for _ in range(2))
    assert [sock.recv(1, socket.MSG_PEEK) for sock in (never, slow)] == [b"H"] * 2
    with LoadProcess(running.word, mode="short", clients=4, rate=50, quiet=True) as load:
        load.wait_started()
        running.roll()
        running.reads("draining: open=2")
        assert answer(slow).endswith(bytes(BIG))
        running.settled()
        result = load.stop()

    assert result.clean, result
    assert [one["dropped"] for one in drains(running)] == [1]
    assert len(read_all(never)) < BIG
    assert running.status()["killed"] == 0


def test_an_upload(serve: Callable[..., Running], connect: Callable[..., socket.socket]) -> None:
    """Fault 26: an upload that was begun is taken and answered, whether it had its 100 Continue or not."""
    running = serve()
    head = b"PUT /upload HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 100000\r\n\r\n"
    begun, asking = connect(running, head), connect(running, head[:30])
    assert begun.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    begun.sendall(bytes(HALF_AN_UPLOAD))
    running.roll()
    running.reads("draining: open=2")

    asking.sendall(head[30:])
    assert asking.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    for client, rest in (begun, HALF_AN_UPLOAD), (asking, 2 * HALF_AN_UPLOAD):
        client.sendall(bytes(rest))
        received = answer(client)
        assert (b"Connection: close" in received, generation(received)) == (True, 1)
        assert read_all(client) == b""
    running.settled()
    assert [one["dropped"] for one in drains(running)] == [0]


@pytest.mark.parametrize("heeds", [True, False])
def test_streams_that_never_end(
    serve: Callable[..., Running], connect: Callable[..., socket.socket], *, heeds: bool
) -> None:
    """Fault 27: streams of events and WebSockets are told to end; allowed: who is not is cut off, counted."""
    running = serve("--drain-timeout", "1", text=service() if heeds else service(drain_timeout=1))
    events, web = connect(running, page_of("/events")), connect(running, page_of("/socket"))
    assert events.recv(1000).startswith(b"HTTP/1.1 200")
    assert web.recv(1000).startswith(b"HTTP/1.1 101")
    with LoadProcess(running.word, mode="short", clients=4, rate=50, quiet=True) as load:
        load.wait_started()
        running.roll()
        ends = [read_all(events), read_all(web)]
        running.settled()
        result = load.stop()

    assert result.clean, result
    assert ends == ([b"data: bye\n\n", b"\x88\x02\x03\xf4"] if heeds else [b"", b""])
    assert [one["dropped"] for one in drains(running)] == [0 if heeds else 2]
    assert running.status()["killed"] == 0


def test_half_closed_clients(serve: Callable[..., Running], connect: Callable[..., socket.socket]) -> None:
    """Fault 28: who will send no more gets its answer all the same, also from the queue.

    Allowed: no answer to half a request, of which nothing more will come.
    """
    running = serve("--drain-timeout", "60")
    (old,) = running.pids()
    late, half = connect(running, page_of("/late")), connect(running, PAGE[:9])
    running.reads("late")
    for client in late, half:
        client.shutdown(socket.SHUT_WR)
    assert read_all(half) == b""
    os.kill(old, signal.SIGSTOP)
    queued = connect(running, PAGE)
    queued.shutdown(socket.SHUT_WR)
    assert running.roll()["code"] == 0
    assert generation(read_all(queued)) == 2

    os.kill(old, signal.SIGCONT)
    assert generation(read_all(late)) == 1
    running.settled()
    assert [one["dropped"] for one in drains(running)] == [0]


def test_no_descriptor_for_a_client_in_the_old_generation(
    serve: Callable[..., Running], connect: Callable[..., socket.socket]
) -> None:
    """Fault 30: who cannot be accepted for want of descriptors waits, and the next generation answers."""
    running = serve()
    (old,) = running.pids()
    take_descriptors(old)
    clients = [connect(running, PAGE) for _ in range(5)]
    running.reads("Too many open files")

    assert running.roll()["code"] == 0
    assert {generation(answer(client)) for client in clients} == {2}


def test_no_descriptor_for_a_client_in_the_new_generation(
    serve: Callable[..., Running], connect: Callable[..., socket.socket]
) -> None:
    """Fault 30: in the soak the old one answers; when it is gone clients wait until there are descriptors."""
    running = serve("--soak", "60")
    (old,) = running.pids()
    running.ask("roll")
    running.until(lambda facts: facts["phase"] == "soaking")
    (new,) = running.pids("soaking")
    limits = take_descriptors(new)
    with LoadProcess(running.word, mode="short", clients=8, rate=200, quiet=True) as load:
        load.wait_started()
        running.reads("Too many open files")
        result = load.stop()
    assert result.clean, result
    assert list(result.pids) == [old]
    os.kill(old, signal.SIGKILL)
    gone(old)
    clients = [connect(running, PAGE) for _ in range(5)]
    running.until(lambda facts: facts["listeners"][0]["queued"] == len(clients))

    resource.prlimit(new, resource.RLIMIT_NOFILE, limits)
    assert {generation(answer(client)) for client in clients} == {2}


def test_clients_that_reset_in_the_queue(
    serve: Callable[..., Running], connect: Callable[..., socket.socket]
) -> None:
    """Fault 31: connections that their clients reset before they are accepted cost the others nothing."""
    running = serve("--drain-timeout", "60")
    (old,) = running.pids()
    os.kill(old, signal.SIGSTOP)
    clients = []
    for _ in range(20):
        leaves = connect(running, PAGE)
        leaves.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaves.close()
        clients.append(connect(running, PAGE))

    assert running.roll()["code"] == 0
    assert {generation(answer(client)) for client in clients} == {2}
    os.kill(old, signal.SIGCONT)
    facts = running.settled()
    assert (facts["restarts"], facts["killed"]) == (0, 0)


# PID 1 of a namespace of its own, where the next pid can be chosen: pid_namespaces(7). /proc is still the
# one outside, because a container lets nobody mount another; the supervisor has to bear with that, too.
REUSE = """
import json, os, select, subprocess, sys
from sdlisten.supervisor import ctl
control, *command = sys.argv[1:]

def until(wanted):
    while True:
        facts = ctl.ask(control, {"do": "status"}).get("status")
        if facts and wanted(facts):
            return facts
        select.select([], [], [], 0.01)

def pids(facts, state):
    found = [one["workers"] for one in facts["generations"] if one["state"] == state]
    return {worker["pid"] for workers in found for worker in workers}

subprocess.Popen(command)
old = pids(until(lambda facts: facts["phase"] == "serving"), "serving")
ctl.ask(control, {"do": "roll", "wait": True}, timeout=30)
(left,) = pids(until(lambda facts: len(pids(facts, "draining")) == 1), "draining")
(free,) = old - {left}
with open("/proc/sys/kernel/ns_last_pid", "w") as last:
    last.write(str(free - 1))
innocent = subprocess.Popen(["sleep", "1000"], start_new_session=True)
until(lambda facts: facts["killed"] == 1 and not pids(facts, "draining"))
print(json.dumps([innocent.pid == free, innocent.poll()]))
print(ctl.ask(control, {"do": "stop", "wait": True}, timeout=30)["code"])
"""


def test_a_pid_that_is_used_again(tmp_path: Path) -> None:
    """Fault 39: a drain's limit kills who is left of a generation, not a stranger with the pid of another."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a pid namespace of its own: unshare(2) is forbidden here")
    program = tmp_path / "app.py"
    # The first that is told to stop waits for the lifeline, the other one ends.
    lock = f"os.open({str(tmp_path / 'first')!r}, os.O_CREAT | os.O_EXCL)"
    stop = f"try: {lock}\nexcept FileExistsError: raise SystemExit\nselect.select([4], [], [])"
    program.write_text(app(stop=stop))
    control = str(tmp_path / "control")
    words = [sys.executable, "-m", "sdlisten", "run", "--control", control, "--workers", "2"]
    words += ["--drain-timeout", "1", "-l", "127.0.0.1:0", "--", sys.executable, "-I", "-S", str(program)]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", REUSE, control, *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )

    assert done.stdout.splitlines() == ["[true, null]", "0"], done


# Read by each Python that starts: a wall clock that is an hour off, now this way and now that, at each look.
WALL_CLOCK = """
import itertools, sys, time
def jumping(read, hour):
    steps = itertools.cycle([hour, -hour])
    return lambda: read() + next(steps)
time.time, time.time_ns = jumping(time.time, 3600.0), jumping(time.time_ns, 3600 * 10**9)
print("the wall clock jumps", file=sys.stderr, flush=True)
"""


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """Fault 40: limits, watchdogs and drains keep to the monotonic clock, however the other one jumps."""
    (tmp_path / "sitecustomize.py").write_text(WALL_CLOCK)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ["--watchdog", "5", "--soak", "0.5", "--ready-timeout", "20", "--drain-timeout", "20"]
    with supervisors(tmp_path) as start:
        running = start(
            *options,
            text=service(),
            env={"PYTHONPATH": path, "WATCHDOG_USEC": "3000000"},
            command=[sys.executable, str(tmp_path / "app.py")],
        )
        before = opened(running)
        with LoadProcess(running.word, mode="keep", clients=8, rate=80, quiet=True) as load:
            load.wait_started()
            for _ in range(2):
                assert running.roll()["code"] == 0
                running.settled()
            running.says("WATCHDOG", 2)
            result = load.stop()
        assert result.clean, result
        facts = running.status()
        assert (facts["rolls"], facts["refused"], facts["restarts"], facts["killed"]) == (2, 0, 0, 0)
        assert 0 <= facts["uptime"] < 60
        assert all(
            seconds < 20
            for seconds in map(float, re.findall(r"drained in ([\d.]+) s", running.daemon.output))
        )
        # The command, the supervisor that it became, and three generations.
        assert running.daemon.output.count("the wall clock jumps") == 5
        assert_clean(running, before)


def test_who_is_killed_first_if_memory_runs_out(run: Callable[..., Running]) -> None:
    """Fault 43: the kernel is to take a generation on trial, with its children, before the one that serves.

    Afterwards they are as all others, except who has chosen for itself. What the kernel makes of it is tested
    in a container.
    """
    forks = """
for choice in "0", "777":
    if not os.fork():
        if choice != "0":
            open("/proc/self/oom_score_adj", "w").write(choice)
        print(f"forked {choice}.", flush=True)
        select.select([4], [], [])  # the lifeline
        os._exit(0)
"""
    running = run("--soak", "60", text=app())
    (old,) = running.pids()
    usual = out_of_memory(os.getpid())
    running.deploy(app(forks))
    running.ask("roll")
    running.until(lambda facts: facts["phase"] == "soaking")
    for choice in 0, 777:
        running.reads(f"forked {choice}.")
    (new,) = running.pids("soaking")
    assert [out_of_memory(pid) for pid in (old, new)] == [usual, 1000]
    assert sorted(out_of_memory(pid) for pid in children(new)) == [777, 1000]

    os.kill(old, signal.SIGKILL)  # which ends the soak
    running.settled()
    assert out_of_memory(new) == usual
    assert sorted(out_of_memory(pid) for pid in children(new)) == [usual, 777]
    for pid in children(new):
        os.kill(pid, signal.SIGKILL)


def out_of_memory(pid: int) -> int:
    """Return what the kernel adds to its wish to kill a process."""
    with open(f"/proc/{pid}/oom_score_adj", encoding="ascii") as file:
        return int(file.read())
