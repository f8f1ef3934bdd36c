"""sdlisten.manager: one message to a NOTIFY_SOCKET, and barriers, against our own receiver."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sdlisten.errors import BarrierTimeoutError, NotifyError
from sdlisten.manager import Manager, transmit, wait_for
from sdlisten.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MINUTE = 60.0


@pytest.fixture
def manager(receiver: Receiver) -> Iterator[Manager]:
    """Give the line to it."""
    manager = Manager(receiver.address)
    yield manager
    manager.close()


@contextlib.contextmanager
def answering(receiver: Receiver) -> Iterator[None]:
    """Receive all messages, and with them answer barriers, in a thread."""
    stop_reader, stop_writer = os.pipe()

    def run() -> None:
        poll = select.poll()
        poll.register(receiver.fileno(), select.POLLIN)
        poll.register(stop_reader, 0)
        while stop_reader not in dict(poll.poll()):
            while (received := receiver.receive()) is not None:
                received.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        os.close(stop_writer)
        thread.join()
        os.close(stop_reader)


def fill(address: str) -> int:
    """Fill a manager's queue, and return how many messages that took."""
    for count in range(100_000):
        try:
            transmit(address, b"X_FILL=1")
        except BlockingIOError:
            return count
    pytest.fail("the queue never fills")


@pytest.mark.parametrize("abstract", [False, True])
def test_a_message_reaches_a_path_and_an_abstract_name(abstract: bool) -> None:
    """Bytes and descriptors arrive at both kinds of unix address."""
    with Receiver(abstract=abstract) as receiver:
        reader, writer = os.pipe()
        transmit(receiver.address, b"X_MINE=1", (writer,))
        os.close(writer)
        received = receiver.receive()
        assert received is not None
        with received:
            assert received.assignments == {"X_MINE": "1"}
            (fd,) = received.fds
            os.write(fd, b"x")
        assert os.read(reader, 9) == b"x"
        os.close(reader)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("", errno.EINVAL),
        ("relative/path", errno.EINVAL),
        ("vsock:2", errno.EINVAL),
        ("vsock::80", errno.EINVAL),
        ("vsock:2:-1", errno.EINVAL),
        ("vsock:2:4294967295", errno.EINVAL),
        ("vsock:4294967295:80", errno.EINVAL),
        ("vsock:2:99999999999", errno.EINVAL),
        ("vsock-x:2:80", errno.EINVAL),
        ("/nowhere/notify", errno.ENOENT),
        ("@sdlisten-nobody", errno.ECONNREFUSED),
        ("/" + "x" * 200, None),
    ],
)
def test_an_address_without_a_manager_is_an_oserror(address: str, code: int | None) -> None:
    """Whatever NOTIFY_SOCKET says, sending raises OSError at worst."""
    with pytest.raises(OSError, match=r".") as caught:
        transmit(address, b"READY=1")
    assert caught.value.errno == code


def test_a_full_queue_is_found_at_once_and_waited_for_on_request(receiver: Receiver) -> None:
    """A full queue is an error without a deadline; with one the message goes in when there is room."""
    assert fill(receiver.address) > 0
    with answering(receiver):
        transmit(receiver.address, b"READY=1", deadline=time.monotonic() + MINUTE)


def test_waiting_for_room_ends_with_the_deadline(receiver: Receiver) -> None:
    """A queue that stays full is a BlockingIOError after the deadline."""
    fill(receiver.address)
    deadline = time.monotonic() + 0.05
    with pytest.raises(BlockingIOError):
        transmit(receiver.address, b"READY=1", deadline=deadline)
    assert time.monotonic() >= deadline


def test_wait_for_sees_an_event_and_a_hangup() -> None:
    """`wait_for` is True for the event asked for and for a hang-up nobody asked for, else False."""
    reader, writer = os.pipe()
    assert not wait_for(reader, select.POLLIN, 0)
    os.write(writer, b"x")
    assert wait_for(reader, select.POLLIN, 0)
    assert not wait_for(reader, 0, time.monotonic() + 0.01)
    os.close(writer)
    assert wait_for(reader, 0, time.monotonic() + MINUTE)
    os.close(reader)


def test_an_offer_to_nobody_is_false_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A manager that is gone costs a False each time, and one log line that names it and the reason."""
    manager = Manager("/nowhere/notify")
    with caplog.at_level(logging.WARNING):
        assert not manager.offer(b"READY=1")
        assert not manager.offer(b"WATCHDOG=1")
    (record,) = caplog.records
    assert record.name == "sdlisten.notifier"
    assert "NOTIFY_SOCKET='/nowhere/notify'" in record.getMessage()
    assert "No such file" in record.getMessage()


def test_an_offer_to_nobody_is_reported_as_wanted(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever cannot use logging is told in another way, as seldom, and nothing is logged."""
    told: list[str] = []
    manager = Manager("/nowhere/notify", told.append)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not manager.offer(b"READY=1")
    (text,) = told
    assert "NOTIFY_SOCKET='/nowhere/notify'" in text
    assert not caplog.records


def test_an_offer_is_logged_again_after_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the log is one line a minute."""
    manager = Manager("/nowhere/notify")
    now = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for seconds in (0, 59, 61, 62):
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
            assert not manager.offer(b"READY=1")
    assert len(caplog.records) == 2


def test_an_offer_into_a_full_queue_does_not_wait(manager: Manager) -> None:
    """A manager that is behind costs a False, and the next offer after it caught up goes through."""
    fill(manager.address)
    assert not manager.offer(b"READY=1")


def test_a_manager_is_found_again_after_its_restart(tmp_path: Path) -> None:
    """A manager with a new socket at the old path gets the next message."""
    manager = Manager(str(tmp_path / "notify"))
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(manager.address)
            assert manager.offer(b"READY=1")
            assert listener.recv(100) == b"READY=1"
        assert not manager.offer(b"READY=1")
        (tmp_path / "notify").unlink()


def test_insisting_on_nobody_is_a_notify_error() -> None:
    """Who insists gets an error that names the manager."""
    with pytest.raises(NotifyError, match=r"'/nowhere/notify'.*No such file"):
        Manager("/nowhere/notify").insist(b"READY=1")


def timed_out(call: Callable[[], None]) -> float:
    """Return how many seconds a call took to raise BarrierTimeoutError."""
    begin = time.monotonic()
    with pytest.raises(BarrierTimeoutError):
        call()
    return time.monotonic() - begin


def test_a_manager_that_keeps_its_queue_full_is_waited_for_once(manager: Manager) -> None:
    """A full queue is waited for as long as asked; what was waited is not waited again."""
    fill(manager.address)
    assert timed_out(lambda: manager.insist(b"READY=1", timeout=0.05)) >= 0.05
    assert manager._waited >= 0.05
    manager._waited = MINUTE
    assert timed_out(lambda: manager.insist(b"READY=1", timeout=MINUTE)) < MINUTE / 2
    assert timed_out(lambda: manager.insist(b"READY=1", timeout=manager._waited + 0.05)) >= 0.05


def test_a_queue_that_empties_makes_patience_whole_again(receiver: Receiver, manager: Manager) -> None:
    """What was waited for a full queue is forgotten as soon as a message went in."""
    fill(manager.address)
    with pytest.raises(BarrierTimeoutError):
        manager.insist(b"READY=1", timeout=0.01)
    assert manager._waited > 0
    with answering(receiver):
        manager.synchronise(MINUTE)
    assert manager._waited == 0


def test_a_barrier_returns_when_all_before_it_is_processed(receiver: Receiver, manager: Manager) -> None:
    """Messages are received before the barrier is answered, which leaves no descriptor behind."""
    seen: list[dict[str, str]] = []

    def run() -> None:
        while len(seen) < 3:
            assert wait_for(receiver.fileno(), select.POLLIN, time.monotonic() + MINUTE)
            received = receiver.receive()
            assert received is not None
            seen.append(received.assignments)

    assert manager.offer(b"READY=1")
    assert manager.offer(b"STATUS=up")
    thread = threading.Thread(target=run)
    thread.start()
    manager.synchronise(MINUTE)
    thread.join()
    assert seen == [{"READY": "1"}, {"STATUS": "up"}, {"BARRIER": "1"}]


def test_a_silent_manager_is_a_timeout_in_time(manager: Manager) -> None:
    """A barrier that nobody answers raises within its limit, as a TimeoutError too."""
    begin = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        manager.synchronise(0.1)
    assert isinstance(caught.value, BarrierTimeoutError)
    assert 0.1 <= time.monotonic() - begin < MINUTE


def test_a_silent_manager_is_waited_for_once(receiver: Receiver, manager: Manager) -> None:
    """After a barrier that timed out an equal one only looks, a longer one waits the rest, none is sent."""
    assert timed_out(lambda: manager.synchronise(0.05)) >= 0.05
    assert manager._waited >= 0.05
    manager._waited = MINUTE
    assert timed_out(lambda: manager.synchronise(MINUTE)) < MINUTE / 2
    assert timed_out(lambda: manager.synchronise(manager._waited + 0.05)) >= 0.05
    assert [received.assignments for received in iter(receiver.receive, None)] == [{"BARRIER": "1"}]


def test_a_message_behind_an_unanswered_barrier_does_not_make_patience_whole(manager: Manager) -> None:
    """That there was room in the queue says nothing about a barrier in it that is not answered."""
    with pytest.raises(BarrierTimeoutError):
        manager.synchronise(0.01)
    waited = manager._waited
    manager.insist(b"READY=1")
    assert manager._waited == waited > 0


def test_a_late_answer_makes_patience_whole_again(receiver: Receiver, manager: Manager) -> None:
    """A manager that answers after all is trusted again with the whole limit, and gets a new barrier."""
    with pytest.raises(BarrierTimeoutError):
        manager.synchronise(0.01)
    with answering(receiver):
        manager.synchronise(MINUTE)
    assert (manager._pending, manager._waited) == (-1, 0.0)


def test_a_barrier_behind_a_full_queue_is_a_timeout(
    manager: Manager, unchanged: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """No room for the barrier is a timeout like no answer, and leaves no descriptor."""
    fill(manager.address)
    with unchanged(), pytest.raises(BarrierTimeoutError):
        manager.synchronise(0.01)


def test_a_barrier_waits_no_longer_for_another_thread_than_it_may(manager: Manager) -> None:
    """While one thread holds the line another gets its timeout in time."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with manager.lock:
            held.set()
            release.wait(MINUTE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(MINUTE)
    with pytest.raises(BarrierTimeoutError):
        manager.synchronise(0.01)
    release.set()
    thread.join()


def test_a_barrier_descriptor_ends_with_the_answer(receiver: Receiver, manager: Manager) -> None:
    """The pipe's end is non-blocking, close-on-exec, and at its end exactly when the manager has answered."""
    fd = manager.send_barrier()
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    with pytest.raises(BlockingIOError):
        os.read(fd, 1)
    assert receiver.receive() is not None
    assert os.read(fd, 1) == b""
    os.close(fd)


def test_a_dropped_line_leaves_no_descriptor(receiver: Receiver) -> None:
    """A manager object that is forgotten closes its unanswered barrier."""
    manager = Manager(receiver.address)
    with pytest.raises(BarrierTimeoutError):
        manager.synchronise(0)
    pending = manager._pending
    del manager
    received = receiver.receive()
    assert received is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pending)


class FakeVsock(socket.socket):
    """A vsock of a kernel that has one: CID and port become a unix address, all else is the kernel's.

    No kernel that these tests may run on is sure to have a vsock transport, not even one to itself.
    """

    address = ""
    refuses: tuple[int, ...] = ()
    occupied: tuple[int, ...] = ()
    refusal = errno.ENODEV
    bound: tuple[int, int] | None = None

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:  # noqa: A002
        if family == socket.AF_VSOCK:
            if type in self.refuses:
                raise OSError(self.refusal, os.strerror(self.refusal))
            family = socket.AF_UNIX
        super().__init__(family, type, proto, fileno)

    def bind(self, address: object) -> None:
        """Record the port, if it is not occupied; 0 there stands for all being forbidden, -1 for a fault."""
        if not isinstance(address, tuple):
            super().bind(address)  # type: ignore[arg-type]
            return
        if address[1] in self.occupied:
            raise OSError(errno.EADDRINUSE, "occupied")
        if 0 in self.occupied:
            raise PermissionError(errno.EACCES, "forbidden")
        if -1 in self.occupied:
            raise OSError(errno.EIO, "broken")
        type(self).bound = address

    def connect(self, address: object) -> None:
        """Connect to the unix address instead."""
        assert address == (2, 1234)
        super().connect(self.address)


@pytest.fixture
def vsock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeVsock]:
    """Make vsock sockets those of a fresh class."""
    fake = type("FreshVsock", (FakeVsock,), {"address": str(tmp_path / "vsock")})
    monkeypatch.setattr(socket, "socket", fake)
    return fake


@pytest.mark.parametrize(
    ("scheme", "refuses", "kind"),
    [
        ("vsock", (), socket.SOCK_DGRAM),
        ("vsock-dgram", (), socket.SOCK_DGRAM),
        ("vsock-seqpacket", (), socket.SOCK_SEQPACKET),
        ("vsock-stream", (), socket.SOCK_STREAM),
        ("vsock", (socket.SOCK_DGRAM,), socket.SOCK_SEQPACKET),
        ("vsock", (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET), socket.SOCK_STREAM),
    ],
)
def test_a_message_leaves_a_virtual_machine(
    vsock: type[FakeVsock], scheme: str, refuses: tuple[int, ...], kind: socket.SocketKind
) -> None:
    """Each scheme sends by its kind of socket, vsock by the first that exists, from a privileged port."""
    vsock.refuses = refuses
    vsock.occupied = (1023, 1022)
    got: list[bytes] = []
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(vsock.address)
        if kind != socket.SOCK_DGRAM:
            listener.listen()

        def read() -> None:
            if kind == socket.SOCK_DGRAM:
                got.append(listener.recv(100))
                return
            connection, _ = listener.accept()
            with connection:
                got.extend(iter(lambda: connection.recv(100), b""))

        thread = threading.Thread(target=read)
        thread.start()
        transmit(f"{scheme}:2:1234", b"READY=1")
        thread.join()
    assert got == [b"READY=1"]
    assert vsock.bound == (2**32 - 1, 1021)


def test_a_vsock_without_privileges_goes_from_any_port(vsock: type[FakeVsock]) -> None:
    """Who may not bind a port below 1024 sends all the same."""
    vsock.occupied = (0,)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(vsock.address)
        transmit("vsock:2:1234", b"READY=1")
        assert listener.recv(100) == b"READY=1"
    assert vsock.bound is None


def test_a_vsock_with_all_ports_taken_goes_from_any_port(vsock: type[FakeVsock]) -> None:
    """Where all privileged ports are occupied the message goes out from another."""
    vsock.occupied = tuple(range(1, 1024))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(vsock.address)
        transmit("vsock:2:1234", b"READY=1")
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("refuses", "refusal", "occupied"),
    [
        ((socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM), errno.ENODEV, ()),
        ((socket.SOCK_DGRAM,), errno.EMFILE, ()),
        ((), 0, (-1,)),
    ],
)
def test_a_vsock_that_the_kernel_refuses_is_an_oserror(
    vsock: type[FakeVsock], refuses: tuple[int, ...], refusal: int, occupied: tuple[int, ...]
) -> None:
    """No kind of socket, no descriptor, an odd failure to bind: OSError, and nothing leaks."""
    vsock.refuses, vsock.refusal, vsock.occupied = refuses, refusal, occupied
    with pytest.raises(OSError, match=r"."):
        transmit("vsock:2:1234", b"READY=1")


def test_a_vsock_manager_that_answers_is_an_oserror(vsock: type[FakeVsock]) -> None:
    """A connection that brings data instead of its end is no notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(vsock.address)
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 hello")
                connection.recv(100)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(OSError, match="answered"):
            transmit("vsock-stream:2:1234", b"READY=1")
        thread.join()


def test_descriptors_do_not_leave_a_virtual_machine() -> None:
    """Sending one over vsock is an error, as is a barrier, and neither opens anything."""
    with pytest.raises(OSError, match="virtual machine"):
        transmit("vsock:2:1234", b"FDSTORE=1", (0,))
    manager = Manager("vsock:2:1234")
    assert not manager.takes_descriptors
    with pytest.raises(NotifyError, match="needs a descriptor"):
        manager.synchronise(MINUTE)
