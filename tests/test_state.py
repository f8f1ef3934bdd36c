"""sdlisten.state: bytes in a sealed memfd."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlisten.errors import DescriptorError, SdlistenError, StateError
from sdlisten.state import (
    STATE_MAX,
    STATE_PREFIX,
    State,
    check_state,
    read_state,
    take_state,
    write_state,
)

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from typing import TypeAlias

    Unchanged: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]


class Inherited(NamedTuple):
    """A descriptor with a name, as listen_fds() gives it."""

    fd: int
    name: str


def sealed(data: bytes, seals: int = 0xF) -> int:
    """Return a memfd with any bytes and seals, which the caller owns."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def stored(name: str, data: bytes, *, version: int = 0) -> Inherited:
    """Return a state as a start would be passed it."""
    return Inherited(write_state(data, version=version), STATE_PREFIX + name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_a_state_reads_back_as_it_was_written(data: bytes, version: int) -> None:
    """Bytes, version and time of writing come back, as often as they are read."""
    before = time.time_ns()
    fd = write_state(data, version=version)
    try:
        for _ in range(2):
            state = read_state(fd)
            assert (state.data, state.version) == (data, version)
            assert before <= state.written <= time.time_ns()
    finally:
        os.close(fd)


def test_a_state_cannot_be_changed() -> None:
    """Neither the writer nor anybody else can write, grow, shrink or unseal it; it is close-on-exec."""
    fd = write_state(b"state")
    assert not os.get_inheritable(fd)
    for change in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 10_000),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10),
    ):
        with pytest.raises(PermissionError):
            change()
    os.close(fd)


def test_reading_leaves_the_position_alone() -> None:
    """The manager's copy shares the position of ours: reading does not move it."""
    fd = write_state(b"state")
    position = os.lseek(fd, 3, os.SEEK_SET)
    assert read_state(fd).data == b"state"
    assert os.lseek(fd, 0, os.SEEK_CUR) == position
    os.close(fd)


def test_a_state_says_what_it_is() -> None:
    """The repr gives version and size, not the contents."""
    assert repr(State(b"secret", 7, 0)) == "<State version=7 of 6 bytes>"


def test_a_state_of_just_the_limit_is_kept() -> None:
    """STATE_MAX bytes are allowed, one more is not; a reader may allow fewer."""
    fd = write_state(bytes(STATE_MAX))
    assert len(read_state(fd).data) == STATE_MAX
    with pytest.raises(DescriptorError, match=f"expected at most {STATE_MAX - 1}"):
        read_state(fd, limit=STATE_MAX - 1)
    os.close(fd)
    with pytest.raises(StateError, match=f"{STATE_MAX + 1} bytes; expected at most {STATE_MAX}"):
        write_state(bytes(STATE_MAX + 1))


@pytest.mark.parametrize("version", [-1, 2**32])
def test_a_version_that_does_not_fit_is_refused(version: int) -> None:
    """The error is a ValueError of ours that names the version."""
    with pytest.raises(StateError, match=f"version={version}") as caught:
        check_state(b"", version=version)
    assert isinstance(caught.value, SdlistenError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sealed(b""),
        lambda: sealed(b"sdlstat1"),
        lambda: sealed(b"another program's bytes, of more than a header's length"),
        lambda: sealed(b"sdlstat1" + (99).to_bytes(8, "little") + bytes(12) + b"cut short"),
        lambda: sealed(b"sdlstat1" + bytes(20), seals=0x7),
        lambda: sealed(b"sdlstat1" + bytes(20), seals=0),
        lambda: os.open("/dev/null", os.O_RDONLY),
        lambda: os.open(__file__, os.O_RDONLY),
    ],
    ids=["empty", "magic", "foreign", "cut short", "not sealed shut", "not sealed", "a device", "a file"],
)
def test_what_is_no_state_is_refused(make: Callable[[], int]) -> None:
    """Unsealed, half-sealed, cut short, foreign, or no memfd at all: DescriptorError with its number."""
    fd = make()
    with pytest.raises(DescriptorError, match=f"fd {fd} ") as caught:
        read_state(fd)
    assert caught.value.fd == fd
    os.close(fd)


@given(st.binary(max_size=100))
def test_any_sealed_bytes_are_a_state_or_the_typed_error(data: bytes) -> None:
    """Nothing in a sealed memfd makes reading fail otherwise."""
    fd = sealed(data)
    try:
        read_state(fd)
    except DescriptorError:
        pass
    finally:
        os.close(fd)


def test_a_closed_descriptor_is_an_oserror() -> None:
    """A number that is no descriptor is the caller's fault, not a state's."""
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_state(fd)


def test_a_state_is_taken_by_its_name() -> None:
    """`take_state` reads and closes what has the name, and leaves all else open."""
    other = stored("other", b"other")
    file = Inherited(os.dup(0), STATE_PREFIX.replace(".s.", ".f.") + "mine")
    mine = stored("mine", b"mine", version=3)
    state = take_state("mine", [other, file, mine])
    assert state is not None
    assert (state.data, state.version) == (b"mine", 3)
    os.close(other.fd)
    os.close(file.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mine.fd)


def test_no_state_is_none() -> None:
    """A first start finds nothing, and that is no error."""
    assert take_state("mine", []) is None


def test_the_latest_of_several_states_is_taken() -> None:
    """Whatever order the manager passes them in, the one that was written last counts; all are closed."""
    first, second, third = (stored("mine", data) for data in (b"1", b"2", b"3"))
    state = take_state("mine", [second, third, first])
    assert state is not None
    assert state.data == b"3"


def test_a_false_state_is_closed_too(unchanged: Unchanged) -> None:
    """If one of the name is no state, that is the error, and none stays open."""
    with unchanged():
        passed = [stored("mine", b"1"), Inherited(os.dup(0), "sdlisten.s.mine"), stored("mine", b"2")]
        with pytest.raises(DescriptorError):
            take_state("mine", passed)


def test_a_kernel_without_noexec_seals_gives_a_state_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.3 the flag MFD_NOEXEC_SEAL is EINVAL: then it goes without."""
    create = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags & 0x8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    fd = write_state(b"state")
    assert read_state(fd).data == b"state"
    os.close(fd)


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, unchanged: Unchanged) -> None:
    """A memfd that cannot be sealed is closed."""

    def fail(*_: object) -> int:
        raise OSError(errno.EPERM, "no seals today")

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="no seals today"):
        write_state(b"state")
    monkeypatch.undo()
    with unchanged():
        pass
