"""The lifeline: a pipe into which nobody writes, and whose end of file says that the supervisor has gone.

`sdlisten run` puts it behind what LISTEN_FDS counts, and its number into SDLISTEN_LIFELINE_FD. Children of a
worker inherit that variable, but hardly the descriptor: the number may then mean anything. So it counts only
together with LISTEN_*, which say for which process they are, and only where the supervisor puts it.
"""

from __future__ import annotations

import os
import stat

__all__ = ("LIFELINE", "claim_lifeline")

LIFELINE = "SDLISTEN_LIFELINE_FD"
"""The variable that tells a program the number of its lifeline."""


def claim_lifeline(place: int) -> int | None:
    """Make the lifeline close-on-exec and remove its variable.

    Args:
        place: Where it must be.

    Returns:
        Its number; None if there is none.
    """
    if os.environ.pop(LIFELINE, None) != str(place):
        return None
    try:
        if not stat.S_ISFIFO(os.fstat(place).st_mode):
            return None
        os.set_inheritable(place, False)
    except OSError:  # somebody has closed it, who had no use for it
        return None
    return place
