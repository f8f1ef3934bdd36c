"""Fixtures for pytest: put ``pytest_plugins = ["sdlisten.testing.pytest"]`` into your ``conftest.py``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from sdlisten import testing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("activate",)


@pytest.fixture
def activate() -> Iterator[Callable[..., testing.Activated]]:
    """Give `sdlisten.testing.activate`, already entered; what it started ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(testing.activate(*args, **options))
