"""The rules of a drain that every connection of a service asks: whether it has begun, how long to wait."""

from __future__ import annotations

import math

from sdlisten.hurry import SAME_ORDER, hurried

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sdlisten.service.connection import Connection

__all__ = ("Rules",)


class Rules:
    """How a drain goes, and how far it is. Times are in seconds of the loop's clock.

    Attributes:
        drain_timeout: The limit, from the order to stop.
        fresh_timeout: How long a connection may be silent from its beginning.
        idle_timeout: How long it may be silent since its last answer.
        deadline: When the limit is reached; infinite before the drain.
        hand_over: Offers an idle connection to a successor, and returns whether it was taken.
    """

    __slots__ = ("_ordered", "deadline", "drain_timeout", "fresh_timeout", "hand_over", "idle_timeout")

    def __init__(self, *, drain_timeout: float, fresh_timeout: float, idle_timeout: float) -> None:
        times = {
            "drain_timeout": drain_timeout,
            "fresh_timeout": fresh_timeout,
            "idle_timeout": idle_timeout,
        }
        for name, seconds in times.items():
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{name}={seconds}: expected a number of seconds, 0 or more")
        self.drain_timeout = drain_timeout
        self.fresh_timeout = fresh_timeout
        self.idle_timeout = idle_timeout
        self.deadline = math.inf
        self.hand_over: Callable[[Connection], bool] = _nobody_takes
        self._ordered = -math.inf

    @property
    def draining(self) -> bool:
        """Whether the drain has begun."""
        return self.deadline < math.inf

    def order(self, now: float) -> bool:
        """Take an order to stop; returns whether it begins the drain.

        Another one within a second is the same order; a later one is for `hurried`.
        """
        if now - self._ordered < SAME_ORDER:
            return False
        self._ordered = now
        if not self.draining:
            self.deadline = now + self.drain_timeout
            return True
        self.deadline = hurried(self.deadline, now)
        return False


def _nobody_takes(_connection: Connection) -> bool:
    return False
