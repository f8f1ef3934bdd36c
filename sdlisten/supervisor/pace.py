"""How long things may take, and how long to wait before the next try. Pure: no kernel, no clock."""

from __future__ import annotations

import math

__all__ = ("LONG_LIFE", "Limits", "backoff")

LONG_LIFE = 10.0
"""Seconds of being ready after which a crash counts as the first one again."""

_BACKOFF_FIRST, _BACKOFF_FACTOR, _BACKOFF_MAX = 0.1, 1.5, 30.0


class Limits:
    """How long things may take; seconds, infinite for no limit.

    Attributes:
        ready: From the start of a worker to its READY=1.
        drain: From the order to stop to SIGKILL.
        soak: How long both generations accept after the new one is ready.
        stop_delay: How long to serve on after the order to stop.
        watchdog: Between two signs of life, once there was one.
        guess: After how long a worker that never says READY=1 is taken for ready.
    """

    __slots__ = ("drain", "guess", "ready", "soak", "stop_delay", "watchdog")

    def __init__(
        self,
        *,
        ready: float = 60.0,
        drain: float = 9.0,
        soak: float = 0.0,
        stop_delay: float = 0.0,
        watchdog: float = math.inf,
        guess: float = math.inf,
    ) -> None:
        self.ready = ready
        self.drain = drain
        self.soak = soak
        self.stop_delay = stop_delay
        self.watchdog = watchdog
        self.guess = guess


def backoff(crashes: int, chance: float) -> float:
    """Return how many seconds to wait after so many crashes in a row before this one.

    Args:
        crashes: 0 for the first one, after which there is no wait.
        chance: From 0 to 1; it takes up to a half off, so that workers that crashed together part.
    """
    if not crashes:
        return 0.0
    # 1.5 ** 100 is beyond any limit, and 1.5 ** 10000 no float.
    delay = _BACKOFF_FIRST * _BACKOFF_FACTOR ** min(crashes - 1, 100)
    return min(delay, _BACKOFF_MAX) * (1 - chance / 2)
