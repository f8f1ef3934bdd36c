"""What repeated orders to stop mean, to a service and to a supervisor alike. Pure: no kernel, no clock."""

from __future__ import annotations

__all__ = ("SAME_ORDER", "hurried")

SAME_ORDER = 1.0
"""Seconds within which several are one: systemd, a supervisor and a person may all send SIGTERM for it."""

_SHORTEST_REST = 1.0


def hurried(deadline: float, now: float) -> float:
    """Return when a drain ends that is told once more to stop: what was left of it becomes a tenth.

    Args:
        deadline: When it would have ended.
        now: The time; both in seconds of the same clock.

    Returns:
        The new deadline: at least 1 s from now, and never later than the old one.
    """
    return min(deadline, now + max(_SHORTEST_REST, (deadline - now) / 10))
