"""The image that stays: what ``sdlisten run`` becomes. See `sdlisten.supervisor.options`."""

from __future__ import annotations

import os
import sys

__all__ = ()

if __name__ == "__main__":
    if not __package__:
        # Started by its path, with the search path of the installation. A checkout may not be on that.
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

    from sdlisten.supervisor.start import main

    sys.exit(main(sys.argv[1:]))
