"""Run the snippets of README.md and docs/: what stands in a fenced ``python`` block.

The blocks of a page share their names; ``<!-- skip: next "reason" -->`` goes before one that cannot run here.
Other languages (``ini``, ``console``, ``text``) are left alone.
"""

from __future__ import annotations

from doctest import ELLIPSIS

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

__all__ = ("pytest_collect_file",)

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
).pytest()
