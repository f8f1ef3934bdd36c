"""The connections that are open, and what became of the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdlisten.service.report import Outcome

__all__ = ("Entry", "Table")


class Entry(Protocol):
    """What the table and the drain know of a connection.

    Attributes:
        outcome: How it will have ended.
        task: Who serves it; None for a protocol.
    """

    outcome: Outcome
    task: asyncio.Task[None] | None

    def begin_drain(self) -> bool:
        """Learn that the drain begins; returns whether a request is in progress."""

    def drop(self) -> None:
        """End at once, at the limit of the drain."""


class Table:
    """The open connections. An entry is added in the same turn of the loop in which it is accepted.

    Attributes:
        accepted: How many there ever were.
        errors: How many handlers raised.
        ended: How many ended in which way.
        empty: Set while there is none.
        changed: Called when one has come or gone.
    """

    __slots__ = ("_open", "accepted", "changed", "empty", "ended", "errors")

    def __init__(self, changed: Callable[[], None]) -> None:
        # A dict keeps the order, so that the oldest drain first.
        self._open: dict[Entry, None] = {}
        self.accepted = 0
        self.errors = 0
        self.ended: Counter[Outcome] = Counter()
        self.empty = asyncio.Event()
        self.empty.set()
        self.changed = changed

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._open))

    def add(self, entry: Entry) -> None:
        """Take a new connection in."""
        self._open[entry] = None
        self.accepted += 1
        self.empty.clear()
        self.changed()

    def remove(self, entry: Entry) -> None:
        """Let a connection go that has ended; counted by its outcome."""
        del self._open[entry]
        self.ended[entry.outcome] += 1
        if not self._open:
            self.empty.set()
        self.changed()
