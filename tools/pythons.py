"""Which Pythons this machine has: those on PATH that really run (a pyenv shim may not), and pyenv's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ("Interpreter", "find_pythons")

_ASK = """
import os, sys, sysconfig
if sys.implementation.name == "cpython" and sys.version_info >= (3, 11):
    has_headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    # _base_executable: behind a venv, the Python itself.
    print("%d.%d" % sys.version_info[:2], sys.version.split()[0], int(has_headers), sys._base_executable)
"""
_NEWEST_MINOR = 30


class Interpreter(NamedTuple):
    """A Python that ran.

    Attributes:
        minor: ``"3.12"``, as in nox's session names.
        version: ``"3.12.1"``.
        has_headers: An extension can be compiled for it.
        path: Where it is, behind shims and venvs.
    """

    minor: str
    version: str
    has_headers: bool
    path: Path


def find_pythons() -> list[Interpreter]:
    """Return one CPython of each minor version from 3.11 on, oldest first; on PATH goes before pyenv's."""
    found: dict[str, Interpreter] = {}
    for candidate in [Path(sys.executable), *_on_path(), *_of_pyenv()]:
        interpreter = _ask(candidate)
        if interpreter is not None:
            found.setdefault(interpreter.minor, interpreter)
    return sorted(found.values(), key=lambda interpreter: int(interpreter.minor.split(".")[1]))


def _on_path() -> list[Path]:
    names = [f"python3.{minor}" for minor in range(11, _NEWEST_MINOR)]
    places = [Path(place) for place in os.get_exec_path()]
    return [place / name for name in names for place in places if (place / name).exists()]


def _of_pyenv() -> list[Path]:
    """Return pyenv's Pythons, newest patch release first; its shims on PATH tell where it lives."""
    roots = [Path(place).parent for place in os.get_exec_path() if Path(place).name == "shims"]
    roots += [Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")]
    pythons = {path for root in roots for path in root.glob("versions/3.*/bin/python3")}
    return sorted(pythons, key=_release, reverse=True)


def _release(python: Path) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in python.parent.parent.name.split(".")]


def _ask(python: Path) -> Interpreter | None:
    try:
        command = [str(python), "-I", "-c", _ASK]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.strip().split(maxsplit=3)
    if done.returncode != 0 or len(words) != len(Interpreter._fields):
        return None
    minor, version, has_headers, path = words
    return Interpreter(minor, version, has_headers == "1", Path(path))
