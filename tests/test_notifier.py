"""sdlisten.notifier against our own receiver, and beside python-systemd where that is importable."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlisten import notifier as notifier_module
from sdlisten.errors import BarrierTimeoutError, MessageError, NotifyError, StateError, StoreRefusedError
from sdlisten.notifier import Notifier, booted, notify, watchdog_timeout
from sdlisten.state import STATE_MAX, read_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Never, TypeAlias

    from sdlisten.receiver import Received, Receiver

    Unchanged: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]

MINUTE = 60.0
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE", "SDLISTEN_FDSTORE")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Give an environment without a manager, which nobody in this process has read yet."""
    for name in VARIABLES:
        # Set first: then the variable is restored also if the code under test unsets it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(notifier_module, "_environment", None)
    return monkeypatch


@pytest.fixture
def notifier(receiver: Receiver) -> Iterator[Notifier]:
    """Give a notifier that speaks to it."""
    notifier = Notifier(receiver.address)
    yield notifier
    notifier.close()


def received(receiver: Receiver) -> Received:
    """Return the next message; it must be there."""
    message = receiver.receive()
    assert message is not None
    return message


def said(receiver: Receiver) -> list[dict[str, str]]:
    """Return all messages that are there."""
    messages = []
    while (message := receiver.receive()) is not None:
        message.close()
        messages.append(message.assignments)
    return messages


@contextlib.contextmanager
def managing(receiver: Receiver, *, keep: bool) -> Iterator[list[dict[str, str]]]:
    """Receive in a thread: barriers are answered, descriptors kept or closed."""
    messages: list[dict[str, str]] = []
    kept: list[Received] = []
    stop_reader, stop_writer = os.pipe()

    def run() -> None:
        poll = select.poll()
        poll.register(receiver.fileno(), select.POLLIN)
        poll.register(stop_reader, 0)
        while stop_reader not in dict(poll.poll()):
            while (message := receiver.receive()) is not None:
                messages.append(message.assignments)
                kept.append(message)
                if not keep:
                    message.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield messages
    finally:
        os.close(stop_writer)
        thread.join()
        os.close(stop_reader)
        for message in kept:
            message.close()


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        (lambda n: n.ready(), {"READY": "1"}),
        (lambda n: n.stopping(), {"STOPPING": "1"}),
        (lambda n: n.status("under\nway"), {"STATUS": "under way"}),
        (lambda n: n.errno(errno.ENOENT), {"ERRNO": "2"}),
        (lambda n: n.extend_timeout(1.5), {"EXTEND_TIMEOUT_USEC": "1500000"}),
        (lambda n: n.watchdog(), {"WATCHDOG": "1"}),
        (lambda n: n.watchdog_trigger(), {"WATCHDOG": "trigger"}),
        (lambda n: n.restart_reset(), {"RESTART_RESET": "1"}),
        (lambda n: n.remove_stored("conn"), {"FDSTOREREMOVE": "1", "FDNAME": "sdlisten.f.conn"}),
        (lambda n: n.remove_state("conf"), {"FDSTOREREMOVE": "1", "FDNAME": "sdlisten.s.conf"}),
        (lambda n: n.remove_as("sdlisten.c.0"), {"FDSTOREREMOVE": "1", "FDNAME": "sdlisten.c.0"}),
        (lambda n: n.send("READY=1", "STATUS=up", "X_MINE=1"), {"READY": "1", "STATUS": "up", "X_MINE": "1"}),
    ],
    ids=str,
)
def test_each_method_sends_its_message(
    receiver: Receiver, notifier: Notifier, call: Callable[[Notifier], bool], fields: dict[str, str]
) -> None:
    """A method is one message, True says that it is in the queue, and no descriptor goes along."""
    assert call(notifier) is True
    message = received(receiver)
    assert message.assignments == fields
    assert message.fds == ()
    assert receiver.receive() is None


def test_reloading_has_the_time_of_its_call(receiver: Receiver, notifier: Notifier) -> None:
    """RELOADING=1 goes with CLOCK_MONOTONIC in microseconds, taken at the call, however it is sent."""
    for call in (notifier.reloading, lambda: notifier.send("STATUS=x", "RELOADING=1")):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert call()
        fields = received(receiver).assignments
        assert fields["RELOADING"] == "1"
        assert before <= int(fields["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_time_of_ones_own_is_sent_as_it_is(receiver: Receiver, notifier: Notifier) -> None:
    """MONOTONIC_USEC beside RELOADING=1 is not replaced."""
    assert notifier.send("RELOADING=1", "MONOTONIC_USEC=7")
    assert received(receiver).assignments == {"RELOADING": "1", "MONOTONIC_USEC": "7"}


def test_a_main_process_goes_with_its_pidfd(receiver: Receiver, notifier: Notifier) -> None:
    """MAINPID names the process and MAINPIDFD=1 brings a descriptor of just that one."""
    assert notifier.main_pid(os.getpid())
    with received(receiver) as message:
        assert message.assignments == {"MAINPID": str(os.getpid()), "MAINPIDFD": "1"}
        (pidfd,) = message.fds
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
            assert f"Pid:\t{os.getpid()}\n" in file.read()


def test_a_main_process_that_is_not_seen_goes_by_its_number(receiver: Receiver, notifier: Notifier) -> None:
    """Where there is no pidfd to be had the number goes alone."""
    child = subprocess.Popen(["true"])
    child.wait()
    assert notifier.main_pid(child.pid)
    assert received(receiver).assignments == {"MAINPID": str(child.pid)}


def test_a_main_process_without_a_manager_is_nothing() -> None:
    """Without a manager, or with one outside of the virtual machine, no pidfd is opened."""
    assert not Notifier(None).main_pid(os.getpid())
    assert not Notifier("vsock:2").main_pid(os.getpid())


def test_descriptors_are_borrowed(receiver: Receiver, notifier: Notifier) -> None:
    """Numbers and objects with fileno() are sent, the manager gets duplicates, ours stay open."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert notifier.send("X_MINE=1", fds=(ours, theirs.fileno()))
        with received(receiver) as message:
            assert [os.fstat(fd) for fd in message.fds] == [
                os.fstat(ours.fileno()),
                os.fstat(theirs.fileno()),
            ]
        ours.send(b"x")
        assert theirs.recv(9) == b"x"


def test_what_is_stored_has_our_name(receiver: Receiver, notifier: Notifier) -> None:
    """`store` sends FDSTORE=1 with the name sdlisten.f.NAME, and FDPOLL=0 where polling is not wanted."""
    with open("/dev/null", "rb") as file:
        assert notifier.store(file, file.fileno(), name="conn", poll=False)
        with received(receiver) as message:
            assert message.assignments == {"FDSTORE": "1", "FDNAME": "sdlisten.f.conn", "FDPOLL": "0"}
            assert len(message.fds) == 2
        assert notifier.store_as("sdlisten.c.0", [file])
        with received(receiver) as message:
            assert message.assignments == {"FDSTORE": "1", "FDNAME": "sdlisten.c.0"}


def test_a_state_replaces_the_one_before(receiver: Receiver, notifier: Notifier) -> None:
    """`store_state` removes the name and stores a sealed memfd under it, which reads back."""
    assert notifier.store_state("conf", b"bytes", version=3)
    assert received(receiver).assignments == {"FDSTOREREMOVE": "1", "FDNAME": "sdlisten.s.conf"}
    with received(receiver) as message:
        assert message.assignments == {"FDSTORE": "1", "FDNAME": "sdlisten.s.conf"}
        (fd,) = message.fds
        state = read_state(fd)
        assert (state.data, state.version) == (b"bytes", 3)


def test_a_confirmed_store_is_true_or_an_error(receiver: Receiver, notifier: Notifier) -> None:
    """With `confirm`, True means that descriptors and states are kept."""
    with managing(receiver, keep=True) as messages:
        assert notifier.store(0, name="conn", confirm=True)
        assert notifier.store_state("conf", b"bytes", confirm=True)
    stored = [fields["FDNAME"] for fields in messages if "FDSTORE" in fields]
    assert [name for name in stored if "canary" not in name] == ["sdlisten.f.conn", "sdlisten.s.conf"]


def test_a_refused_store_is_an_error(receiver: Receiver, notifier: Notifier) -> None:
    """A manager that closes what it is given keeps nothing, and says so through the error."""
    with managing(receiver, keep=False) as messages, pytest.raises(StoreRefusedError) as caught:
        notifier.store(0, name="conn", confirm=True)
    assert caught.value.kept == 0
    assert isinstance(caught.value, NotifyError)
    assert "sdlisten.f.conn" not in [fields.get("FDNAME") for fields in messages]


NO_OPS: list[Callable[[Notifier], bool]] = [
    lambda n: n.ready(),
    lambda n: n.reloading(),
    lambda n: n.stopping(),
    lambda n: n.status("x"),
    lambda n: n.errno(0),
    lambda n: n.main_pid(1),
    lambda n: n.extend_timeout(1),
    lambda n: n.watchdog(),
    lambda n: n.watchdog_trigger(),
    lambda n: n.restart_reset(),
    lambda n: n.store(0, name="x"),
    lambda n: n.store(0, name="x", confirm=True),
    lambda n: n.remove_stored("x"),
    lambda n: n.store_state("x", b""),
    lambda n: n.store_state("x", b"", confirm=True),
    lambda n: n.remove_state("x"),
    lambda n: n.barrier(MINUTE),
    lambda n: n.send("READY=1"),
]


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_each_call_is_a_false(address: str | None, unchanged: Unchanged) -> None:
    """No manager: nothing is opened, nothing raised, everything False, and no descriptor to poll."""
    notifier = Notifier(address, store_limit=10)
    assert notifier.address is None
    with unchanged():
        assert [call(notifier) for call in NO_OPS] == [False] * len(NO_OPS)
        assert notifier.barrier_fd() is None
        assert notifier.store_budget("x") == 0
        notifier.close()


def test_a_manager_that_is_gone_does_not_kill_the_service(
    caplog: pytest.LogCaptureFixture, unchanged: Unchanged
) -> None:
    """Nobody listens: False from all that asks for no certainty, one line in the log, nothing leaks."""
    notifier = Notifier("@sdlisten-nobody")
    with unchanged():
        for call in NO_OPS:
            with contextlib.suppress(NotifyError):
                assert call(notifier) is False
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda n: n.barrier(MINUTE),
        lambda n: n.barrier_fd(),
        lambda n: n.store(0, name="x", confirm=True),
    ],
    ids=["barrier", "barrier_fd", "store"],
)
def test_who_asks_for_certainty_gets_an_error(
    call: Callable[[Notifier], object], unchanged: Unchanged
) -> None:
    """Nobody listens: NotifyError from what waits for an answer."""
    with unchanged(), pytest.raises(NotifyError, match="@sdlisten-nobody"):
        call(Notifier("@sdlisten-nobody"))


@pytest.mark.parametrize("address", [None, "@sdlisten-nobody"])
@pytest.mark.parametrize(
    "call",
    [
        lambda n: n.send("REDAY=1"),
        lambda n: n.send("READY=1\nSTATUS=x"),
        lambda n: n.send("READY=1", fds=(0,)),
        lambda n: n.send(),
        lambda n: n.errno(-1),
        lambda n: n.extend_timeout(-1),
        lambda n: n.main_pid(0),
        lambda n: n.store(0, name="a:b"),
        lambda n: n.store(name="x"),
        lambda n: n.store(*[0] * 1001, name="x"),
        lambda n: n.remove_stored("a:b"),
        lambda n: n.store_state("a:b", b""),
    ],
    ids=range(12),
)
def test_what_is_invalid_is_an_error_with_and_without_a_manager(
    address: str | None, call: Callable[[Notifier], object], unchanged: Unchanged
) -> None:
    """A field that no manager would take is found by the first test that runs without one."""
    with unchanged(), pytest.raises(MessageError):
        call(Notifier(address))


def test_a_state_that_is_too_large_is_an_error_without_a_manager_too() -> None:
    """The limit of a state holds before there is anybody to store it."""
    with pytest.raises(StateError):
        Notifier(None).store_state("x", bytes(STATE_MAX + 1))


def test_a_barrier_is_true_once_answered(receiver: Receiver, notifier: Notifier) -> None:
    """A manager that receives answers the barrier."""
    with managing(receiver, keep=False) as messages:
        assert notifier.ready()
        assert notifier.barrier(MINUTE)
    assert messages == [{"READY": "1"}, {"BARRIER": "1"}]


def test_a_manager_that_never_answers_is_a_timeout(notifier: Notifier, unchanged: Unchanged) -> None:
    """BarrierTimeoutError comes on time, a second one at once, and `close` leaves no descriptor."""
    begin = time.monotonic()
    with unchanged():
        for _ in range(2):
            with pytest.raises(BarrierTimeoutError):
                notifier.barrier(0.05)
        notifier.close()
    assert 0.05 <= time.monotonic() - begin < MINUTE


def test_a_barrier_descriptor_can_be_polled_by_a_loop(receiver: Receiver, notifier: Notifier) -> None:
    """`barrier_fd` returns at once, with a descriptor that hangs up when the manager has answered."""
    fd = notifier.barrier_fd()
    assert fd is not None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    assert received(receiver).assignments == {"BARRIER": "1"}
    assert poll.poll(0) == [(fd, select.POLLHUP)]
    os.close(fd)


@pytest.mark.parametrize(
    ("limit", "name", "budget"),
    [
        (None, "sdlisten.c.0", 0),
        (0, "sdlisten.c.0", 0),
        (10, "sdlisten.c.0", 10),
        (100_000, "sdlisten.c.0", 1000),
        (100_000, "x" * 255, 256),
    ],
)
def test_the_budget_is_the_least_of_all_limits(limit: int | None, name: str, budget: int) -> None:
    """FileDescriptorStoreMax= if known, 1000, and what LISTEN_FDNAMES can hold; unknown means none."""
    assert Notifier("/somewhere", store_limit=limit).store_budget(name) == budget


@pytest.mark.parametrize(
    ("variables", "budget"),
    [
        ({}, 0),
        ({"FDSTORE": "7"}, 7),
        ({"SDLISTEN_FDSTORE": "9"}, 9),
        ({"FDSTORE": "7", "SDLISTEN_FDSTORE": "9"}, 7),
        ({"FDSTORE": "many"}, 0),
        ({"FDSTORE": "-1"}, 0),
        ({"FDSTORE": "9" * 30}, 0),
    ],
)
def test_the_limit_of_the_store_comes_from_the_environment(
    environ: pytest.MonkeyPatch, variables: dict[str, str], budget: int
) -> None:
    """$FDSTORE counts before $SDLISTEN_FDSTORE, and nonsense is no limit that is known."""
    environ.setenv("NOTIFY_SOCKET", "/somewhere")
    for name, value in variables.items():
        environ.setenv(name, value)
    assert Notifier.from_environ().store_budget("x") == budget


def test_the_environment_is_read_once(environ: pytest.MonkeyPatch, receiver: Receiver) -> None:
    """What the first call finds holds for the process; by itself it unsets nothing."""
    environ.setenv("NOTIFY_SOCKET", receiver.address)
    first = Notifier.from_environ()
    assert first.address == receiver.address == os.environ["NOTIFY_SOCKET"]
    environ.setenv("NOTIFY_SOCKET", "/elsewhere")
    assert Notifier.from_environ() is first
    assert notify("READY=1")
    assert said(receiver) == [{"READY": "1"}]


def test_unsetting_leaves_nothing_to_children(environ: pytest.MonkeyPatch, receiver: Receiver) -> None:
    """With `unset_environment` no child, however started, has the variables; what was read stays known."""
    environ.setenv("NOTIFY_SOCKET", receiver.address)
    environ.setenv("WATCHDOG_USEC", "3000000")
    environ.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Notifier.from_environ().address == receiver.address
    os.putenv("WATCHDOG_USEC", "4000000")
    assert Notifier.from_environ(unset_environment=True).ready()
    assert not os.environ.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    for env in (None, dict(os.environ)):
        printed = subprocess.run(["env"], env=env, capture_output=True, text=True, check=True).stdout
        assert "NOTIFY_SOCKET" not in printed
        assert "WATCHDOG" not in printed
    assert watchdog_timeout() == 3.0
    assert Notifier.from_environ(unset_environment=True).stopping()
    assert said(receiver) == [{"READY": "1"}, {"STOPPING": "1"}]


def test_variables_that_only_c_code_knows_are_unset_too(environ: pytest.MonkeyPatch) -> None:
    """A variable set by putenv(3), which os.environ does not show, is gone as well."""
    os.putenv("NOTIFY_SOCKET", "/somewhere")
    Notifier.from_environ(unset_environment=True)
    printed = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert "NOTIFY_SOCKET" not in printed
    assert environ is not None


def test_a_forked_child_reads_for_itself(environ: pytest.MonkeyPatch, receiver: Receiver) -> None:
    """A child has the watchdog only if WATCHDOG_PID is its own, and no manager if the parent unset it."""
    environ.setenv("NOTIFY_SOCKET", receiver.address)
    environ.setenv("WATCHDOG_USEC", "3000000")
    environ.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_timeout() == 3.0
    expectations: list[Callable[[], bool]] = [
        lambda: watchdog_timeout() is None and Notifier.from_environ().address == receiver.address,
        lambda: (
            watchdog_timeout() is None and Notifier.from_environ().address is None and not notify("READY=1")
        ),
    ]
    for expectation in expectations:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = 0 if expectation() else 2
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        Notifier.from_environ(unset_environment=True)


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        (None, None, None),
        ("3000000", None, 3.0),
        ("1500000", "self", 1.5),
        ("3000000", "1", None),
        ("3000000", "", None),
        ("0", "self", None),
        ("soon", "self", None),
        ("-1", "self", None),
        ("", "self", None),
        ("18446744073709551615", "self", None),
        ("184467440737095516150", "self", None),
    ],
)
def test_the_watchdog_is_ours_or_not(
    environ: pytest.MonkeyPatch, usec: str | None, pid: str | None, seconds: float | None
) -> None:
    """WATCHDOG_USEC counts if WATCHDOG_PID is absent or ours and it is a time; else there is no watchdog."""
    if usec is not None:
        environ.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        environ.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)
    assert watchdog_timeout() == seconds


@pytest.mark.parametrize("mode", ["directory", "link", "nothing"])
def test_booted_is_what_systemd_made_at_boot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """A directory /run/systemd/system says yes; a symbolic link or nothing there says no."""
    place = tmp_path / "system"
    if mode == "directory":
        place.mkdir()
    elif mode == "link":
        place.symlink_to(tmp_path)
    lstat = os.lstat

    def elsewhere(path: str) -> os.stat_result:
        assert path == "/run/systemd/system"
        return lstat(place)

    monkeypatch.setattr(os, "lstat", elsewhere)
    assert booted() is (mode == "directory")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_can_be_a_status(receiver: Receiver, notifier: Notifier, text: str) -> None:
    """Whatever is in it, a status arrives as one line and injects no field."""
    assert notifier.status(text)
    assert received(receiver).assignments.keys() == {"STATUS"}


def missing(reason: str) -> Never:
    """Skip, with the reason; where nothing may be skipped this is a failure."""
    if os.environ.get("SDLISTEN_NO_SKIP"):
        pytest.fail(reason)
    pytest.skip(reason)


def python_systemd() -> Callable[[str, list[int]], object]:
    """Return python-systemd's notify()."""
    try:
        daemon = importlib.import_module("systemd.daemon")
    except ModuleNotFoundError:
        missing("python-systemd is not installed: pip install systemd-python, which needs libsystemd-dev")
    return lambda text, fds: daemon.notify(text, fds=fds) if fds else daemon.notify(text)


def libsystemd() -> Callable[[str, list[int]], object]:
    """Return sd_pid_notify_with_fds() of the C library."""
    try:
        library = ctypes.CDLL("libsystemd.so.0")
    except OSError:
        missing("libsystemd.so.0 is not installed: apt install libsystemd0")
    return lambda text, fds: (
        library.sd_pid_notify_with_fds(0, 0, text.encode(), (ctypes.c_int * len(fds))(*fds), len(fds)) > 0
    )


@pytest.mark.parametrize("reference", [python_systemd, libsystemd])
@pytest.mark.parametrize(
    ("lines", "fds"),
    [
        (["READY=1"], []),
        (["STOPPING=1"], []),
        (["RELOADING=1", "MONOTONIC_USEC=1"], []),
        (["STATUS=ünder way"], []),
        (["ERRNO=2", "BUSERROR=org.freedesktop.DBus.Error.TimedOut"], []),
        (["WATCHDOG=1"], []),
        (["WATCHDOG=trigger"], []),
        (["WATCHDOG_USEC=20000000"], []),
        (["EXTEND_TIMEOUT_USEC=1000000"], []),
        (["MAINPID=4711"], []),
        (["FDSTORE=1", "FDNAME=mine"], [0, 2]),
        (["READY=1", "STATUS=up", "X_MINE=1"], []),
    ],
    ids=str,
)
def test_the_same_message_as_the_reference(
    environ: pytest.MonkeyPatch,
    receiver: Receiver,
    reference: Callable[[], Callable[[str, list[int]], object]],
    lines: list[str],
    fds: list[int],
) -> None:
    """python-systemd and libsystemd put the same bytes and descriptors on the socket."""
    call = reference()
    environ.setenv("NOTIFY_SOCKET", receiver.address)
    assert call("\n".join(lines), fds)
    assert notify(*lines, fds=fds)
    messages = []
    with socket.socket(fileno=os.dup(receiver.fileno())) as manager:
        for _ in range(2):
            data, got, _, _ = socket.recv_fds(manager, 5000, 100)
            messages.append((data, [os.fstat(fd) for fd in got]))
            for fd in got:
                os.close(fd)
    assert messages[0] == messages[1]
    assert messages[0] == ("\n".join(lines).encode(), [os.fstat(fd) for fd in fds])


def test_a_notifier_at_work_loads_no_logging(receiver: Receiver) -> None:
    """A program whose manager listens does not load logging for it."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import socket; from sdlisten.notifier import notify; "
        "assert notify('READY=1'); assert 'logging' not in sys.modules"
    )
    root = os.path.dirname(os.path.dirname(notifier_module.__file__))
    environ = {"NOTIFY_SOCKET": receiver.address}
    subprocess.run([sys.executable, "-I", "-S", "-c", script, root], env=environ, check=True)
    assert said(receiver) == [{"READY": "1"}]
