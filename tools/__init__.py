"""What the Makefile runs: standard library only, so that a fresh clone needs nothing but a Python."""

from __future__ import annotations

__all__ = ()
