"""``make demo``: install sdlisten as a user would and run its demo; if that fails, from the checkout."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from tools.checkout import ROOT, VENV, SetupError, fingerprint, pip_install, say, venv_python

__all__ = ()

_STAMP = VENV / ".sdlisten-installed"


def _install() -> None:
    """Install the checkout into ``.venv`` unless exactly this is there.

    Raises:
        SetupError: The environment cannot be made, or PyPI does not answer.
    """
    wanted = fingerprint()
    venv_python()
    if _STAMP.is_file() and _STAMP.read_text() == wanted and (VENV / "bin" / "sdlisten").exists():
        return
    say("installing sdlisten into .venv …")
    _STAMP.unlink(missing_ok=True)
    pip_install("--force-reinstall", "--no-deps", str(ROOT))
    _STAMP.write_text(wanted)


def main() -> NoReturn:
    """Become the demo; its exit code is ours."""
    start = time.monotonic()
    try:
        _install()
    except (SetupError, OSError) as error:  # OSError: a checkout that may not be written
        say(f"{error}. Running the demo from the checkout instead.")
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "sdlisten", "demo"])
    say(f"ready after {time.monotonic() - start:.1f} s: .venv/bin/sdlisten demo")
    program = str(VENV / "bin" / "sdlisten")
    os.execv(program, [program, "demo"])


if __name__ == "__main__":
    main()
