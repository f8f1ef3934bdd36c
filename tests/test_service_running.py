"""serve() as a whole program: signals, what the manager is told, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import pytest

from sdlisten import (
    AddressError,
    Adopt,
    AlreadyTakenError,
    Connection,
    DescriptorError,
    Listener,
    Listeners,
    NotActivatedError,
    Notifier,
    Origin,
    Service,
)
from sdlisten.service import run, take_sockets
from sdlisten.testing import Activated, activate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE = 20.0

# A daemon of line in, line out; a line "wait" is answered when the next one comes.
DAEMON = """
import asyncio, os, signal, sys
from sdlisten import serve

signal.signal(signal.SIGTERM, signal.SIG_DFL)  # coverage has put its own there

async def handler(connection):
    reader, writer = connection.streams()
    while await connection.idle():
        line = await reader.readline()
        if line == b"wait\\n":
            writer.write(b"waiting\\n")
            line = await reader.readline()
        if line == b"environ\\n":
            line = ",".join(os.environ).encode() + b"\\n"
        if line == b"pid\\n":
            line = b"%d\\n" % os.getpid()
        writer.write((b"last " if connection.closing else b"more ") + line)
        await writer.drain()

loads = iter([None, OSError(2, "no such file"), ValueError("bad\\nvalue"), None, None])

async def on_reload():
    if error := next(loads):
        raise error

options = eval(os.environ.get("OPTIONS", "{}"))
report = serve(handler, *sys.argv[1:], on_reload=on_reload, **options)
print("served", report.finished, report.dropped, flush=True)
"""


def daemon(*sockets: Any, options: str = "{}", env: dict[str, str] | None = None) -> Activated:  # noqa: ANN401
    """Return the daemon, to be started by ``with``."""
    words = sockets or ("line=127.0.0.1:0",)
    return activate([sys.executable, "-c", DAEMON], words, env={"OPTIONS": options, **(env or {})})


class Client:
    """A client of the daemon, blocking."""

    def __init__(self, listener: Listener) -> None:
        self.sock = socket.create_connection(listener.sockname, timeout=DEADLINE)  # type: ignore[arg-type]
        self.file = self.sock.makefile("rb")

    def ask(self, line: bytes) -> bytes:
        """Send a line, receive one."""
        self.sock.sendall(line + b"\n")
        return self.file.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()


def wait_messages(
    running: Activated, condition: Callable[[list[dict[str, str]]], bool]
) -> list[dict[str, str]]:
    """Wait until what the daemon has said fulfils a condition; return it."""
    end = time.monotonic() + DEADLINE
    while not condition(messages := list(running.messages)):
        left = end - time.monotonic()
        assert left > 0, f"within {DEADLINE} s it said only {messages}; it wrote {running.output}"
        assert running._receiver is not None
        select.select([running._receiver], [], [], left)
    return messages


def ended(running: Activated) -> int | None:
    """Wait until the daemon has ended by itself; return its exit code."""
    assert running._child is not None
    return running._child.wait(DEADLINE)


def saying(messages: list[dict[str, str]], name: str) -> list[str]:
    """Return the values of one variable, in the order in which they came."""
    return [message[name] for message in messages if name in message]


def test_a_daemon_from_ready_to_its_end() -> None:
    """It serves when it says READY=1; SIGTERM: STOPPING=1, the last answers, the line in the log, exit 0."""
    with daemon() as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask(b"a") == b"more a\n"
            os.kill(running.pid, signal.SIGTERM)
            running.wait_output("draining: open=1")
            assert client.ask(b"b") == b"last b\n"
            assert client.file.read() == b""
        assert running.terminate() == 0
        first, second, third, *_ = running.messages
        assert (first, second) == ({"READY": "1"}, {"STOPPING": "1"})
        assert third["STATUS"] == "draining: open=1"
        assert 9_000_000 < int(third["EXTEND_TIMEOUT_USEC"]) <= 10_000_000
        assert "INFO sdlisten.service: drained in 0." in running.output
        assert ": finished=1 handed_over=0 closed_idle=0 dropped=0\n" in running.output
        assert running.output.endswith("served 1 0\n")


def test_the_environment_of_its_children_is_clean() -> None:
    """serve() removes what the manager said to this process alone."""
    with daemon(env={"WATCHDOG_USEC": "60000000"}) as running, Client(running.listeners[0]) as client:
        names = client.ask(b"environ").split()[1].decode().split(",")
        assert "PATH" in names
        assert not [name for name in names if name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_sent_often_are_one_order(number: signal.Signals) -> None:
    """However often the order to stop comes, at whatever moment of the end, the daemon exits with 0."""
    with daemon() as running:
        running.wait_ready()
        child = running._child
        assert child is not None
        sent = 0
        while child.wait(0) is None:
            child.send_signal(number if not sent else signal.SIGTERM)
            sent += 1
            select.select([child], [], [], 0.0005)
        assert child.returncode == 0, running.output
        assert sent > 1
        assert running.output.count("drained in") == 1


def test_a_later_order_shortens_the_drain() -> None:
    """SIGTERM a second or more after the first leaves a tenth of the rest; what is dropped is a warning."""
    with daemon(options="dict(drain_timeout=15, log='journal')") as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask(b"wait") == b"waiting\n"
            began = time.monotonic()
            os.kill(running.pid, signal.SIGTERM)
            wait_messages(running, lambda said: len(saying(said, "EXTEND_TIMEOUT_USEC")) >= 3)
            assert running.terminate(timeout=15) == 0
            assert time.monotonic() - began < 12
            assert client.file.read() == b""
        limits = [int(value) for value in saying(list(running.messages), "EXTEND_TIMEOUT_USEC")]
        assert limits == sorted(limits, reverse=True)
        assert running.output.count("draining: open=1") >= 3
        assert "WARNING sdlisten.service: drained in" in running.output
        assert running.output.endswith("served 0 1\n")


def test_the_watchdog_is_fed_while_serving_and_draining() -> None:
    """WATCHDOG=1 comes at a third of WATCHDOG_USEC, from READY=1 to the end of the drain."""
    with daemon(env={"WATCHDOG_USEC": "60000"}) as running:
        with Client(running.listeners[0]) as client:
            assert client.ask(b"wait") == b"waiting\n"
            wait_messages(running, lambda said: len(saying(said, "WATCHDOG")) >= 3)
            os.kill(running.pid, signal.SIGTERM)
            said = wait_messages(running, lambda said: bool(saying(said, "STOPPING")))
            pings = len(saying(said, "WATCHDOG"))
            wait_messages(running, lambda said: len(saying(said, "WATCHDOG")) >= pings + 3)
        assert running.terminate() == 0
        assert set(saying(list(running.messages), "WATCHDOG")) == {"1"}


@pytest.mark.parametrize("pid", ["1", "self"])
def test_another_process_s_watchdog_is_left_alone(pid: str) -> None:
    """A watchdog meant for another process gets nothing from us."""
    with daemon(env={"WATCHDOG_USEC": "3000", "WATCHDOG_PID": pid}) as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask(b"a") == b"more a\n"
        assert running.terminate() == 0
        assert saying(list(running.messages), "WATCHDOG") == []


def test_reloads_good_and_failing() -> None:
    """A reload is RELOADING=1 with its time, then READY=1; a failed one says why, the next one clears it."""
    with daemon() as running:
        running.wait_ready()
        for done in range(1, 5):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            os.kill(running.pid, signal.SIGHUP)
            said = wait_messages(running, lambda said, done=done: len(saying(said, "READY")) == done + 1)  # type: ignore[misc]
            *_, reloading, ready = said
            assert reloading.keys() == {"RELOADING", "MONOTONIC_USEC"}
            assert int(reloading["MONOTONIC_USEC"]) >= before
            assert (
                ready
                == [
                    {"READY": "1"},
                    {
                        "READY": "1",
                        "STATUS": "reload failed: FileNotFoundError(2, 'no such file')",
                        "ERRNO": "2",
                    },
                    {"READY": "1", "STATUS": "reload failed: ValueError('bad\\nvalue')", "ERRNO": "22"},
                    {"READY": "1", "STATUS": "", "ERRNO": "0"},
                ][done - 1]
            )
            with Client(running.listeners[0]) as client:
                assert client.ask(b"a") == b"more a\n"
        assert running.terminate() == 0
        assert "reload failed, the old configuration stays" in running.output


def test_stop_during_start_and_reload_during_drain() -> None:
    """A signal is never lost, and never answered by READY=1 after STOPPING=1."""
    with daemon() as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask(b"wait") == b"waiting\n"
            os.kill(running.pid, signal.SIGTERM)
            wait_messages(running, lambda said: bool(saying(said, "STOPPING")))
            os.kill(running.pid, signal.SIGHUP)
            assert client.ask(b"go") == b"last go\n"
        assert running.terminate() == 0
        assert saying(list(running.messages), "RELOADING") == []


def test_accept_yes_serves_its_one_connection() -> None:
    """Started with one accepted connection, it serves that one, says so, and exits with 0."""
    ours, theirs = socket.socketpair()
    with ours, theirs, daemon(("connection", theirs)) as running:
        theirs.close()
        ours.settimeout(DEADLINE)
        ours.sendall(b"a\n")
        assert ours.recv(100) == b"more a\n"
        ours.close()
        running.wait_output("served 0 0")  # it ended before the drain
        assert ended(running) == 0
        assert [next(iter(message)) for message in running.messages][:2] == ["READY", "STOPPING"]


def test_accept_yes_drains_too() -> None:
    """SIGTERM makes the answer of the one connection the last."""
    ours, theirs = socket.socketpair()
    with ours, theirs, daemon(("anything", theirs)) as running:
        theirs.close()
        ours.settimeout(DEADLINE)
        ours.sendall(b"wait\n")
        assert ours.recv(100) == b"waiting\n"
        os.kill(running.pid, signal.SIGTERM)
        running.wait_output("draining: open=1")
        ours.sendall(b"go\n")
        assert ours.recv(100) == b"last go\n"
        assert ours.recv(100) == b""
        assert running.terminate() == 0


def test_exit_on_idle_when_activated() -> None:
    """With exit_on_idle an activated daemon ends by itself, and the next one serves who comes later."""
    listener_options = "dict(exit_on_idle=0.05)"
    with daemon(options=listener_options) as running:
        running.wait_ready()
        with Client(running.listeners[0]) as client:
            assert client.ask(b"a") == b"more a\n"
        running.wait_output("idle for 0.05 s: stopping")
        assert ended(running) == 0
        later = Client(running.listeners[0])
        with daemon(running.listeners[0], options=listener_options), later:
            assert later.ask(b"b") == b"more b\n"


async def answer(connection: Connection) -> None:
    """Answer one line."""
    reader, writer = connection.streams()
    if await connection.idle():
        writer.write(b"ok " + await reader.readline())


def test_nobody_is_lost_who_comes_as_the_idle_service_ends(rounds: Callable[[int], int]) -> None:
    """A client that connects in the instant of exit is served by this service or waits for the next."""
    answers: list[bytes] = []
    number = rounds(100)
    with socket.create_server(("127.0.0.1", 0)) as held:

        def clients() -> None:
            for turn in range(number):
                turns.acquire()
                time.sleep(0.003 + turn % 20 * 0.0002)  # not to wait, but to come around the end
                with socket.create_connection(held.getsockname(), timeout=DEADLINE) as sock:
                    sock.sendall(b"%d\n" % turn)
                    answers.append(sock.recv(100))

        turns = threading.Semaphore(0)
        thread = threading.Thread(target=clients)
        thread.start()
        starts = 0

        async def serve_once() -> None:
            listener = Listener(held.dup(), name="held", origin=Origin.ADOPTED)
            service = Service(notifier=Notifier(None), exit_on_idle=0.005)
            service.attach(listener, answer)
            await service.serve()

        deadline = time.monotonic() + DEADLINE + number * 0.1
        while len(answers) < number:
            assert time.monotonic() < deadline, f"answered: {len(answers)} of {number}"
            starts += 1
            turns.release()
            asyncio.run(serve_once())
        thread.join()
    assert answers == [b"ok %d\n" % turn for turn in range(number)]
    assert starts >= number / 2


def test_who_binds_for_himself_does_not_exit_on_idle() -> None:
    """Without a manager nobody would start us again: exit_on_idle does nothing for a bound listener."""

    async def test() -> None:
        adopted = Listener(socket.create_server(("127.0.0.1", 0)), name="", origin=Origin.ADOPTED)
        bound = Listener(socket.create_server(("127.0.0.1", 0)), name="", origin=Origin.BOUND)
        service = Service(notifier=Notifier(None), exit_on_idle=0)
        service.attach(Listeners((adopted, bound)), answer)
        task = asyncio.create_task(service.serve())
        await asyncio.sleep(0)
        assert service._idle_timer is None
        service.stop()
        await task

    asyncio.run(test())


def test_exit_on_idle_looks_again_if_another_took_the_client() -> None:
    """If somebody waits in the last moment the service goes on, even if another holder takes the client."""

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as held:
            service = Service(notifier=Notifier(None), exit_on_idle=FOREVER)
            service.attach(Listener(held.dup(), name="", origin=Origin.ADOPTED), answer)
            task = asyncio.create_task(service.serve())
            await asyncio.sleep(0)
            with socket.create_connection(held.getsockname()):
                service._idle_over()
                held.accept()[0].close()
                assert not service.draining
                assert service._idle_timer is not None
                await asyncio.sleep(0)
                service._idle_over()
                assert service.draining
                await task

    asyncio.run(test())


FOREVER = 600.0


def test_run_leaves_the_signals_as_it_found_them() -> None:
    """Handlers of the program come back; where there was none, a late SIGTERM is ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        service = Service(notifier=Notifier(None))
        service.attach(Listener(socket.create_server(("127.0.0.1", 0)), name="", origin=Origin.BOUND), answer)

        def loop_that_is_told_to_stop() -> asyncio.AbstractEventLoop:
            loop = asyncio.new_event_loop()
            loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)
            return loop

        run(service, loop_factory=loop_that_is_told_to_stop)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unavailable(reason: str) -> None:
    """Skip here, fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("options", ["{}", "dict(loop_factory=__import__('uvloop').new_event_loop)"])
def test_a_kept_connection_costs_no_system_call_of_its_own(tmp_path: Path, options: str) -> None:
    """Between two requests idle() waits in the call of the loop: a request is a recv, a send, a wake-up."""
    if shutil.which("strace") is None:
        unavailable("strace is not installed")
    log = tmp_path / "strace"
    traced = ["strace", "-qq", "-o", str(log), "-e", "trace=%network,%desc"]
    # LISTEN_PID is strace's until `sdlisten exec` rewrites it.
    command = [*traced, sys.executable, "-m", "sdlisten", "exec", "--", sys.executable, "-c", DAEMON]
    number = 200
    with activate(command, ["line=127.0.0.1:0"], env={"OPTIONS": options}) as running:
        try:
            running.wait_ready()
        except ChildProcessError:
            unavailable(f"strace may not trace here: {running.output}")
        with Client(running.listeners[0]) as client:
            pid = int(client.ask(b"pid").split()[1])
            began = len(log.read_text().splitlines())
            for _ in range(number):
                assert client.ask(b"x") == b"more x\n"
            lines = log.read_text().splitlines()[began:]
        os.kill(pid, signal.SIGTERM)  # strace does not listen
        assert ended(running) == 0
    calls = Counter(line.partition("(")[0] for line in lines)
    wakeups = {"epoll_wait", "epoll_pwait"}
    each = {name: count / number for name, count in calls.items() if name not in wakeups}
    per_request = {name: count for name, count in each.items() if count > 0.05}  # not what happens once
    wanted = {"recvfrom": 1.0, "sendto": 1.0} | ({"getsockopt": 1.0} if "uvloop" in options else {})
    assert per_request == pytest.approx(wanted, abs=0.05), each


def test_uvloop_can_be_asked_for() -> None:
    """loop_factory makes the loop."""
    options = "dict(loop_factory=__import__('uvloop').new_event_loop)"
    with daemon(options=options) as running, Client(running.listeners[0]) as client:
        assert client.ask(b"a") == b"more a\n"
        os.kill(running.pid, signal.SIGHUP)
        wait_messages(running, lambda said: len(saying(said, "READY")) == 2)
        os.kill(running.pid, signal.SIGTERM)
        running.wait_output("draining: open=1")
        assert client.ask(b"b") == b"last b\n"
        assert running.terminate() == 0


def test_what_was_passed_is_taken(passing: Any, tcp: socket.socket, unix: socket.socket) -> None:  # noqa: ANN401
    """Without words, all passed listeners are served, in their order; a second time they are taken."""
    passing(tcp, unix, names=["one", "two"])

    with take_sockets([]) as taken:
        assert isinstance(taken, Listeners)
        assert [listener.name for listener in taken] == ["one", "two"]
        with pytest.raises(AlreadyTakenError):
            take_sockets(["two=127.0.0.1:0"])


def test_words_choose_among_what_was_passed(passing: Any, tcp: socket.socket, unix: socket.socket) -> None:  # noqa: ANN401
    """With words each endpoint is adopted by its name; with NEVER it is bound."""
    passing(tcp, unix, names=["one", "two"])

    with take_sockets(["two=8080"]) as taken:
        assert isinstance(taken, Listeners)
        assert [listener.origin for listener in taken] == [Origin.ADOPTED]
    with take_sockets(["127.0.0.1:0", "127.0.0.1:0"], adopt=Adopt.NEVER) as bound:
        assert isinstance(bound, Listeners)
        assert [listener.origin for listener in bound] == [Origin.BOUND] * 2


def _moved(stack: contextlib.ExitStack, sock: socket.socket) -> socket.socket:
    """Return a copy at a high number, where `passing` does not disturb it."""
    number = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 100)
    return stack.enter_context(socket.socket(fileno=number))


def test_the_one_connection_is_taken(passing: Any) -> None:  # noqa: ANN401
    """One accepted connection is what there is to serve; never to adopt it is an error, as for listen()."""
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        passing(_moved(stack, theirs), names="connection")
        with pytest.raises(DescriptorError):
            take_sockets([], adopt=Adopt.NEVER)
        taken = take_sockets(["8080"])
        assert isinstance(taken, socket.socket)
        with taken:
            ours.send(b"x")
            assert taken.recv(1) == b"x"


def test_nothing_to_serve_is_an_error(passing: Any) -> None:  # noqa: ANN401
    """Nothing passed and no word: NotActivatedError; a word that is none: AddressError."""
    passing()

    with pytest.raises(NotActivatedError):
        take_sockets([])
    with pytest.raises(AddressError):
        take_sockets(["127.0.0.1:99999"])


def test_what_was_bound_is_closed_if_the_next_fails(passing: Any, tcp: socket.socket) -> None:  # noqa: ANN401
    """If one endpoint cannot be had, those before it are given up."""
    passing()
    port = tcp.getsockname()[1]

    with pytest.raises(OSError, match="in use"):
        take_sockets(["127.0.0.1:0", f"127.0.0.1:{port}"])
