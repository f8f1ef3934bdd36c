"""The package itself: names that load on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdlisten


def test_dir_has_every_public_name() -> None:
    """What is not loaded yet is listed too, for the prompt of an interpreter."""
    assert set(sdlisten.__all__) <= set(dir(sdlisten))


@pytest.mark.parametrize("name", sdlisten.__all__)
def test_every_name_loads(name: str) -> None:
    """Every public name can be had, and is documented where it is defined."""
    value = getattr(sdlisten, name)

    assert isinstance(value, int) or value.__doc__


def test_what_is_not_there() -> None:
    """A name that is not public is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="module 'sdlisten' has no attribute 'nonsense'"):
        _ = sdlisten.nonsense


def test_the_package_runs() -> None:
    """``python -m sdlisten`` is the command."""
    done = subprocess.run([sys.executable, "-m", "sdlisten", "--version"], check=True, capture_output=True)

    assert done.stdout.decode() == f"sdlisten {sdlisten.__version__}\n"
