"""sdlisten.fd_store against a store of our own, on real sockets."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten import fd_store
from sdlisten.errors import BarrierTimeoutError, MessageError, NotifyError, StoreRefusedError
from sdlisten.fd_store import passable, store, store_confirmed, store_message
from sdlisten.manager import Manager
from sdlisten.message import FDS_MAX, decode_message
from sdlisten.receiver import Received, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self, TypeAlias

    Unchanged: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]

MINUTE = 60.0


class Store:
    """A manager with a descriptor store as systemd has it, in a thread.

    It takes what fits, closes the rest without a word, removes by name, drops what is hung up, and answers
    barriers in any case.

    Attributes:
        address: Its NOTIFY_SOCKET.
        messages: All it was told.
        names: What is stored, as names.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: list[dict[str, str]] = []
        self._stored: list[tuple[str, int]] = []
        self._receiver = Receiver()
        self.address = self._receiver.address
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._run)

    @property
    def names(self) -> list[str]:
        """What is stored."""
        return [name for name, _ in self._stored]

    def fds(self, name: str) -> list[int]:
        """Return the store's own descriptors of a name."""
        return [fd for stored_name, fd in self._stored if stored_name == name]

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._receiver.fileno(), select.POLLIN)
        poll.register(self._stop, 0)
        while self._stop not in dict(poll.poll()):
            while (received := self._receiver.receive()) is not None:
                with received:
                    self._take(received)

    def _take(self, received: Received) -> None:
        fields = received.assignments
        self.messages.append(fields)
        name = fields.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in fields:
            for fd in self.fds(name):
                os.close(fd)
            self._stored = [entry for entry in self._stored if entry[0] != name]
        elif "FDSTORE" in fields:
            for fd in received.detach():
                if len(self._stored) < self.limit:
                    self._stored.append((name, fd))
                else:
                    os.close(fd)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._stopper)
        self._thread.join()
        os.close(self._stop)
        self._receiver.close()
        for _, fd in self._stored:
            os.close(fd)


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Give 24 descriptors that differ, write ends of pipes."""
    pairs = [os.pipe() for _ in range(24)]
    yield [writer for _, writer in pairs]
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def identities(fds: list[int]) -> list[tuple[int, int]]:
    """Return what tells files apart."""
    return [(status.st_dev, status.st_ino) for status in map(os.fstat, fds)]


@pytest.mark.parametrize("limit", [24, 25, 1000])
def test_a_confirmed_store_with_room_keeps_all(limit: int, pipes: list[int]) -> None:
    """With room, also with none to spare, exactly the descriptors given are kept, and no canary is left."""
    with Store(limit) as manager:
        store_confirmed(Manager(manager.address), store_message("mine", 24, poll=True), pipes)
        assert manager.names == ["mine"] * 24
        assert identities(manager.fds("mine")) == identities(pipes)


@pytest.mark.parametrize("limit", [0, 1, 10, 23])
def test_a_refused_store_says_which_are_kept(limit: int, pipes: list[int]) -> None:
    """Of more descriptors than fit the first ones are kept; the error says how many, and nothing else is."""
    with Store(limit) as manager:
        with pytest.raises(StoreRefusedError, match=f"keeps {limit} of 24 ") as caught:
            store_confirmed(Manager(manager.address), store_message("mine", 24, poll=True), pipes)
        assert caught.value.kept == limit
        assert manager.names == ["mine"] * limit
        assert identities(manager.fds("mine")) == identities(pipes[:limit])


def test_what_was_stored_before_stays(pipes: list[int]) -> None:
    """Neither asking nor being refused touches what the store holds, also under the same name."""
    with Store(3) as manager:
        line = Manager(manager.address)
        data = store_message("mine", 2, poll=True)
        store_confirmed(line, data, pipes[:2])
        with pytest.raises(StoreRefusedError) as caught:
            store_confirmed(line, data, pipes[2:4])
        assert caught.value.kept == 1
        assert identities(manager.fds("mine")) == identities(pipes[:3])


def test_more_than_a_hundred_are_asked_for_in_parts(
    monkeypatch: pytest.MonkeyPatch, pipes: list[int]
) -> None:
    """Canaries are sent in batches, and the batch in which the store fills up is the last."""
    monkeypatch.setattr(fd_store, "_CANARIES", 5)
    with Store(12) as manager:
        with pytest.raises(StoreRefusedError) as caught:
            store_confirmed(Manager(manager.address), store_message("mine", 24, poll=True), pipes)
        assert caught.value.kept == 12
        assert identities(manager.fds("mine")) == identities(pipes[:12])


def test_the_fields_of_a_store_message() -> None:
    """The name is sent, and FDPOLL=0 where polling is not wanted."""
    assert decode_message(store_message("mine", 1, poll=True)) == {"FDSTORE": "1", "FDNAME": "mine"}
    assert decode_message(store_message("mine", 1000, poll=False)) == {
        "FDSTORE": "1",
        "FDNAME": "mine",
        "FDPOLL": "0",
    }


@given(st.integers(0, 255), st.integers(0, 2000))
def test_no_more_is_stored_than_a_start_can_be_passed(length: int, count: int) -> None:
    """At most 1000 descriptors, and at most 64 KiB of LISTEN_FDNAMES, are sent under one name."""
    name = "x" * length
    allowed = 0 < count <= 1000 and count * (length + 1) <= 64 * 1024
    assert (count <= passable(name) and count > 0) == allowed
    with contextlib.nullcontext() if allowed else pytest.raises(MessageError):
        store_message(name, count, poll=True)


def test_a_store_without_confirmation_splits_messages() -> None:
    """More than 253 descriptors go in several messages, each with the name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2 * FDS_MAX + 1)]
    try:
        with Store(1000) as manager:
            line = Manager(manager.address)
            assert store(line, store_message("mine", len(fds), poll=True), fds)
            line.synchronise(MINUTE)
            assert manager.names == ["mine"] * len(fds)
            assert [fields["FDNAME"] for fields in manager.messages if "FDSTORE" in fields] == ["mine"] * 3
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_without_confirmation_stops_at_a_failure(pipes: list[int]) -> None:
    """Nobody there: False."""
    assert not store(Manager("@sdlisten-nobody"), store_message("mine", 24, poll=True), pipes)


def test_a_manager_that_is_gone_is_a_notify_error(pipes: list[int], unchanged: Unchanged) -> None:
    """Who wants certainty is told, and nothing leaks."""
    with unchanged(), pytest.raises(NotifyError, match="Connection refused"):
        store_confirmed(Manager("@sdlisten-nobody"), store_message("mine", 24, poll=True), pipes)


def test_a_silent_manager_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, pipes: list[int]) -> None:
    """A relay that never answers costs the limit of one confirmation; the next ones fail at once."""
    monkeypatch.setattr(fd_store, "_CONFIRMATION", 0.05)
    data = store_message("mine", 24, poll=True)
    with Receiver() as relay:
        line = Manager(relay.address)
        with pytest.raises(BarrierTimeoutError):
            store_confirmed(line, data, pipes)
        monkeypatch.setattr(fd_store, "_CONFIRMATION", MINUTE)
        line._waited = MINUTE  # as after a first confirmation with that limit
        begin = time.monotonic()
        with pytest.raises(BarrierTimeoutError):
            store_confirmed(line, data, pipes)
        assert time.monotonic() - begin < MINUTE / 2
        line.close()


def test_a_thread_does_not_ask_while_another_does(monkeypatch: pytest.MonkeyPatch, pipes: list[int]) -> None:
    """Two that ask at once would count the same room twice: the second waits, at most for its limit."""
    monkeypatch.setattr(fd_store, "_CONFIRMATION", 0.01)
    line = Manager("@sdlisten-nobody")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with line.lock:
            held.set()
            release.wait(MINUTE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(MINUTE)
    with pytest.raises(BarrierTimeoutError, match="another thread"):
        store_confirmed(line, store_message("mine", 24, poll=True), pipes)
    release.set()
    thread.join()


def test_no_descriptors_left_to_ask_with_is_a_notify_error(pipes: list[int], unchanged: Unchanged) -> None:
    """At the limit of open files the canaries that were made are closed again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = store_message("mine", 24, poll=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(pipes) + 9, hard))
    try:
        with unchanged(), pytest.raises(NotifyError, match="Too many open files"):
            store_confirmed(Manager("@sdlisten-nobody"), data, pipes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_canaries_of_a_dead_process_leave_the_store_by_themselves() -> None:
    """They are polled, having no FDPOLL=0, and hang up with us; if we live on they are removed."""
    with Store(1000) as manager:
        near, far = socket.socketpair()
        with near:
            store_confirmed(Manager(manager.address), store_message("mine", 1, poll=True), [near.fileno()])
        far.close()
    canaries = [
        fields for fields in manager.messages if fields.get("FDNAME", "").startswith("sdlisten.canary.")
    ]
    assert [fields.get("FDPOLL") for fields in canaries] == [None, None]
    assert [fields.keys() - {"FDNAME"} for fields in canaries] == [{"FDSTORE"}, {"FDSTOREREMOVE"}]
