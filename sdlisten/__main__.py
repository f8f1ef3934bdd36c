"""``python -m sdlisten``."""

from __future__ import annotations

import sys

from sdlisten.cli import main

__all__ = ()

if __name__ == "__main__":
    sys.exit(main())
