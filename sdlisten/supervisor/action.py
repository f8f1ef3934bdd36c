"""What the rollover wants done: orders to whoever touches the kernel. Pure: no kernel, no clock."""

from __future__ import annotations

import enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdlisten.supervisor.generation import Generation, Worker
    from sdlisten.supervisor.phase import Phase

__all__ = ("Action", "Enter", "Exit", "Kill", "Outcome", "Settle", "Spawn", "Terminate", "Welcome")


class Outcome(enum.Enum):
    """What became of a roll."""

    SERVES = "serves"
    REFUSED = "refused"
    """The new generation failed; the old one serves."""
    FAILED = "failed"
    """The first generation failed, and with it all: there was no old one."""
    STOPPED = "stopped"
    """An order to stop came before."""


class Action:
    """An order; its kinds say what they order. Two are equal if they order the same."""

    __slots__: tuple[str, ...] = ()

    def _fields(self) -> list[object]:
        return [getattr(self, name) for name in self.__slots__]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Action) and type(self) is type(other) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((type(self), *self._fields()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._fields()))})"


class Spawn(Action):
    """Start the command of the worker's generation; its end is reported even if it cannot be started."""

    __slots__ = ("worker",)

    def __init__(self, worker: Worker) -> None:
        self.worker = worker


class Welcome(Action):
    """A worker is ready, or (`guessed`) taken for ready: no more allowances for its start."""

    __slots__ = ("guessed", "worker")

    def __init__(self, worker: Worker, *, guessed: bool) -> None:
        self.worker = worker
        self.guessed = guessed


class Terminate(Action):
    """Tell a worker to drain and end; the second time: to hurry."""

    __slots__ = ("worker",)

    def __init__(self, worker: Worker) -> None:
        self.worker = worker


class Kill(Action):
    """Send SIGKILL to a worker and what belongs to it."""

    __slots__ = ("why", "worker")

    def __init__(self, worker: Worker, why: str) -> None:
        self.worker = worker
        self.why = why


class Settle(Action):
    """Say what became of a roll, or of the start, to all who asked for it."""

    __slots__ = ("generation", "outcome", "requesters", "why")

    def __init__(
        self, requesters: Sequence[object], outcome: Outcome, generation: Generation | None, why: str
    ) -> None:
        self.requesters = tuple(requesters)
        self.outcome = outcome
        self.generation = generation
        self.why = why


class Enter(Action):
    """The whole is in another phase now."""

    __slots__ = ("phase",)

    def __init__(self, phase: Phase) -> None:
        self.phase = phase


class Exit(Action):
    """Nothing runs any more: end with this code."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code
