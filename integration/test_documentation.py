"""What docs/ says about containers is true: its programs run, on an image of ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from testcontainers.core.config import testcontainers_config

from .images import RELEASES, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRIXIE = RELEASES[1]
PAGE = ROOT / "docs" / "howto" / "test-with-testcontainers.md"


def test_testcontainers_page(images: Callable[..., str], tmp_path: Path) -> None:
    """The tests of docs/howto/test-with-testcontainers.md pass with the units that it names."""
    for name, program in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (tmp_path / name).write_text(program.replace('"hello-test"', repr(images(TRIXIE))))
    (tmp_path / "units").mkdir()
    for unit in ("hello.socket", "hello.service"):
        shutil.copy(ROOT / "units" / unit, tmp_path / "units")
    ryuk = str(testcontainers_config.ryuk_disabled).lower()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)],
        env=os.environ | {"TESTCONTAINERS_RYUK_DISABLED": ryuk, "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
