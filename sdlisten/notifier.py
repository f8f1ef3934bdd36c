"""Tell the service manager: ready, reloading, alive, stopping; and let it keep descriptors.

Follows sd_notify(3), sd_watchdog_enabled(3) and sd_booted(3). A manager that is gone, behind with its queue,
or unwilling does not harm the service: a call then returns False, and a line is logged once a minute at most.
Errors come where a field is invalid, and where the caller asked for certainty: `Notifier.barrier`,
`Notifier.barrier_fd`, ``confirm=True``. Nothing but `Notifier.barrier` and ``confirm=True`` waits.
"""

from __future__ import annotations

import os
import stat
import time

from sdlisten.fd_store import passable, store, store_confirmed, store_message
from sdlisten.manager import Manager
from sdlisten.message import assignment, encode_message
from sdlisten.state import STATE_PREFIX, check_state, write_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Protocol

    class HasFileno(Protocol):
        """A socket, a file: something with a descriptor."""

        def fileno(self) -> int:
            """Return the number of the descriptor."""


__all__ = ("Notifier", "booted", "notify", "watchdog_timeout")

_FD_PREFIX = "sdlisten.f."
_USEC_INFINITY = 2**64 - 1


class Notifier:
    """A line to the service manager; without one each call is a no-op that returns False.

    Threads may share it. Descriptors are *borrowed*: the manager gets duplicates.

    Args:
        address: NOTIFY_SOCKET: ``/path``, ``@abstract``, ``vsock:CID:PORT``, or ``vsock-stream:``,
            ``vsock-dgram:``, ``vsock-seqpacket:`` with the same; None or "" for no manager.
        store_limit: How many descriptors the manager keeps for us (FileDescriptorStoreMax=), where known.
    """

    __slots__ = ("_manager", "_store_limit")

    def __init__(self, address: str | None, *, store_limit: int | None = None) -> None:
        self._manager = Manager(address) if address else None
        self._store_limit = store_limit or 0

    @property
    def address(self) -> str | None:
        """NOTIFY_SOCKET, or None if there is no manager."""
        return self._manager.address if self._manager else None

    @staticmethod
    def from_environ(*, unset_environment: bool = False) -> Notifier:
        """Return the notifier of this process, as NOTIFY_SOCKET and FDSTORE (or SDLISTEN_FDSTORE) have it.

        NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read by the first such call in a process, also by
        `notify` and `watchdog_timeout`, and remembered. A forked child reads again.

        Args:
            unset_environment: Take those three out of the C environment and of ``os.environ``, so that no
                child speaks for us; what was read stays remembered.
        """
        notifier = _read_environment().notifier
        if unset_environment:
            for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
                os.environ.pop(name, None)
                # C code may have set it behind the back of os.environ, which then does not unset it.
                os.unsetenv(name)
        return notifier

    def ready(self) -> bool:
        """Say that start-up, or a reload, is complete. The handler of SIGHUP must be installed before."""
        return self.send("READY=1")

    def reloading(self) -> bool:
        """Say, after the signal, that a reload begins; `ready` must follow, also if the reload fails."""
        return self.send("RELOADING=1")

    def stopping(self) -> bool:
        """Say that the program is about to end; since systemd 259 there is no way back."""
        return self.send("STOPPING=1")

    def status(self, text: str) -> bool:
        """Show a text in ``systemctl status``: one line, whatever is in it; "" clears."""
        return self.send(assignment("STATUS", text))

    def errno(self, code: int) -> bool:
        """Say why something failed, by its number; 0 clears."""
        return self.send(assignment("ERRNO", code))

    def main_pid(self, pid: int) -> bool:
        """Make another process the main one; its pidfd goes along, so that it is no other (systemd 257)."""
        line = assignment("MAINPID", pid)
        if self._manager is None or not self._manager.takes_descriptors:
            return self.send(line)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            # Another pid namespace, or it has ended: the manager will see.
            return self.send(line)
        try:
            return self.send(line, "MAINPIDFD=1", fds=(pidfd,))
        finally:
            os.close(pidfd)

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for that long, from now on, for the current start, reload or stop; repeat within that time."""
        return self.send(assignment("EXTEND_TIMEOUT_USEC", round(seconds * 1_000_000)))

    def watchdog(self) -> bool:
        """Say that the program is alive; `watchdog_timeout` tells how often that is wanted."""
        return self.send("WATCHDOG=1")

    def watchdog_trigger(self) -> bool:
        """Make the manager do what it does when the watchdog runs out."""
        return self.send("WATCHDOG=trigger")

    def restart_reset(self) -> bool:
        """Reset the counter of automatic restarts (systemd 258)."""
        return self.send("RESTART_RESET=1")

    def send(self, *assignments: str, fds: Iterable[int | HasFileno] = ()) -> bool:
        """Send one message, without waiting.

        Args:
            assignments: Its fields, as ``NAME=VALUE``; `sdlisten.message` lists and checks them. RELOADING=1
                gets its MONOTONIC_USEC, without which ``systemctl reload`` would hang.
            fds: Descriptors to go with it (*borrowed*).

        Returns:
            Whether it is in the manager's queue. False: there is no manager, or it is gone or behind.

        Raises:
            MessageError: A field is invalid, or the descriptors do not fit the fields.
        """
        if "RELOADING=1" in assignments and not any(
            line.startswith("MONOTONIC_USEC=") for line in assignments
        ):
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            assignments = (*assignments, assignment("MONOTONIC_USEC", now))
        numbers = _numbers(fds)
        data = encode_message(*assignments, fd_count=len(numbers))
        return self._manager is not None and self._manager.offer(data, numbers)

    def store(self, *fds: int | HasFileno, name: str, poll: bool = True, confirm: bool = False) -> bool:
        """Let the manager keep descriptors over a restart, as ``sdlisten.f.NAME``.

        Args:
            fds: The descriptors (*borrowed*).
            name: What to call them; several may share a name, and are removed together.
            poll: Let the manager drop one as soon as it is hung up or broken.
            confirm: Wait until it is certain that all are kept: 0.1 s for each hundred if all is well, and at
                most 2 s for a manager that does not answer, once.

        Returns:
            Whether they were sent; with ``confirm`` whether they are kept. False as in `send`.

        Raises:
            MessageError: The name is invalid, or they are none, or more than can be passed to a start.
            StoreRefusedError: With ``confirm``: not all are kept; it says how many are.
            NotifyError: With ``confirm``: the manager cannot be reached, or (BarrierTimeoutError) is silent.
        """
        return self.store_as(_FD_PREFIX + name, fds, poll=poll, confirm=confirm)

    def store_as(
        self, stored_name: str, fds: Iterable[int | HasFileno], *, poll: bool = True, confirm: bool = False
    ) -> bool:
        """Do what `store` does under a whole name, for other modules of sdlisten."""
        numbers = _numbers(fds)
        data = store_message(stored_name, len(numbers), poll=poll)
        if self._manager is None:
            return False
        if not confirm:
            return store(self._manager, data, numbers)
        store_confirmed(self._manager, data, numbers)
        return True

    def store_budget(self, stored_name: str) -> int:
        """Return how many descriptors to store at most under a whole name; 0 if no limit is known."""
        return min(self._store_limit, passable(stored_name)) if self._manager else 0

    def remove_stored(self, name: str) -> bool:
        """Make the manager close all that `store` gave it under a name."""
        return self.remove_as(_FD_PREFIX + name)

    def remove_as(self, stored_name: str) -> bool:
        """Do what `remove_stored` does for a whole name, for other modules of sdlisten."""
        return self.send("FDSTOREREMOVE=1", assignment("FDNAME", stored_name))

    def store_state(self, name: str, data: bytes, *, version: int = 0, confirm: bool = False) -> bool:
        """Let the manager keep bytes over a restart, in place of those it kept under this name before.

        The next start finds them with `sdlisten.state.take_state`.

        Args:
            name: What to call them; the store has them as ``sdlisten.s.NAME``.
            data: At most STATE_MAX bytes.
            version: A number of your own for their format.
            confirm: As in `store`.

        Returns:
            As in `store`.

        Raises:
            StateError: They are too many, or the version is no unsigned 32-bit number.
            MessageError, StoreRefusedError, NotifyError: As in `store`.
            OSError: No memory, or no descriptor, to put them into.
        """
        stored_name = STATE_PREFIX + name
        assignment("FDNAME", stored_name)
        check_state(data, version=version)
        if self._manager is None:
            return False
        fd = write_state(data, version=version)
        try:
            # All of a name are removed together, so the old ones go before the new ones come.
            return self.remove_as(stored_name) and self.store_as(stored_name, (fd,), confirm=confirm)
        finally:
            os.close(fd)

    def remove_state(self, name: str) -> bool:
        """Make the manager forget the bytes of a name."""
        return self.remove_as(STATE_PREFIX + name)

    def barrier(self, timeout: float) -> bool:
        """Wait until the manager has processed all messages sent before.

        After one that timed out others wait only for as long as they allow more, until it is answered: a
        relay that drops barriers, such as Podman's, costs its time once.

        Args:
            timeout: Seconds.

        Returns:
            True; False if there is no manager.

        Raises:
            BarrierTimeoutError: It did not answer in time.
            NotifyError: It cannot be reached.
        """
        if self._manager is None:
            return False
        self._manager.synchronise(timeout)
        return True

    def barrier_fd(self) -> int | None:
        """Send a barrier and return what to poll for its answer: the end of file.

        Returns:
            The non-blocking end of a pipe; the caller *takes ownership*. None if there is no manager.

        Raises:
            NotifyError: It cannot be reached, or (BarrierTimeoutError) its queue is full.
        """
        return None if self._manager is None else self._manager.send_barrier()

    def close(self) -> None:
        """Close what a barrier that was not answered left open; the notifier stays usable."""
        if self._manager is not None:
            self._manager.close()


class _Environment:
    """What a process was told about its manager.

    Attributes:
        pid: The process that read it.
        notifier: NOTIFY_SOCKET.
        watchdog: WATCHDOG_USEC in seconds, if it is meant for this process.
    """

    __slots__ = ("notifier", "pid", "watchdog")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.pid = os.getpid()
        limit = _read_number(environ.get("FDSTORE") or environ.get("SDLISTEN_FDSTORE"))
        self.notifier = Notifier(environ.get("NOTIFY_SOCKET"), store_limit=limit)
        usec = _read_number(environ.get("WATCHDOG_USEC"))
        ours = environ.get("WATCHDOG_PID", str(self.pid)) == str(self.pid)
        self.watchdog = usec / 1_000_000 if 0 < usec < _USEC_INFINITY and ours else None


_environment: _Environment | None = None


def notify(*assignments: str, fds: Iterable[int | HasFileno] = ()) -> bool:
    """Send one message to the manager of this process: `Notifier.send` of `Notifier.from_environ`."""
    return Notifier.from_environ().send(*assignments, fds=fds)


def booted() -> bool:
    """Tell whether the system runs systemd (sd_booted(3)), which says not that it started this program."""
    try:
        return stat.S_ISDIR(os.lstat("/run/systemd/system").st_mode)
    except OSError:
        return False


def watchdog_timeout() -> float | None:
    """Return after how many seconds without a ``WATCHDOG=1`` the manager takes this process for hung.

    Send one at each third of that, from the loop that must be alive. None: there is no watchdog, or it is for
    another process. Read once per process, like `Notifier.from_environ`.
    """
    return _read_environment().watchdog


def _read_environment() -> _Environment:
    global _environment  # noqa: PLW0603 - once per process is the point
    if _environment is None or _environment.pid != os.getpid():
        _environment = _Environment(os.environ)
    return _environment


def _read_number(text: str | None) -> int:
    """Read what the manager wrote; 0 for nothing and for what it never writes."""
    if text and text.isascii() and text.isdigit() and len(text) <= len(str(_USEC_INFINITY)):
        return int(text)
    return 0


def _numbers(fds: Iterable[int | HasFileno]) -> tuple[int, ...]:
    return tuple(fd if isinstance(fd, int) else fd.fileno() for fd in fds)
