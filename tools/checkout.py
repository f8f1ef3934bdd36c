"""The checkout and its ``.venv``, made with nothing but the standard library."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ("ROOT", "VENV", "SetupError", "fingerprint", "pip_install", "say", "venv_python")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# The first thing in a .venv of ours. One without it is the user's: used if it works, never removed.
_OURS = VENV / ".made-by-sdlisten"


class SetupError(Exception):
    """The virtual environment cannot be made or filled; the text says why."""


def say(text: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(text, flush=True)


def venv_python() -> Path:
    """Return the Python of ``.venv``; make the environment first if it is not there or no longer runs.

    Raises:
        SetupError: It cannot be made, or a ``.venv`` that is not ours does not work.
    """
    python = VENV / "bin" / "python"
    if _works(python):
        return python
    if VENV.exists() and not _OURS.exists():
        raise SetupError(f"{VENV} has no working Python 3.11 with pip, and we did not make it: move it away")
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"{sys.executable} cannot make a venv (Debian, Ubuntu: apt install python3-venv)")
    say(f"making .venv with Python {sys.version.split()[0]} …")
    try:
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        _OURS.touch()
        venv.create(VENV, symlinks=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"no venv can be made in {VENV}: {error}") from error
    return python


def _works(python: Path) -> bool:
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-I", "-c", check], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def pip_install(*what: str) -> None:
    """Install `what` into ``.venv``, quietly.

    Raises:
        SetupError: pip failed; the text ends with pip's last words.
    """
    # -qq leaves errors alone. One retry: whoever is offline should hear it soon.
    options = ("-qq", "--no-input", "--disable-pip-version-check")
    command = [str(venv_python()), "-m", "pip", "install", *options, *what]
    environ = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environ, check=False, text=True, stderr=subprocess.PIPE)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # The build of a wheel runs a pip in pip, whose errors stand in the middle.
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise SetupError(f"pip install failed: {errors[-1] if errors else ' / '.join(lines[-5:])}")


def fingerprint() -> str:
    """Return a digest of all that ends up in an installed sdlisten."""
    digest = hashlib.sha256()
    package = [path for path in (ROOT / "sdlisten").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in sorted([*package, ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
