"""What a service counted, and what its drain came to."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ("Counters", "DrainReport", "Outcome")


class Outcome(enum.Enum):
    """How a connection ended; the names are those of `DrainReport` and `Counters`."""

    FINISHED = "finished"
    """Its last answer was given, or the client left."""
    HANDED_OVER = "handed_over"
    """A successor has it."""
    CLOSED_IDLE = "closed_idle"
    """It owed nothing, and we closed it during a drain without having announced that."""
    DROPPED = "dropped"
    """It was closed at the limit of a drain with a request in progress."""
    REFUSED = "refused"
    """It ended before a handler saw it: a TLS handshake that failed."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the connections that were open when the drain began; each counts once.

    Its text is the line that is logged.

    Attributes:
        finished: The last answer was given, or the client left.
        handed_over: A successor has them.
        closed_idle: They owed nothing and were closed without a word, see `sdlisten.service`.
        dropped: Closed at the limit with a request in progress.
        seconds: How long it took.
    """

    finished: int
    handed_over: int
    closed_idle: int
    dropped: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"drained in {self.seconds:.1f} s: finished={self.finished} handed_over={self.handed_over} "
            f"closed_idle={self.closed_idle} dropped={self.dropped}"
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """What a service counted so far.

    ``accepted`` is the sum of ``active``, ``refused`` and the four ways to end.

    Attributes:
        accepted: Connections accepted.
        active: Connections open now.
        refused: Ended before a handler saw them: TLS handshakes that failed.
        errors: Handlers that raised; their connections count among the finished.
        finished: As in `DrainReport`, but of the whole life; likewise the next three.
        handed_over: A successor has them.
        closed_idle: Closed while idle.
        dropped: Closed at a limit.
        queued: Connections that wait in the queues of our listeners now, as far as the kernel tells.
    """

    accepted: int
    active: int
    refused: int
    errors: int
    finished: int
    handed_over: int
    closed_idle: int
    dropped: int
    queued: int
