"""sdlisten.receiver: the manager's end of NOTIFY_SOCKET, on real sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlisten import receiver as receiver_module
from sdlisten.errors import MessageError
from sdlisten.message import FDS_MAX, MESSAGE_MAX
from sdlisten.receiver import Received, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    Unchanged: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]


SHARED = "/tmp"  # noqa: S108 - where it makes directories of mode 0700


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a receiver."""
    with Receiver() as receiver:
        yield receiver


def tell(receiver: Receiver, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send any bytes and descriptors, past every check of ours."""
    address = receiver.address.replace("@", "\0", 1) if receiver.address[0] == "@" else receiver.address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        sender.sendmsg([data], beside, 0, address)


def received(receiver: Receiver) -> Received:
    """Return the next message; it must be there."""
    message = receiver.receive()
    assert message is not None
    return message


def identity(fd: int) -> tuple[int, int]:
    """Return what tells files apart."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Set the soft limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("abstract", [False, True])
def test_a_message_arrives_with_its_sender(abstract: bool) -> None:
    """A message is received once, without waiting, with the credentials of its sender."""
    with Receiver(abstract=abstract) as receiver:
        assert receiver.receive() is None
        tell(receiver, b"READY=1\nSTATUS=up")
        message = received(receiver)
        assert message.assignments == {"READY": "1", "STATUS": "up"}
        assert (message.pid, message.uid, message.gid) == (os.getpid(), os.getuid(), os.getgid())
        assert message.fds == ()
        assert receiver.receive() is None


def test_a_message_of_another_process_has_its_pid(receiver: Receiver) -> None:
    """The kernel says who sent: the child, and not us."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            tell(receiver, b"READY=1")
        os._exit(0)
    os.waitpid(child, 0)
    assert received(receiver).pid == child


def test_the_socket_is_ours_alone(receiver: Receiver) -> None:
    """It lies in a fresh directory of mode 0700, is non-blocking and close-on-exec."""
    directory = Path(receiver.address).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert list(directory.iterdir()) == [Path(receiver.address)]
    assert not os.get_blocking(receiver.fileno())
    assert not os.get_inheritable(receiver.fileno())
    assert repr(receiver) == f"<Receiver {receiver.address!r} fd={receiver.fileno()}>"


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    """Socket and directory go with `close`, which may be called twice, also if somebody was faster."""
    receiver = Receiver(directory=tmp_path)
    assert Path(receiver.address).parent.parent == tmp_path
    receiver.close()
    receiver.close()
    assert receiver.fileno() == -1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        receiver.receive()
    receiver = Receiver(directory=tmp_path)
    Path(receiver.address).unlink()
    Path(receiver.address).parent.rmdir()
    receiver.close()


def test_a_directory_that_cannot_be_removed_is_left(tmp_path: Path) -> None:
    """A sender may leave a file beside the socket, or a directory in its place: the receiver just ends."""
    receiver = Receiver(directory=tmp_path)
    Path(receiver.address).with_name("left").touch()
    receiver.close()
    assert not Path(receiver.address).exists()
    receiver = Receiver(directory=tmp_path)
    Path(receiver.address).unlink()
    Path(receiver.address).mkdir()
    receiver.close()
    assert receiver.fileno() == -1


def test_a_child_leaves_the_directory_to_its_parent(tmp_path: Path) -> None:
    """A forked child that closes its copy does not take the parent's address away."""
    with Receiver(directory=tmp_path) as receiver:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                receiver.close()
            os._exit(0)
        os.waitpid(child, 0)
        tell(receiver, b"READY=1")
        assert received(receiver).assignments == {"READY": "1"}


def test_an_abstract_address_is_random() -> None:
    """Two receivers have two abstract names, and no file."""
    with Receiver(abstract=True) as one, Receiver(abstract=True) as other:
        assert one.address != other.address
        assert one.address.startswith("@sdlisten-")


@pytest.mark.parametrize(
    ("variables", "parent"),
    [
        ({"RUNTIME_DIRECTORY": "{tmp}:/elsewhere"}, "{tmp}"),
        ({"TMPDIR": "{tmp}"}, "{tmp}"),
        ({"TMPDIR": "relative"}, SHARED),
        ({"TMPDIR": "/nowhere"}, SHARED),
        ({"TMPDIR": "/" + "x" * 100}, SHARED),
        ({}, SHARED),
    ],
    ids=str,
)
def test_the_directory_is_where_one_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], parent: str
) -> None:
    """The first place that is absolute, short and writable gets the directory."""
    for name in ("RUNTIME_DIRECTORY", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    with Receiver() as receiver:
        assert str(Path(receiver.address).parent.parent) == parent.format(tmp=tmp_path)


def test_no_directory_anywhere_is_an_oserror(monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged) -> None:
    """If no place is writable the refusal of the last one is the error, and nothing stays open."""

    def refuse(path: str, mode: int) -> None:
        raise PermissionError(errno.EACCES, f"refused {mode:o}", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with unchanged(), pytest.raises(PermissionError, match=r"refused 700.*/dev/shm/sdlisten-"):
        Receiver()


def test_a_directory_too_deep_for_an_address_is_an_oserror(tmp_path: Path, unchanged: Unchanged) -> None:
    """A directory that is asked for but does not fit into a socket's address is removed again."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with unchanged(), pytest.raises(OSError, match="too long"):
        Receiver(directory=deep)
    assert list(deep.iterdir()) == []


def test_descriptors_arrive_close_on_exec(receiver: Receiver) -> None:
    """They are duplicates of what was sent, in its order, close-on-exec, and closed with the message."""
    reader, writer = os.pipe()
    tell(receiver, b"FDSTORE=1", (writer, reader, writer))
    with received(receiver) as message:
        assert [identity(fd) for fd in message.fds] == [identity(writer)] * 3
        assert not any(map(os.get_inheritable, message.fds))
        assert [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in message.fds] == [1, 0, 1]
        assert repr(message) == (
            f"<Received {{'FDSTORE': '1'}} from pid={os.getpid()} uid={os.getuid()} fds={message.fds}>"
        )
    assert message.fds == ()
    os.close(reader)
    os.close(writer)


def test_detached_descriptors_are_the_callers(receiver: Receiver) -> None:
    """After `detach` neither `close` nor the end of the message closes them."""
    tell(receiver, b"FDSTORE=1", (0,))
    message = received(receiver)
    (fd,) = message.detach()
    assert message.detach() == ()
    message.close()
    del message
    assert identity(fd) == identity(0)
    os.close(fd)


def test_a_forgotten_message_closes_its_descriptors(receiver: Receiver) -> None:
    """A message that nobody keeps takes its descriptors with it."""
    tell(receiver, b"FDSTORE=1", (0,))
    message = received(receiver)
    (fd,) = message.fds
    del message
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_as_many_descriptors_as_the_kernel_sends(receiver: Receiver) -> None:
    """253 descriptors arrive whole."""
    with open_files(4096):
        tell(receiver, b"FDSTORE=1", [0] * FDS_MAX)
        with received(receiver) as message:
            assert len(message.fds) == FDS_MAX


def test_a_descriptor_that_fails_to_close_is_closed(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that close(2) reports, as of a file on a network, keeps neither it nor the next one open."""
    tell(receiver, b"FDSTORE=1", (0, 0))
    message = received(receiver)
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", fail)
    message.close()
    monkeypatch.undo()


def connection_with_unsent_data(linger: int) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection; what the first has written does not fit into the second."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))
    left.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            left.send(bytes(65536))
    return left, right


def test_a_socket_that_lingers_is_closed_at_once(receiver: Receiver) -> None:
    """The last holder of a socket with SO_LINGER would wait in close(2) until its data has been read."""
    left, right = connection_with_unsent_data(linger=3600)
    with right:
        tell(receiver, b"FDSTORE=1", (left.fileno(), 0))
        os.close(left.detach())
        received(receiver).close()  # else this test times out
        assert right.recv(1) == b"\0"


def test_a_socket_that_shall_be_reset_is_reset(receiver: Receiver) -> None:
    """SO_LINGER with no time is not touched: it does not wait, and the peer shall see a reset."""
    left, right = connection_with_unsent_data(linger=0)
    with right:
        tell(receiver, b"FDSTORE=1", (left.fileno(),))
        left.close()
        received(receiver).close()
        poll = select.poll()
        poll.register(right, 0)
        assert poll.poll(10_000) == [(right.fileno(), select.POLLERR | select.POLLHUP)]


def test_a_barrier_is_answered_after_what_came_before(receiver: Receiver) -> None:
    """The sender's pipe ends when the barrier is received, not while earlier messages wait."""
    reader, writer = os.pipe()
    tell(receiver, b"READY=1")
    tell(receiver, b"BARRIER=1", (writer,))
    os.close(writer)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert received(receiver).assignments == {"READY": "1"}
    assert poll.poll(0) == []
    message = received(receiver)
    assert (message.assignments, message.fds) == ({"BARRIER": "1"}, ())
    assert poll.poll(0) == [(reader, select.POLLHUP)]
    os.close(reader)


@pytest.mark.parametrize(
    ("data", "count", "why"),
    [
        (b"BARRIER=1", 0, "BARRIER=1 with 0 other assignments and 0 descriptors"),
        (b"BARRIER=1", 2, "BARRIER=1 with 0 other assignments and 2 descriptors"),
        (b"BARRIER=1\nREADY=1", 1, "BARRIER=1 with 1 other assignments and 1 descriptors"),
        (b"", 0, "0 bytes"),
        (b"hello", 1, "no assignment"),
        (b"READY=1\0\0", 1, "a NUL inside"),
        (b"X_MINE=" + b"x" * MESSAGE_MAX, 1, "over 4096 bytes"),
    ],
)
def test_what_is_no_message_is_dropped_whole(
    receiver: Receiver, unchanged: Unchanged, data: bytes, count: int, why: str
) -> None:
    """A malformed message is a MessageError, its descriptors are closed, and the next one is received."""
    tell(receiver, data, [0] * count)
    tell(receiver, b"READY=1")
    with unchanged(), pytest.raises(MessageError, match=why):
        receiver.receive()
    assert received(receiver).assignments == {"READY": "1"}


def test_the_longest_message_arrives(receiver: Receiver) -> None:
    """4096 bytes are a message."""
    tell(receiver, b"X_MINE=" + b"x" * (MESSAGE_MAX - 7))
    assert received(receiver).assignments == {"X_MINE": "x" * (MESSAGE_MAX - 7)}


def test_descriptors_that_do_not_fit_our_table_are_an_error(receiver: Receiver, unchanged: Unchanged) -> None:
    """At our limit of open files a part would be lost: the message is refused, and what came is closed."""
    tell(receiver, b"FDSTORE=1", [0] * 10)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    spare = [os.dup(0) for _ in range(highest)]
    room = 3
    for _ in range(room):
        os.close(spare.pop())
    try:
        with (
            open_files(spare[-1] + 1 + room),
            unchanged(),
            pytest.raises(MessageError, match="of a message's"),
        ):
            receiver.receive()
    finally:
        for fd in spare:
            os.close(fd)
    tell(receiver, b"READY=1")
    assert received(receiver).assignments == {"READY": "1"}


def test_a_message_without_a_sender_is_an_error(receiver: Receiver, unchanged: Unchanged) -> None:
    """Without credentials nobody can say who sent it, so it is refused with its descriptors."""
    with socket.socket(fileno=os.dup(receiver.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    tell(receiver, b"FDSTORE=1", (0,))
    with unchanged(), pytest.raises(MessageError, match="not visible"):
        receiver.receive()


def test_a_sender_of_another_pid_namespace_is_an_error() -> None:
    """The kernel gives pid 0 for a process that our namespace does not see: nobody to answer for it."""
    credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("iII", 0, 1000, 1000))
    with pytest.raises(MessageError, match="not visible"):
        receiver_module._credentials([credentials])


def test_a_descriptor_list_that_ends_inside_a_number_is_read_to_there() -> None:
    """Ancillary data is taken as far as it makes whole descriptors, and of its own kind only."""
    rights = struct.pack("ii", 7, 8) + b"\1"
    ancillary = [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, rights),
        (socket.IPPROTO_IP, socket.SCM_RIGHTS, rights),
    ]
    assert list(receiver_module._descriptors(ancillary)) == [7, 8]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=200)
    | st.binary(min_size=MESSAGE_MAX - 1, max_size=MESSAGE_MAX + 1)
    | st.lists(
        st.sampled_from(
            [b"READY=1", b"BARRIER=1", b"FDSTORE=1", b"FDNAME=x", b"\n", b"\0", b"=", b"STATUS=\xff"]
        )
    ).map(b"\n".join),
    st.lists(
        st.sampled_from(["pipe", "socket", "file", "directory", "memfd", "pidfd", "itself"]), max_size=5
    ),
)
def test_any_bytes_and_any_descriptors_leak_nothing(
    receiver: Receiver, unchanged: Unchanged, data: bytes, kinds: list[str]
) -> None:
    """Whatever is sent, what comes is a message or the typed error, and no descriptor stays open."""
    make: dict[str, Callable[[], tuple[int, ...]]] = {
        "pipe": os.pipe,
        "socket": lambda: (socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(),),
        "file": lambda: (os.open(__file__, os.O_RDONLY),),
        "directory": lambda: (os.open("/", os.O_RDONLY | os.O_DIRECTORY),),
        "memfd": lambda: (os.memfd_create("fuzz"),),
        "pidfd": lambda: (os.pidfd_open(os.getpid()),),
        "itself": lambda: (os.dup(receiver.fileno()),),
    }
    with unchanged():
        ours = [fd for kind in kinds for fd in make[kind]()]
        try:
            tell(receiver, data, ours)
            with contextlib.suppress(MessageError), received(receiver) as message:
                assert message.assignments
                assert len(message.fds) in {0, len(ours)}
            assert receiver.receive() is None
        finally:
            for fd in ours:
                os.close(fd)
