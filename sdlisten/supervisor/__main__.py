"""The image that stays: what ``sdlisten run`` becomes. See `sdlisten.supervisor.options`."""

from __future__ import annotations

import sys

from sdlisten.supervisor.start import main

__all__ = ()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
