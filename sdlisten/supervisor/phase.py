"""Where the whole is, and what moves it on; `sdlisten.supervisor.rollover` has the table of both."""

from __future__ import annotations

import enum

__all__ = ("Phase", "Step")


class Phase(enum.Enum):
    """Where the whole is."""

    NEW = "new"
    STARTING = "starting"
    """The first generation starts."""
    SERVING = "serving"
    ROLLING = "rolling"
    """The current generation serves, its successor starts."""
    SOAKING = "soaking"
    """Both serve; the successor is on trial."""
    LEAVING = "leaving"
    """Told to stop, and still serving, for load balancers to look away."""
    STOPPING = "stopping"
    STOPPED = "stopped"


class Step(enum.Enum):
    """What moves the whole from one phase to the next."""

    START = "start"
    READY = "all workers of the new generation are ready"
    FAILED = "the new generation failed"
    ROLL = "a roll was asked for"
    SOAKED = "the soak is over, or the old generation is gone"
    STOP = "told to stop"
    LEFT = "the stop delay is over"
    GONE = "the last worker ended"
