"""Hold each module to its own coverage: 100 % where a mistake costs a listener, 95 % elsewhere.

A total would let a well-tested module pay for an untested one. Reads the report of ``coverage json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ("shortfalls",)

_COMPLETE = frozenset(
    {
        "accepting",
        "activation",
        "address",
        "adopt_or_bind",
        "backend",
        "binding",
        "descriptor",
        "environment",
        "errors",
        "exit_codes",
        "hurry",
        "inherited",
        "listener",
        "matching",
        "message",
        "rollover",
    }
)
_ELSEWHERE = 95.0


def shortfalls(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> list[str]:
    """Return a line for each module of `report` that is covered less than it must be."""
    lines = []
    for name, file in sorted(report["files"].items()):
        covered = file["summary"]["percent_covered"]
        wanted = 100.0 if Path(name).stem in _COMPLETE else _ELSEWHERE
        if covered < wanted:
            lines.append(f"{name}: {covered:.2f} % of lines and branches covered, {wanted:.0f} % wanted")
    return lines


if __name__ == "__main__":
    found = shortfalls(json.loads(Path(sys.argv[1]).read_text()))
    print(*found, sep="\n")
    sys.exit(1 if found else 0)
