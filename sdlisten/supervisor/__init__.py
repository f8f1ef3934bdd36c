"""``sdlisten run``: hold the sockets, and roll generations of any LISTEN_FDS program.

`rollover` decides, and touches nothing; all else here does as it says, in one thread and without asyncio.
"""

from __future__ import annotations

__all__ = ()
