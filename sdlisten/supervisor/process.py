"""One worker as a process: how it is started, what it says, and what is left of it in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from sdlisten.errors import MessageError
from sdlisten.message import value_of
from sdlisten.receiver import Receiver
from sdlisten.spawn import spawn
from sdlisten.supervisor.memory import Expendable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sdlisten.receiver import Received
    from sdlisten.spawn import Child
    from sdlisten.supervisor.generation import Worker
    from sdlisten.supervisor.output import Relay

__all__ = ("Process",)

_MESSAGES_AT_ONCE = 64  # of one worker: the others want to be heard too
_STATUS_MAX = 256  # characters


class Process:
    """A worker that was started.

    It leads a session of its own: what the terminal sends to a group (Ctrl-C, a hang-up) comes to us alone,
    and SIGKILL can reach what it has started itself.

    Args:
        worker: What it is to the rollover.
        command: What to run.
        descriptors: What to pass (*borrowed*).
        environ: Its environment, without NOTIFY_SOCKET.
        lifeline: See `sdlisten.spawn.spawn` (*borrowed*).
        relay: Where its stderr goes, *taken over*; None for our own.
        watchdog: Seconds between two signs of life, until it says otherwise.
        on_trial: Whether it is to be killed before others if memory runs out, until it is `accepted`.

    Attributes:
        worker: As given.
        child: The process.
        receiver: Where it speaks to us. Its own: who speaks there is this worker, or belongs to it.
        status: The last STATUS= it sent: one line without control characters, not too long.
        says: Which of READY, RELOADING and STOPPING it said last, if any.
        watchdog: Seconds between two signs of life.
        started: When, by `time.monotonic`.

    Raises:
        OSError: There is no process, no descriptor or no directory for it; nothing is left behind.
        ValueError: A word or variable has a NUL in it.
    """

    __slots__ = ("_trial", "child", "receiver", "relay", "says", "started", "status", "watchdog", "worker")

    def __init__(
        self,
        worker: Worker,
        command: Sequence[str],
        descriptors: Sequence[tuple[int, str]],
        environ: Mapping[str, str],
        *,
        lifeline: int,
        relay: Relay | None = None,
        watchdog: float,
        on_trial: bool = False,
    ) -> None:
        self.worker = worker
        self.relay = relay
        self.watchdog = watchdog
        self.status = self.says = ""
        self.started = time.monotonic()
        with contextlib.ExitStack() as undo:
            if relay:
                undo.callback(relay.close)
            self.receiver = Receiver()
            undo.callback(self.receiver.close)
            self.child: Child = spawn(
                command,
                descriptors,
                environ={**environ, "NOTIFY_SOCKET": self.receiver.address},
                stderr=relay.writer if relay else None,
                lifeline=lifeline,
                # The lifeline for who does not know of it.
                pdeathsig=signal.SIGTERM,
                new_session=True,
            )
            undo.pop_all()
        self._trial = Expendable(self.child.pid) if on_trial else None
        if relay:
            relay.close_writer()

    @property
    def pid(self) -> int:
        """Its process."""
        return self.child.pid

    def messages(self, limit: int = _MESSAGES_AT_ONCE) -> Iterator[Received]:
        """Take what it has said; what is no message is left out, as systemd does."""
        for _ in range(limit):
            try:
                received = self.receiver.receive()
            except MessageError:
                continue
            if received is None:
                return
            with received:
                yield received

    def note(self, fields: Mapping[str, str]) -> None:
        """Remember what it says of itself."""
        if "STATUS" in fields:
            # It goes to terminals, and twice into each answer at the control socket, which has a limit.
            status = str(value_of("STATUS", fields["STATUS"]))
            self.status = status if len(status) <= _STATUS_MAX else status[: _STATUS_MAX - 1] + "…"
        for name in ("READY", "RELOADING", "STOPPING"):
            if fields.get(name) == "1":
                self.says = name

    def accepted(self) -> None:
        """Take note that its trial is over, if it was on one."""
        if self._trial:
            self._trial.spare(self.pid)

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone."""
        self.child.send_signal(number)

    def kill(self) -> None:
        """Kill it and its process group: a server that forks must not leave children that go on accepting."""
        self.child.send_signal(signal.SIGKILL)
        self._signal_group(signal.SIGKILL)

    def signal_orphans(self, number: int) -> None:
        """Send a signal to what it has left in its process group, if it has ended and is not reaped yet."""
        if os.waitid(os.P_PIDFD, self.child.fileno(), os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        # Until it is reaped its pid, which is that of the group, is its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, number)

    def close(self) -> None:
        """Pass on the rest of its stderr, and close what belongs to it, except what others still write to."""
        if self.relay:
            self.relay.forward_rest()
        if self._trial:
            self._trial.close()
        self.receiver.close()
        self.child.close()
