"""The small parts of the supervisor: loop, stderr, descriptor store, priorities, control socket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.notifier import Notifier
from sdlisten.receiver import Receiver
from sdlisten.spawn import spawn
from sdlisten.supervisor import nice, output
from sdlisten.supervisor.control import LINE_MAX, Client, Control
from sdlisten.supervisor.loop import Loop, Signals
from sdlisten.supervisor.output import Output, Tail, say
from sdlisten.supervisor.phase import Phase
from sdlisten.supervisor.process import Process
from sdlisten.supervisor.store import STORE_MAX, Store, store_max
from sdlisten.supervisor.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give two sockets that are connected."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_the_loop_calls_back(pair: tuple[socket.socket, socket.socket]) -> None:
    """As often as there is something to read, until it is forgotten; forgetting twice is harmless."""
    loop = Loop()
    events: list[int] = []
    loop.watch(pair[0].fileno(), events.append)
    loop.wait(0)
    pair[1].send(b"x")
    loop.wait(math.inf)
    loop.wait(math.inf)
    loop.forget(pair[0].fileno())
    loop.forget(pair[0].fileno())
    loop.wait(0)

    assert events == [select.POLLIN] * 2


def test_a_callback_may_forget_another(pair: tuple[socket.socket, socket.socket]) -> None:
    """Who was forgotten is not called, though it was ready in the same moment."""
    loop = Loop()
    called: list[int] = []

    def callback(number: int, _events: int) -> None:
        called.append(number)
        for sock in pair:
            loop.forget(sock.fileno())

    for number, sock in enumerate(pair):
        loop.watch(sock.fileno(), functools.partial(callback, number))
        sock.send(b"x")
    loop.wait(math.inf)

    assert len(called) == 1


def test_signals_are_something_to_read() -> None:
    """Each that came is taken once, whoever had blocked them; afterwards all is as it was."""
    handler = signal.getsignal(signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        signal.raise_signal(signal.SIGUSR1)
        with Signals([signal.SIGUSR1, signal.SIGUSR2]) as signals:
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            loop = Loop()
            taken: list[int] = []
            loop.watch(signals.fileno(), lambda _events: taken.extend(signals.take()))
            loop.wait(math.inf)
            assert sorted(taken) == [signal.SIGUSR1, signal.SIGUSR2]
            assert signals.take() == []
        assert signal.getsignal(signal.SIGUSR1) == handler
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fill(writer: int) -> None:
    """Fill a pipe whose writers wait, as those of a stderr do."""
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)


def test_our_lines_can_be_told(capfd: pytest.CaptureFixture[str]) -> None:
    """Each line of ours has its mark, whatever is in it, and an end."""
    say("one\ntwo \udcff")

    assert capfd.readouterr().err == "sdlisten: one\nsdlisten: two \\udcff\n"


def test_our_lines_do_not_wait(stderr: tuple[int, int]) -> None:
    """What there is no room for is lost: the supervisor has to go on."""
    reader, writer = stderr
    fill(writer)
    say("lost")

    assert b"lost" not in os.read(reader, 2**20)
    say("x" * 10_000)
    assert os.read(reader, 2**20) == b"sdlisten: " + b"x" * 1024 + b"\n"


def test_the_tail_is_short() -> None:
    """Of what was written the last twenty lines are remembered, and no more than 4 KiB."""
    tail = Tail()
    tail.add(b"".join(b"%d\n" % number for number in range(100)))
    assert str(tail) == "\n".join(map(str, range(80, 100)))
    tail.add(b"x" * 10_000)
    assert str(tail) == "x" * 4096


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Give a pipe that stands for our stderr."""
    reader, writer = os.pipe()
    monkeypatch.setattr(output, "_STDERR", writer)
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(fd)


class AlwaysRoom:
    """A poll(2) just before somebody else writes: there is room."""

    def register(self, fd: int, events: int) -> None:
        """Be asked for a descriptor."""

    def poll(self, _milliseconds: int) -> list[tuple[int, int]]:
        """Say that it can be written."""
        return [(output._STDERR, select.POLLOUT)]


def socketpair() -> tuple[int, int]:
    """Return two sockets as the journal has them."""
    reader, writer = socket.socketpair()
    return reader.detach(), writer.detach()


@pytest.mark.parametrize("make", [os.pipe, os.openpty, socketpair])
def test_others_fill_our_stderr(monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[int, int]]) -> None:
    """Others write there too: that there was room a moment ago makes us not wait. The flag is not touched."""
    reader, writer = make()
    monkeypatch.setattr(output, "_STDERR", writer)
    with monkeypatch.context() as patch:
        patch.setattr(select, "poll", AlwaysRoom)
        for _ in range(1000):
            say("x" * 1000)  # else this test times out

    assert os.read(reader, 11) == b"sdlisten: x"
    assert os.get_blocking(writer)
    os.close(reader)
    say("nobody")
    os.close(writer)


def test_a_stderr_of_another_user(stderr: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be opened once more, we write after a look."""
    reader, writer = stderr

    def refuse(*_args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    say("heard")
    assert os.read(reader, 2**20) == b"sdlisten: heard\n"
    fill(writer)
    say("lost")
    assert b"lost" not in os.read(reader, 2**20)


def test_our_stderr_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our lines come after what is there."""
    with open(tmp_path / "log", "wb+", buffering=0) as file:
        monkeypatch.setattr(output, "_STDERR", file.fileno())
        file.write(b"before\n")
        say("after")
    assert (tmp_path / "log").read_bytes() == b"before\nsdlisten: after\n"


def test_the_rest_is_not_for_ever(stderr: tuple[int, int]) -> None:
    """Whoever goes on writing after a worker's end does not keep the supervisor: 64 KiB are passed on."""
    os.close(stderr[0])
    loop = Loop()
    out = Output(loop)
    relay = out.relay(Tail())
    fcntl.fcntl(relay.writer, fcntl.F_SETPIPE_SZ, 2**17)
    fill(relay.writer)
    before = waiting(relay.writer)
    relay.forward_rest()

    assert before - waiting(relay.writer) == 2**16
    out.close()


def waiting(pipe: int) -> int:
    """Return how many bytes are in a pipe."""
    size: bytes = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(size, sys.byteorder)


def test_a_worker_waits_for_a_slow_reader(stderr: tuple[int, int]) -> None:
    """While our stderr is full a block is taken from a worker, no more; afterwards all arrives, in order."""
    reader, writer = stderr
    fill(writer)
    loop = Loop()
    out = Output(loop)
    relays = [out.relay(Tail()), out.relay(Tail())]
    for relay in relays:
        os.write(relay.writer, b"word")
        relay.close_writer()
    loop.wait(math.inf)
    loop.wait(0)
    os.read(reader, 2**20)
    for _ in range(4):
        loop.wait(0)
    out.close()
    os.close(writer)

    rest = b"".join(iter(lambda: os.read(reader, 65536), b""))
    assert rest.endswith(b"wordword")


def test_nobody_reads_our_stderr(stderr: tuple[int, int]) -> None:
    """Then the words of the workers are lost, and they do not have to wait."""
    reader, _ = stderr
    os.close(reader)
    out = Output(Loop())
    relay = out.relay(Tail())
    os.write(relay.writer, b"word")

    assert relay.forward()
    assert not relay.forward()
    say("nobody hears this")
    out.close()
    assert not relay.forward()
    relay.watch()


@pytest.fixture
def open_files() -> Iterator[Callable[[int], None]]:
    """Give a function that sets the soft limit of open files, until the end of the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def store() -> Iterator[Store]:
    """Give an empty store."""
    with contextlib.closing(Store(Loop())) as store:
        yield store


def memfds(count: int) -> list[int]:
    """Return descriptors of as many files."""
    return [os.memfd_create("x") for _ in range(count)]


@pytest.mark.parametrize(
    ("limit", "name", "most"),
    [(256, "n", 96), (1024, "n", 384), (4096, "n", STORE_MAX), (4096, "n" * 250, 65536 // 251)],
)
def test_what_the_store_keeps_can_be_passed(
    open_files: Callable[[int], None], limit: int, name: str, most: int
) -> None:
    """It takes no more than what a start finds numbers, and room for names, for; the rest is closed."""
    open_files(limit)
    with contextlib.closing(Store(Loop())) as store:
        for _ in range(0, STORE_MAX + 50, 50):
            store.heed({"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}, memfds(50))
        assert len(store) == most <= store.limit == store_max()
        with contextlib.closing(spawn(["true"], store.descriptors)) as child:
            assert child.wait(30) == 0
        store.heed({"FDSTOREREMOVE": "1"}, [])
        assert len(store) == most
        store.heed({"FDSTOREREMOVE": "1", "FDNAME": name}, [])
        assert len(store) == 0
        store.heed({"FDSTORE": "1"}, memfds(1))
        assert len(store) == 1


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_what_the_same_is_to_the_store(
    store: Store, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """A duplicate is not kept, nor if Linux before 6.10 cannot tell, of a socket; all else is."""
    if kernel == "old":
        monkeypatch.setattr("sdlisten.supervisor.store._F_DUPFD_QUERY", 9999)
    fds = [*os.pipe(), os.eventfd(0), os.eventfd(0), *(os.dup(one.fileno()) for one in pair)]
    duplicates = [os.dup(fd) for fd in fds]
    store.heed({"FDSTORE": "1"}, fds)
    assert [fd for fd, _ in store.descriptors] == fds
    store.heed({"FDSTORE": "1"}, duplicates)
    kept = [fd for fd, _ in store.descriptors][len(fds) :]
    if kernel == "old":
        assert kept == duplicates[:4]
    elif kept:  # gVisor, for one
        assert kept == duplicates[:4], "neither all are known nor none"
    store.heed({"FDSTOREREMOVE": "1", "FDNAME": "stored"}, [])
    store.heed({"FDSTORE": "1"}, [os.dup(pair[0].fileno())])
    assert len(store) == 1


def test_a_fault_of_a_worker_s_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be looked at is not kept, and what cannot be closed is closed: nothing ends for it."""
    close = os.close

    def fail(*_args: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def close_and_fail(fd: int) -> None:
        close(fd)
        fail()

    store.heed({"FDSTORE": "1"}, memfds(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close_and_fail)
        with patch.context() as inner:
            inner.setattr(os, "fstat", fail)
            store.heed({"FDSTORE": "1"}, memfds(1))
        store.heed({"READY": "1"}, memfds(1))
        assert len(store) == 1
        store.heed({"FDSTOREREMOVE": "1", "FDNAME": "stored"}, [])
    assert len(store) == 0


def test_names_in_the_store() -> None:
    """A name that is none becomes "stored", a message that says nothing of the store keeps nothing."""
    store = Store(Loop())
    store.heed({"FDSTORE": "1", "FDNAME": "a:b"}, [os.memfd_create("x")])
    store.heed({"READY": "1"}, [os.memfd_create("x")])

    assert [name for _, name in store.descriptors] == ["stored"]
    store.close()


def test_whoever_hangs_up_leaves_the_store(pair: tuple[socket.socket, socket.socket]) -> None:
    """Unless FDPOLL=0 came with it."""
    loop = Loop()
    store = Store(loop)
    store.heed({"FDSTORE": "1"}, [os.dup(pair[0].fileno())])
    pair[1].close()
    loop.wait(math.inf)

    assert len(store) == 0


STAT = (
    "import os, threading, sys; t = threading.Thread(target=sys.stdin.read); t.start(); child = os.fork()\n"
)


@pytest.mark.skipif(not nice.can_return(), reason="needs CAP_SYS_NICE or RLIMIT_NICE to come back")
def test_priorities_come_back() -> None:
    """A process that was niced gets its priority back, with its threads and its children."""
    code = f"{STAT}if child: print(child, flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        nice.lower(process.pid, 5)
        pids = [process.pid, int(process.stdout.readline())]
        niced = [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids]
        nice.restore(process.pid)
        threads = [int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")]
        back = {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
        os.kill(pids[1], signal.SIGKILL)
        process.stdin.close()

    assert niced[0] == os.getpriority(os.PRIO_PROCESS, 0) + 5
    assert back == {os.getpriority(os.PRIO_PROCESS, 0)}
    nice.restore(process.pid)
    nice.lower(2**22 + 1, 5)


def test_there_may_be_no_way_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the capability and without the limit a process that was niced would stay so."""
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (0, 0))
    effective = tmp_path / "status"
    for capabilities, expected in (("0000000000000000", False), ("0000000000800000", True)):
        effective.write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
        monkeypatch.setattr("builtins.open", lambda *_args, _open=open, **_options: _open(effective))
        assert nice.can_return() is expected
        monkeypatch.undo()
        monkeypatch.setattr(resource, "getrlimit", lambda _what: (0, 0))
    monkeypatch.setattr("builtins.open", missing)
    assert not nice.can_return()
    monkeypatch.undo()
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (20, 20))
    assert nice.can_return()


def missing(*_args: object, **_options: object) -> None:
    """Fail as where /proc is not mounted."""
    raise FileNotFoundError(errno.ENOENT, "no /proc")


def test_what_a_manager_must_not_miss() -> None:
    """While its queue is full its words are kept, in order; of the texts only the last one."""
    with Receiver() as receiver:
        upstream = Upstream(Notifier(receiver.address), None)
        for _ in range(6):
            upstream.enter(Phase.ROLLING, 0)
            upstream.enter(Phase.SERVING, 0)
            upstream.status("text", 0)
        upstream.status("last text", 0)
        upstream.enter(Phase.LEAVING, 0)
        heard: list[str] = []
        texts = []
        while (due := upstream.next_deadline()) < math.inf:
            while (received := receiver.receive()) is not None:
                heard += received.assignments.keys() & {"READY", "RELOADING", "STOPPING"}
                texts.append(received.assignments.get("STATUS"))
            if heard[-1:] == ["STOPPING"]:
                break
            upstream.tick(due)

    assert heard == ["RELOADING", "READY"] * 6 + ["STOPPING"]
    assert texts[-1] == "last text"


def test_no_manager_is_nothing_to_do() -> None:
    """Without NOTIFY_SOCKET nothing is kept for later; a watchdog then has nobody to hear it."""
    upstream = Upstream(Notifier(None), 3.0)
    upstream.enter(Phase.SERVING, 0)
    upstream.tick(0)

    assert upstream.next_deadline() == 1.0


def test_a_manager_that_cannot_be_reached(stderr: tuple[int, int]) -> None:
    """The supervisor says so on stderr by its own way, which never waits: also where that is full."""
    reader, writer = stderr
    upstream = Upstream(Notifier("/nowhere/notify"), None)
    upstream.enter(Phase.STARTING, 0)
    upstream.tick(0)
    (line,) = os.read(reader, 65536).splitlines()
    assert line.startswith(b"sdlisten: the manager at NOTIFY_SOCKET='/nowhere/notify' was not told: ")
    fill(writer)
    upstream = Upstream(Notifier("/nowhere/notify"), None)
    upstream.enter(Phase.SERVING, 0)

    assert upstream.next_deadline() < math.inf


def test_a_manager_that_cannot_be_reached_costs_no_logging() -> None:
    """It would take memory in the one process that stays, and wait where nobody reads stderr."""
    code = (
        "import sys; from sdlisten.notifier import Notifier; from sdlisten.supervisor.phase import Phase\n"
        "from sdlisten.supervisor.upstream import Upstream\n"
        "Upstream(Notifier('/nowhere/notify'), None).enter(Phase.SERVING, 0)\n"
        "assert 'logging' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL, timeout=30)


def test_a_reload_has_its_time() -> None:
    """RELOADING=1 carries MONOTONIC_USEC, without which a unit of Type=notify-reload would hang."""
    with Receiver() as receiver:
        Upstream(Notifier(receiver.address), None).enter(Phase.ROLLING, 0)
        received = receiver.receive()
    assert received
    assert received.assignments["RELOADING"] == "1"
    assert 0 < int(received.assignments["MONOTONIC_USEC"]) <= time.monotonic() * 1e6


def test_a_manager_is_shown_life_and_asked_for_time() -> None:
    """WATCHDOG=1 three times within its limit, and 15 s more every 5 s while something takes time."""
    with Receiver() as receiver:
        upstream = Upstream(Notifier(receiver.address), 3.0)
        upstream.enter(Phase.STARTING, 0)
        upstream.tick(0)
        heard: dict[str, str] = {}
        while (received := receiver.receive()) is not None:
            heard |= received.assignments
    assert heard == {"WATCHDOG": "1", "EXTEND_TIMEOUT_USEC": "15000000"}
    assert upstream.next_deadline() == 1.0


def test_a_manager_that_has_gone() -> None:
    """It is not told everything when it comes back: only how it ended."""
    with Receiver() as receiver:
        upstream = Upstream(Notifier(receiver.address), None)
    for _ in range(100):
        upstream.enter(Phase.ROLLING, 0)
        upstream.enter(Phase.SERVING, 0)
    upstream.enter(Phase.ROLLING, 0)
    upstream.enter(Phase.STOPPING, 0)

    assert upstream._unsent[-3:] == ["RELOADING=1", "READY=1", "STOPPING=1"]
    assert len(upstream._unsent) <= 16
    assert Upstream(Notifier(None), None).next_deadline() == math.inf


class Asked:
    """A control socket and who asked there."""

    def __init__(self, path: Path) -> None:
        self.loop = Loop()
        self.questions: list[tuple[Mapping[str, object], Client]] = []
        self.path = str(path)
        self.control = Control(
            self.path, self.loop, lambda question, client: self.questions.append((question, client))
        )

    def connect(self) -> socket.socket:
        """Connect, and let the other side see it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self.path)
        self.loop.wait(math.inf)
        return sock


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    """Give a control socket."""
    asked = Asked(tmp_path / "control")
    yield asked
    asked.control.close()


def answer(sock: socket.socket) -> dict[str, Any]:
    """Read an answer."""
    found: dict[str, Any] = json.loads(b"".join(iter(lambda: sock.recv(65536), b"")))
    return found


def test_a_question_in_parts(asked: Asked) -> None:
    """It is understood when its line is whole, and answered once."""
    with asked.connect() as sock:
        for part in (b'{"do"', b': "x"}\n'):
            sock.send(part)
            asked.loop.wait(math.inf)
        ((question, client),) = asked.questions
        client.answer(0, "fine", more=1)
        client.answer(1, "again")
        assert (question, answer(sock)) == ({"do": "x"}, {"code": 0, "text": "fine", "more": 1})


def test_an_answer_that_is_too_long(asked: Asked) -> None:
    """It is cut to what programs can read."""
    with asked.connect() as sock:
        sock.send(b"{}\n")
        asked.loop.wait(math.inf)
        asked.questions[0][1].answer(0, "x" * LINE_MAX, more="y")
        assert answer(sock) == {"code": 0, "text": "x" * 4096}


def facts(workers: int, status: str = "", command: str = "x") -> dict[str, Any]:
    """Return the facts of a status, as far as they may be long."""
    worker = {"pid": 7, "status": status}
    generation = {"number": 1, "state": "serving", "command": [command], "workers": [worker] * workers}
    return {"phase": "serving", "summary": "generation 1 serves", "pid": 6, "generations": [generation]}


def test_a_status_with_many_workers(asked: Asked) -> None:
    """The worst that workers can say of themselves costs their own rows, not the phase of the whole."""
    whole = facts(200, status="\N{PILE OF POO}" * 256)
    with asked.connect() as sock:
        sock.send(b"{}\n")
        asked.loop.wait(math.inf)
        asked.questions[0][1].answer(0, "text", status=whole)
        told = answer(sock)

    without = {**whole["generations"][0], "workers": []}
    assert told == {"code": 0, "text": "text", "status": {**whole, "generations": [without], "cut": True}}
    assert "cut" not in whole


def test_a_status_with_a_long_command(asked: Asked) -> None:
    """Where nothing else fits, there is still the phase and who we are."""
    with asked.connect() as sock:
        sock.send(b"{}\n")
        asked.loop.wait(math.inf)
        asked.questions[0][1].answer(1, "x" * LINE_MAX, status=facts(1, command="y" * LINE_MAX))
        told = answer(sock)

    status = {"phase": "serving", "summary": "generation 1 serves", "pid": 6, "cut": True}
    assert told == {"code": 1, "text": "x" * 4096, "status": status}


def test_what_a_worker_says_of_itself(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its status is one line that can be printed, of at most 256 characters."""
    environ = {"PATH": os.environ["PATH"]}
    worker: Any = None  # of the machine, which is not asked
    process = Process(worker, ["true"], [], environ, lifeline=pair[0].fileno(), watchdog=math.inf)
    try:
        process.note({"STATUS": "\x1b[2J red\tgreen", "READY": "1"})
        assert (process.status, process.says) == ("\N{REPLACEMENT CHARACTER}[2J red green", "READY")
        process.note({"STATUS": "x" * 256})
        assert process.status == "x" * 256
        process.note({"STATUS": "x" * 257})
        assert process.status == "x" * 255 + "…"
        process.note({"STOPPING": "1"})
        assert (process.status, process.says) == ("x" * 255 + "…", "STOPPING")
        process.note({"STATUS": ""})
        assert process.status == ""
    finally:
        process.child.wait(20)
        process.close()


def test_clients_that_go_away(asked: Asked) -> None:
    """Before the question, by a reset, after the question: nobody is left, nobody is answered."""
    for text in (b"", b"{}\n"):
        sock = asked.connect()
        if text:
            sock.send(text)
            asked.loop.wait(math.inf)
        sock.close()
        asked.loop.wait(math.inf)
    asked.questions[0][1].answer(0, "nobody")

    assert asked.control.next_deadline() == math.inf


def test_clients_of_other_users(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is neither us nor root is turned away."""
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    if uid == 0:
        monkeypatch.setattr("sdlisten.supervisor.control._ROOT", -1)
    with asked.connect() as sock:
        assert sock.recv(1) == b""


def test_one_client_too_many(asked: Asked) -> None:
    """It is told to try again, whether it has asked already or not, and disturbs nobody."""
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(asked.connect()).send(b"{}\n")
            asked.loop.wait(math.inf)
        with asked.connect() as sock:
            assert answer(sock)["code"] == 4
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(asked.path)
            sock.send(b"{}\n")
            asked.loop.wait(math.inf)
            assert json.loads(sock.recv(65536)) == {
                "code": 4,
                "text": "32 others ask already, or wait: not asked, try again",
            }
        assert len(asked.questions) == 32


def test_no_descriptor_left_for_a_client(asked: Asked) -> None:
    """Then nobody is accepted for a second, instead of trying all the time; afterwards whoever waits is."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(asked.path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            asked.loop.wait(math.inf)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        due = asked.control.next_deadline()
        asked.loop.wait(0)
        assert due < time.monotonic() + 2
        asked.control.tick(due)
        asked.loop.wait(math.inf)
        assert asked.control.next_deadline() > due + 1


def test_a_client_that_left_before(asked: Asked) -> None:
    """A wake-up for nobody is none."""
    asked.control._accept(0)

    assert asked.control.next_deadline() == math.inf


def test_a_path_that_is_taken(asked: Asked) -> None:
    """Two supervisors cannot have one control socket."""
    with pytest.raises(OSError, match="in use"):
        Control(asked.path, asked.loop, lambda *_: None)


def test_who_takes_too_long_to_ask(asked: Asked) -> None:
    """After five seconds the client is let go."""
    with asked.connect() as sock:
        assert time.monotonic() + 4 < asked.control.next_deadline() < time.monotonic() + 6
        asked.control.tick(time.monotonic() + 6)
        assert sock.recv(1) == b""
