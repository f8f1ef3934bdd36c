"""A generation: one command, a slot for each worker, and the state of each worker. Pure: no kernel, no clock.

A slot is a place to be filled; a worker is one process in it. After a crash the slot gets another one.
"""

from __future__ import annotations

import enum
import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("WORKER_STATES", "Generation", "Slot", "Turn", "Worker", "WorkerState")


class WorkerState(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It was told to stop, and finishes what it has."""
    KILLED = "killed"
    """SIGKILL was sent; the end is on its way."""
    ENDED = "ended"


class Turn(enum.Enum):
    """What moves a worker from one state to the next."""

    READY = "says READY=1"
    DRAIN = "is told to stop"
    KILL = "is killed"
    END = "ends"


_ENDS = {Turn.END: WorkerState.ENDED}
_KILLED = {Turn.KILL: WorkerState.KILLED, **_ENDS}
_DRAINS = {Turn.DRAIN: WorkerState.DRAINING, **_KILLED}

WORKER_STATES: dict[WorkerState, dict[Turn, WorkerState]] = {
    WorkerState.STARTING: {Turn.READY: WorkerState.READY, **_DRAINS},
    WorkerState.READY: _DRAINS,
    WorkerState.DRAINING: _KILLED,
    WorkerState.KILLED: _ENDS,
    WorkerState.ENDED: {},
}
"""What may follow what. A turn that is not here is a mistake of ours, and a KeyError."""


class Worker:
    """One process, seen from outside. Times are in seconds of the caller's clock, infinite for never.

    Attributes:
        slot: Its place.
        state: Where it is in its life.
        ready_at: When it became ready; infinite before.
        deadline: When it is too late: for READY=1 while it starts, for its end while it drains.
        guess_at: When it will be taken for ready though it never said so.
        pulse_by: When the next sign of life is due.
        hurried: Whether its drain was shortened.
    """

    __slots__ = ("deadline", "guess_at", "hurried", "pulse_by", "ready_at", "slot", "state")

    def __init__(self, slot: Slot, *, deadline: float, guess_at: float = math.inf) -> None:
        self.slot = slot
        self.state = WorkerState.STARTING
        self.ready_at = math.inf
        self.deadline = deadline
        self.guess_at = guess_at
        self.pulse_by = math.inf
        self.hurried = False

    def __repr__(self) -> str:
        return f"<Worker {self.slot.generation.number}.{self.slot.number} {self.state.value}>"

    @property
    def up(self) -> bool:
        """Whether it was neither told to stop nor killed, and lives."""
        return Turn.DRAIN in WORKER_STATES[self.state]

    @property
    def served(self) -> bool:
        """Whether it was ever ready, and may so have accepted connections."""
        return self.ready_at < math.inf

    @property
    def next_deadline(self) -> float:
        """When something becomes due if nothing happens before."""
        return min(self.deadline, self.guess_at, self.pulse_by)

    def turn(self, turn: Turn) -> None:
        """Go from one state to the next; what was due in the old one is due no longer."""
        self.state = WORKER_STATES[self.state][turn]
        self.deadline = self.guess_at = math.inf
        if not self.up:
            self.pulse_by = math.inf  # as systemd, which watches no service that it stops


class Slot:
    """A place for one worker.

    Attributes:
        generation: Whose it is.
        number: Which one, from 0.
        worker: Who is there now.
        crashes: How often in a row it fell empty soon after it was filled.
        refill_at: When to fill it again; infinite if not by the clock.
    """

    __slots__ = ("crashes", "generation", "number", "refill_at", "worker")

    def __init__(self, generation: Generation, number: int) -> None:
        self.generation = generation
        self.number = number
        self.worker: Worker | None = None
        self.crashes = 0
        self.refill_at = math.inf


class Generation:
    """One start of a command, in so many slots.

    Attributes:
        number: From 1, never used again.
        command: What its workers run.
        slots: Their places.
    """

    __slots__ = ("command", "number", "slots")

    def __init__(self, number: int, command: Sequence[str], slots: int) -> None:
        self.number = number
        self.command = command
        self.slots = tuple(Slot(self, place) for place in range(slots))

    def __repr__(self) -> str:
        return f"<Generation {self.number} {self.workers}>"

    @property
    def workers(self) -> list[Worker]:
        """Those that have not ended."""
        return [slot.worker for slot in self.slots if slot.worker is not None]

    @property
    def ready(self) -> bool:
        """Whether every slot has a worker that is ready."""
        return all(slot.worker is not None and slot.worker.state is WorkerState.READY for slot in self.slots)
