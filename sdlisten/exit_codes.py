"""The exit codes of every command, which are also the codes of a supervisor's answers; 0 is success. Pure."""

from __future__ import annotations

__all__ = ("CONFIGURATION", "FAILED", "LATE", "NOBODY", "REFUSED", "USAGE")

FAILED = 1
"""A check or a promise failed."""
USAGE = 2
"""The words make no sense."""
REFUSED = 3
"""The roll was refused, the old generation serves."""
LATE = 4
"""Timed out."""
NOBODY = 5
"""There is no supervisor."""
CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: to start again does not help, see RestartPreventExitStatus= of the units."""
