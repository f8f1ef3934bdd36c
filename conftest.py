"""What holds for all tests: hypothesis without a clock; README.md and docs/ are tests too.

There, what stands in a fenced ``python`` block is run. The blocks of a page share their names, and
``<!-- skip: next "reason" -->`` goes before one that cannot run here. Other languages are left alone.
"""

from __future__ import annotations

from doctest import ELLIPSIS

from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

__all__ = ("pytest_collect_file",)

# Time never gates. On a new machine the first draw of a text takes seconds: hypothesis builds its tables.
settings.register_profile("sdlisten", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdlisten")

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
).pytest()
