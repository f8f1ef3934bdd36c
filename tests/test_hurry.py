"""What a second order to stop does to a deadline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten.hurry import hurried

SECONDS = st.floats(0, 1e9)


@pytest.mark.parametrize(("left", "rest"), [(80, 8), (8, 1), (1, 1), (0.5, 0.5)])
def test_a_tenth_is_left(left: float, rest: float) -> None:
    """A tenth of what was left, at least a second, and never more than there was."""
    assert hurried(100 + left, 100) == 100 + rest


@given(SECONDS, SECONDS)
def test_nobody_gets_more_time(now: float, left: float) -> None:
    """No order to hurry prolongs anything, however often it comes."""
    once = hurried(now + left, now)
    assert now <= once <= now + left
    assert hurried(once, now) <= once
