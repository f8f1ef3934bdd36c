"""State of a program as a descriptor: bytes in a sealed memfd, for the manager to keep over a restart.

Nobody who holds the descriptor can change the bytes any more: memfd_create(2), F_ADD_SEALS of fcntl(2). A
header says how many there are, when they were written, and in which version of the writer's own format.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

from sdlisten.errors import DescriptorError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    class Named(Protocol):
        """A descriptor with its FileDescriptorName, such as `sdlisten.InheritedFd`."""

        @property
        def fd(self) -> int:
            """The number of the descriptor."""

        @property
        def name(self) -> str:
            """What LISTEN_FDNAMES calls it."""


__all__ = (
    "STATE_MAX",
    "STATE_PREFIX",
    "State",
    "check_state",
    "read_state",
    "take_state",
    "write_state",
)

STATE_PREFIX = "sdlisten.s."
"""What the stored names of states begin with."""

STATE_MAX = 16 * 1024 * 1024
"""Bytes of a state, unless a reader allows more or fewer: a memfd is memory."""

_HEADER = struct.Struct(
    "<8sQQI"
)  # magic, bytes that follow, when they were written (ns), the writer's version
_MAGIC = b"sdlstat1"
_VERSION_MAX = 2**32 - 1
_MFD_NOEXEC_SEAL = 0x8  # linux/memfd.h; since Linux 6.3


class State:
    """What an earlier start of the program left.

    Attributes:
        data: Its bytes.
        version: The number that the writer gave to their format.
        written: When, in nanoseconds since the epoch.
    """

    __slots__ = ("data", "version", "written")

    def __init__(self, data: bytes, version: int, written: int) -> None:
        self.data = data
        self.version = version
        self.written = written

    def __repr__(self) -> str:
        return f"<State version={self.version} of {len(self.data)} bytes>"


def check_state(data: bytes, *, version: int) -> None:
    """Check what `write_state` would refuse.

    Raises:
        StateError: The bytes are more than STATE_MAX, or the version is not from 0 to 2**32 - 1.
    """
    if len(data) > STATE_MAX:
        raise StateError(f"a state of {len(data)} bytes; expected at most {STATE_MAX}")
    if not 0 <= version <= _VERSION_MAX:
        raise StateError(f"version={version!r} of a state; expected 0 to {_VERSION_MAX}")


def write_state(data: bytes, *, version: int = 0) -> int:
    """Put bytes into a sealed memfd.

    Returns:
        Its descriptor, close-on-exec; the caller *takes ownership*.

    Raises:
        StateError: As in `check_state`.
        OSError: The kernel has no memory or no descriptor for it.
    """
    check_state(data, version=version)
    fd = _memfd()
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(_HEADER.pack(_MAGIC, len(data), time.time_ns(), version))
            file.write(data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_state(fd: int, *, limit: int = STATE_MAX) -> State:
    """Read what `write_state` wrote.

    Args:
        fd: The descriptor; the caller keeps it (*borrows*).
        limit: How many bytes are accepted.

    Raises:
        DescriptorError: It is no state: not a memfd, not sealed, too large, cut short, or of another writer.
        OSError: The descriptor is closed.
    """
    size = os.fstat(fd).st_size
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()
    except OSError:
        sealed = False
    if not sealed:
        raise DescriptorError(f"fd {fd} is no sealed memfd; expected a state that store_state wrote", fd=fd)
    if size > limit + _HEADER.size:
        raise DescriptorError(f"fd {fd} holds a state of {size} bytes; expected at most {limit}", fd=fd)
    found = os.pread(fd, size, 0)
    if len(found) >= _HEADER.size:
        magic, length, written, version = _HEADER.unpack_from(found)
        if magic == _MAGIC and length == len(found) - _HEADER.size:
            return State(found[_HEADER.size :], version, written)
    raise DescriptorError(f"fd {fd} holds {found[:16]!r}…; expected a state that store_state wrote", fd=fd)


def take_state(name: str, inherited: Iterable[Named], *, limit: int = STATE_MAX) -> State | None:
    """Read the state that was stored under a name by ``Notifier.store_state``.

    The manager keeps its own copy until the name is stored again or removed: a program that dies early finds
    the state once more.

    Args:
        name: As it was given to ``store_state``.
        inherited: Descriptors that were passed to us, such as ``listen_fds()``. This *takes ownership* of
            the states of this name and closes them, whatever happens; it leaves the others alone.
        limit: How many bytes are accepted.

    Returns:
        The state, the latest if there are several; None if there is none.

    Raises:
        DescriptorError: One has the name but is no state, see `read_state`.
    """
    mine = [descriptor.fd for descriptor in inherited if descriptor.name == STATE_PREFIX + name]
    try:
        states = [read_state(fd, limit=limit) for fd in mine]
    finally:
        for fd in mine:
            os.close(fd)
    return max(states, key=lambda state: state.written, default=None)


def _seals() -> int:
    """The seals of a state; a function because other systems than Linux lack the names."""
    return fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        # With the sysctl vm.memfd_noexec=2 the kernel gives no other; with 1 it logs those without.
        return os.memfd_create("sdlisten-state", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        # EINVAL before Linux 6.3; if it was anything else, it is so again.
        return os.memfd_create("sdlisten-state", flags)
