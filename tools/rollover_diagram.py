"""Draw docs/explanation/rollover.svg from the table of `sdlisten.supervisor.rollover`.

``python -m tools.rollover_diagram``; the page that shows it fails its test while it is not what this draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sdlisten.supervisor.phase import Phase
from sdlisten.supervisor.rollover import PHASES

__all__ = ("draw",)

TARGET = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "rollover.svg"

_WIDTH, _HEIGHT = 760, 300
_BOX_WIDTH, _BOX_HEIGHT = 104, 34

# The middle of each box.
_PLACES = {
    Phase.NEW: (72, 96),
    Phase.STARTING: (232, 96),
    Phase.SERVING: (412, 96),
    Phase.ROLLING: (628, 44),
    Phase.SOAKING: (628, 148),
    Phase.LEAVING: (412, 248),
    Phase.STOPPING: (232, 248),
    Phase.STOPPED: (72, 248),
}


class _Route(NamedTuple):
    """A line from one box to another, and where its words begin."""

    points: tuple[tuple[int, int], ...]
    words_at: tuple[int, int]


_ROUTES = {
    (Phase.NEW, Phase.STARTING): _Route(((124, 96), (180, 96)), (138, 90)),
    (Phase.NEW, Phase.STOPPING): _Route(((96, 113), (196, 231)), (104, 168)),
    (Phase.STARTING, Phase.SERVING): _Route(((284, 96), (360, 96)), (302, 90)),
    (Phase.STARTING, Phase.STOPPING): _Route(((232, 113), (232, 231)), (238, 176)),
    (Phase.SERVING, Phase.ROLLING): _Route(((450, 79), (450, 38), (576, 38)), (494, 32)),
    (Phase.ROLLING, Phase.SERVING): _Route(((576, 52), (490, 52), (490, 90), (464, 90)), (518, 66)),
    (Phase.ROLLING, Phase.SOAKING): _Route(((628, 61), (628, 131)), (634, 98)),
    (Phase.SOAKING, Phase.SERVING): _Route(((576, 142), (520, 142), (520, 104), (464, 104)), (526, 120)),
    (Phase.SERVING, Phase.LEAVING): _Route(((412, 113), (412, 231)), (418, 176)),
    (Phase.ROLLING, Phase.LEAVING): _Route(((680, 44), (726, 44), (726, 256), (464, 256)), (694, 38)),
    (Phase.SOAKING, Phase.LEAVING): _Route(((628, 165), (628, 240), (464, 240)), (634, 204)),
    (Phase.LEAVING, Phase.STOPPING): _Route(((360, 248), (284, 248)), (312, 242)),
    (Phase.STOPPING, Phase.STOPPED): _Route(((180, 248), (124, 248)), (138, 242)),
}


def draw() -> str:
    """Return the drawing.

    Raises:
        KeyError: The table has something that has no place in the drawing.
        ValueError: The drawing has a line that the table has not.
    """
    edges: dict[tuple[Phase, Phase], list[str]] = {}
    for phase, steps in PHASES.items():
        for step, target in steps.items():
            edges.setdefault((phase, target), []).append(step.name.lower())
    if surplus := _ROUTES.keys() - edges.keys():
        raise ValueError(f"{surplus}: not in the table")
    lines = [_edge(_ROUTES[ends], " / ".join(steps)) for ends, steps in edges.items()]
    boxes = [_box(phase.value, *_PLACES[phase]) for phase in PHASES]
    return "\n".join([*_HEAD, *lines, *boxes, "</svg>", ""])


_HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"',
    ' orient="auto"><path d="M0 0L8 4L0 8z" fill="#445"/></marker></defs>',
    f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#fff"/>',
)


def _edge(route: _Route, words: str) -> str:
    points = " ".join(f"{x},{y}" for x, y in route.points)
    x, y = route.words_at
    return (
        f'<polyline points="{points}" fill="none" stroke="#445" marker-end="url(#tip)"/>'
        f'<text x="{x}" y="{y}" font-size="13" fill="#223">{words}</text>'
    )


def _box(words: str, x: int, y: int) -> str:
    left, top = x - _BOX_WIDTH // 2, y - _BOX_HEIGHT // 2
    return (
        f'<rect x="{left}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6" fill="#e8eefc"'
        ' stroke="#445"/>'
        f'<text x="{x}" y="{y + 5}" font-size="15" text-anchor="middle" fill="#112">{words}</text>'
    )


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
