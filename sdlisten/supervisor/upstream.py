"""Tell our own manager (systemd, Podman's conmon) how the whole is. What children say of it stays here.

READY=1 comes with the first generation. Around each roll stand RELOADING=1 and READY=1, the latter whatever
became of it: without it systemd would wait, and then believe that the unit is broken. STOPPING=1 is final.

The queue of a manager is short (10 messages, net.unix.max_dgram_qlen), and it may be busy. So what it must
not miss is kept until it is sent, in order; of texts for people only the last one is.
"""

from __future__ import annotations

import math
import time

from sdlisten.manager import Manager
from sdlisten.message import assignment, encode_message
from sdlisten.supervisor.output import say
from sdlisten.supervisor.phase import Phase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.notifier import Notifier

__all__ = ("Upstream",)

_EXTENSION = 15_000_000  # microseconds that we ask for, each time
_EXTEND_EVERY = 5.0
_RETRY = 0.25
_UNSENT_MAX = 16  # words for a manager that does not listen: the last ones say how it is
_RELOADING = (Phase.ROLLING, Phase.SOAKING)
_STOPPING = (Phase.LEAVING, Phase.STOPPING)
_TAKES_TIME = (Phase.STARTING, *_RELOADING, *_STOPPING)


class Upstream:
    """What the manager is told.

    Args:
        notifier: Where it is.
        watchdog: Seconds after which it takes us for dead; None if it does not care.
    """

    __slots__ = (
        "_extend_at",
        "_manager",
        "_phase",
        "_ping_at",
        "_ping_every",
        "_retry_at",
        "_status",
        "_unsent",
    )

    def __init__(self, notifier: Notifier, watchdog: float | None) -> None:
        # Not through the notifier, which logs what fails: logging writes to stderr, and would wait where that
        # is full and nobody reads; meanwhile no signal would be heard.
        self._manager = Manager(notifier.address, say) if notifier.address else None
        self._ping_every = watchdog / 3 if watchdog else math.inf
        self._ping_at = 0.0 if watchdog else math.inf
        self._extend_at = self._retry_at = math.inf
        self._phase = Phase.NEW
        self._unsent: list[str] = []
        self._status = ""

    def enter(self, phase: Phase, now: float) -> None:
        """Say what changes with a new phase."""
        before, self._phase = self._phase, phase
        if phase in _RELOADING and before not in _RELOADING:
            self._unsent.append("RELOADING=1")
        elif phase is Phase.SERVING:
            self._unsent.append("READY=1")
        elif phase in _STOPPING and before not in _STOPPING:
            if before in _RELOADING:
                self._unsent.append("READY=1")  # systemd leaves no reload by STOPPING=1
            self._unsent.append("STOPPING=1")
        self._extend_at = now if phase in _TAKES_TIME else math.inf
        self._send(now)

    def status(self, text: str, now: float) -> None:
        """Show a text in ``systemctl status``."""
        self._status = assignment("STATUS", text)
        self._send(now)

    def tick(self, now: float) -> None:
        """Show life, ask for more time, and send what could not be sent, when that is due."""
        if self._ping_at <= now:
            self._ping_at = now + self._ping_every
            self._tell("WATCHDOG=1")
        if self._extend_at <= now:
            self._extend_at = now + _EXTEND_EVERY
            self._tell(assignment("EXTEND_TIMEOUT_USEC", _EXTENSION))
        if self._retry_at <= now:
            self._send(now)

    def next_deadline(self) -> float:
        """Return when `tick` has something to do."""
        return min(self._ping_at, self._extend_at, self._retry_at)

    def _send(self, now: float) -> None:
        self._retry_at = math.inf
        if self._manager is None:
            self._unsent.clear()
            return
        del self._unsent[:-_UNSENT_MAX]
        while self._unsent or self._status:
            words = [*self._unsent[:1]]
            if len(self._unsent) <= 1 and self._status:
                words.append(self._status)
            if "RELOADING=1" in words:
                words.append(assignment("MONOTONIC_USEC", time.monotonic_ns() // 1000))  # needed by systemd
            if not self._tell(*words):
                self._retry_at = now + _RETRY
                return
            del self._unsent[:1]
            if self._status in words:
                self._status = ""

    def _tell(self, *words: str) -> bool:
        return self._manager is not None and self._manager.offer(encode_message(*words))
