"""``python -m sdlisten.load``: the same as ``sdlisten load``."""

from __future__ import annotations

import sys

from sdlisten.load import main

__all__ = ()

sys.exit(main())
