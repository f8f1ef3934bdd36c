"""Tell our own manager (systemd, Podman's conmon) how the whole is. What children say of it stays here.

READY=1 comes with the first generation. Around each roll stand RELOADING=1 and READY=1, the latter whatever
became of it: without it systemd would wait, and then believe that the unit is broken. STOPPING=1 is final.
"""

from __future__ import annotations

import math

from sdlisten.supervisor.phase import Phase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.notifier import Notifier

__all__ = ("Upstream",)

_EXTENSION = 15.0  # seconds that we ask for, each time
_EXTEND_EVERY = 5.0
_RELOADING = (Phase.ROLLING, Phase.SOAKING)
_STOPPING = (Phase.LEAVING, Phase.STOPPING)
_TAKES_TIME = (Phase.STARTING, *_RELOADING, *_STOPPING)


class Upstream:
    """What the manager is told.

    Args:
        notifier: The way to it.
        watchdog: Seconds after which it takes us for dead; None if it does not care.
    """

    __slots__ = ("_extend_at", "_notifier", "_phase", "_ping_at", "_ping_every")

    def __init__(self, notifier: Notifier, watchdog: float | None) -> None:
        self._notifier = notifier
        self._ping_every = watchdog / 3 if watchdog else math.inf
        self._ping_at = 0.0 if watchdog else math.inf
        self._extend_at = math.inf
        self._phase = Phase.NEW

    def enter(self, phase: Phase, now: float) -> None:
        """Say what changes with a new phase."""
        before, self._phase = self._phase, phase
        if phase in _RELOADING and before not in _RELOADING:
            self._notifier.reloading()
        elif phase is Phase.SERVING:
            self._notifier.ready()
        elif phase in _STOPPING and before not in _STOPPING:
            if before in _RELOADING:
                self._notifier.ready()  # systemd leaves no reload by STOPPING=1
            self._notifier.stopping()
        self._extend_at = now if phase in _TAKES_TIME else math.inf

    def status(self, text: str) -> None:
        """Show a text in ``systemctl status``."""
        self._notifier.status(text)

    def tick(self, now: float) -> None:
        """Show life, and ask for more time, when that is due."""
        if self._ping_at <= now:
            self._ping_at = now + self._ping_every
            self._notifier.watchdog()
        if self._extend_at <= now:
            self._extend_at = now + _EXTEND_EVERY
            self._notifier.extend_timeout(_EXTENSION)

    def next_deadline(self) -> float:
        """Return when `tick` has something to do."""
        return min(self._ping_at, self._extend_at)
