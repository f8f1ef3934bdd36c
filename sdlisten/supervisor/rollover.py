"""The rollover of generations as a pure machine: events in, actions out; time and chance are arguments.

Rules
-----
1. At most one generation is starting.
2. The old generation is told to drain only after *all* workers of its successor are ready and the soak is
   over. Until then both accept.
3. A successor that fails (a worker is not ready in time, or ends, also in the soak) changes nothing: its
   workers are removed, those of the old generation never hear of it, and a new command is forgotten.
4. Rolls asked for while one is under way become one more roll. It has the last command that was given, and
   all who asked learn its outcome.
5. After the order to stop nothing is started.
6. Each worker ends once; what it says out of turn changes nothing.
7. A worker that ends unasked is replaced: at once, then after 0.1 s * 1.5^k, up to 30 s, less a random part
   of up to a half. After 10 s of being ready the count begins anew. No crash closes a socket.
8. While a roll is in doubt nothing of the old generation is replaced. If its *last* worker ends, the roll
   decides: in the soak it is committed at once; while the successor starts, it is committed without a soak as
   soon as the successor is ready, and if the successor fails, the old generation is started again.

The first generation: if it fails, the whole ends with its code, 128+n for signal n, 4 for being late, and 1
if it ended with 0, for that is a failure all the same.

The end: orders to stop within a second are one. A later one shortens what is left of the drain to a tenth, at
least 1 s. A worker may prolong its limits until it is hurried so. Who passes the limit is killed and counted,
and if that was at the end, the whole ends with 1. At most two generations drain; of more the oldest hurry.

How to read on: `PHASES`, and `WORKER_STATES` of `sdlisten.supervisor.generation`, say what may follow what;
the diagrams of the documentation are drawn from them. Then come the events, then the steps that they share.
"""

from __future__ import annotations

import math

from sdlisten.exit_codes import FAILED, LATE
from sdlisten.hurry import SAME_ORDER, hurried
from sdlisten.supervisor.action import Enter, Exit, Kill, Outcome, Settle, Spawn, Terminate, Welcome
from sdlisten.supervisor.generation import Generation, Turn, Worker, WorkerState
from sdlisten.supervisor.pace import LONG_LIFE, Limits, backoff
from sdlisten.supervisor.phase import Phase, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdlisten.supervisor.action import Action
    from sdlisten.supervisor.generation import Slot

__all__ = ("PHASES", "Rollover")


_CAN_STOP = {Step.STOP: Phase.LEAVING}

PHASES: dict[Phase, dict[Step, Phase]] = {
    Phase.NEW: {Step.START: Phase.STARTING, Step.STOP: Phase.STOPPING},
    Phase.STARTING: {Step.READY: Phase.SERVING, Step.FAILED: Phase.STOPPING, Step.STOP: Phase.STOPPING},
    Phase.SERVING: {Step.ROLL: Phase.ROLLING, **_CAN_STOP},
    Phase.ROLLING: {Step.READY: Phase.SOAKING, Step.FAILED: Phase.SERVING, **_CAN_STOP},
    Phase.SOAKING: {Step.SOAKED: Phase.SERVING, Step.FAILED: Phase.SERVING, **_CAN_STOP},
    Phase.LEAVING: {Step.LEFT: Phase.STOPPING},
    Phase.STOPPING: {Step.GONE: Phase.STOPPED},
    Phase.STOPPED: {},
}
"""What may follow what. A step that is not here is a mistake of ours, and a KeyError."""

_ABORT_LIMIT = 2.0  # for who was never ready: it has accepted nothing that it could finish
_DRAINING_MAX = 2


class _Roll:
    """A roll that was asked for: by whom, and to which command if not to the same."""

    __slots__ = ("command", "requesters")

    def __init__(self) -> None:
        self.command: Sequence[str] | None = None
        self.requesters: list[object] = []


class Rollover:
    """The machine. Every event takes the time and returns what is to be done, in order.

    Args:
        command: What the first generation runs.
        workers: How many of it at a time.
        limits: How long things may take.
        chance: Returns a number from 0 to 1, for the back-off.

    Attributes:
        phase: Where the whole is.
        command: What the next generation runs, unless told otherwise: the last that was a success.
        current: The generation that serves.
        successor: The generation on trial.
        draining: Generations told to stop that still have workers, the oldest first.
        rolls: Rolls that succeeded.
        refused: Rolls that did not.
        restarts: Workers replaced after a crash.
        killed: Workers that were given time, and did not use it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        workers: int = 1,
        limits: Limits | None = None,
        chance: Callable[[], float],
    ) -> None:
        self.phase = Phase.NEW
        self.command = command
        self.current: Generation | None = None
        self.successor: Generation | None = None
        self.draining: list[Generation] = []
        self.rolls = self.refused = self.restarts = self.killed = 0
        self._workers = workers
        self._limits = limits or Limits()
        self._chance = chance
        self._number = 0
        self._roll: _Roll | None = None  # under way
        self._next: _Roll | None = None  # after it (rule 4)
        self._soaked_at = self._leave_at = math.inf
        self._ordered_at = -math.inf
        self._code = 0
        self._actions: list[Action] = []

    def start(self, now: float) -> list[Action]:
        """Start the first generation."""
        self._step(Step.START)
        self.successor = self._generation(self.command, now)
        return self._done()

    def roll(
        self, now: float, requester: object = None, command: Sequence[str] | None = None
    ) -> list[Action]:
        """Replace the current generation, once it can be.

        Args:
            now: The time.
            requester: Who shall learn the outcome: `Settle` names it. None: nobody.
            command: What to run from now on, if that is a success; None for the same as before.
        """
        roll = self._next = self._next or _Roll()
        roll.command = roll.command if command is None else command
        if requester is not None:
            roll.requesters.append(requester)
        if self.phase is Phase.SERVING:
            self._go_on(now)
        elif self.phase in {Phase.LEAVING, Phase.STOPPING, Phase.STOPPED}:
            self._settle_all_stopped()
        return self._done()

    def stop(self, now: float) -> list[Action]:
        """Drain all and end; in a hurry, if that was ordered before."""
        if self.phase in {Phase.LEAVING, Phase.STOPPING}:
            self._stop_again(now)
        elif self.phase is not Phase.STOPPED:
            self._ordered_at = now
            self._retire(self.successor, now)
            self.successor = None
            self._step(Step.STOP)
            self._settle_all_stopped()
            self._leave_at = now + self._limits.stop_delay
        return self.tick(now)

    def ready(self, worker: Worker, now: float) -> list[Action]:
        """Take a worker's READY=1; out of turn, as from one that drains, it means nothing."""
        if worker.state is WorkerState.STARTING:
            self._welcome(worker, now, guessed=False)
        return self._done()

    def extend(self, worker: Worker, seconds: float, now: float) -> list[Action]:
        """Take a worker's EXTEND_TIMEOUT_USEC: its start or drain may take that long from now."""
        if worker.deadline < math.inf and not worker.hurried:
            worker.deadline = max(worker.deadline, now + seconds)
        return self._done()

    def alive(self, worker: Worker, now: float, seconds: float | None = None) -> list[Action]:
        """Take a worker's sign of life; the next is due in so many seconds, by default as the limits say."""
        if worker.up:
            worker.pulse_by = now + (self._limits.watchdog if seconds is None else seconds)
        return self._done()

    def ended(self, worker: Worker, code: int, now: float) -> list[Action]:
        """Take the end of a worker, or that it could not be started.

        Args:
            worker: Which one.
            code: Its exit code, or -n for signal n.
            now: The time.

        Raises:
            KeyError: It had ended before (rule 6).
        """
        worker.turn(Turn.END)
        slot = worker.slot
        slot.worker = None
        if now - worker.ready_at >= LONG_LIFE:
            slot.crashes = 0
        if slot.generation is self.successor:
            how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
            self._fail(128 - code if code < 0 else code or FAILED, f"a worker {how}", now)
        elif slot.generation is self.current:
            self._fill_or_decide(slot, now)
        self.draining = [generation for generation in self.draining if generation.workers]
        return self.tick(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due by now; `next_deadline` says when to call."""
        self._look_at_workers(now)
        if self.phase is Phase.SERVING and self.current:
            for slot in self.current.slots:
                if slot.refill_at <= now:
                    self._refill(slot, now)
        if self.phase is Phase.SOAKING and self._soaked_at <= now:
            self._commit(Step.SOAKED, now)
        if self.phase is Phase.LEAVING and (self._leave_at <= now or not self._somebody_serves()):
            self._leave(now)
        if self.phase is Phase.STOPPING and not self.draining:
            self._step(Step.GONE)
            self._actions.append(Exit(self._code))
        return self._done()

    def next_deadline(self) -> float:
        """Return when `tick` has something to do if nothing happens before; infinite for never."""
        times = [worker.next_deadline for worker in self._all_workers()]
        if self.phase is Phase.SERVING and self.current:
            times += [slot.refill_at for slot in self.current.slots]
        elif self.phase is Phase.SOAKING:
            times.append(self._soaked_at)
        elif self.phase is Phase.LEAVING:
            times.append(self._leave_at)
        return min(times, default=math.inf)

    def _go_on(self, now: float) -> None:
        """Begin the roll that waits, if one does."""
        if self._next is None or self.current is None:
            return
        self._roll, self._next = self._next, None
        for slot in self.current.slots:
            slot.refill_at = math.inf  # rule 8
        self._step(Step.ROLL)
        command = self.command if self._roll.command is None else self._roll.command
        self.successor = self._generation(command, now)

    def _generation(self, command: Sequence[str], now: float) -> Generation:
        self._number += 1
        generation = Generation(self._number, command, self._workers)
        for slot in generation.slots:
            self._spawn(slot, now)
        return generation

    def _spawn(self, slot: Slot, now: float) -> None:
        slot.worker = Worker(slot, deadline=now + self._limits.ready, guess_at=now + self._limits.guess)
        self._actions.append(Spawn(slot.worker))

    def _welcome(self, worker: Worker, now: float, *, guessed: bool) -> None:
        worker.turn(Turn.READY)
        worker.ready_at = now
        self._actions.append(Welcome(worker, guessed=guessed))
        if self.successor is None or worker.slot.generation is not self.successor or not self.successor.ready:
            return
        if self.current is None:
            self._commit(Step.READY, now)
            return
        self._step(Step.READY)
        self._soaked_at = now + self._limits.soak
        if self._soaked_at <= now or not self.current.workers:  # rule 8
            self._commit(Step.SOAKED, now)

    def _commit(self, step: Step, now: float) -> None:
        """Let the successor be the current generation, and the current one drain."""
        retired, self.current, self.successor = self.current, self.successor, None
        assert self.current is not None  # noqa: S101 - who commits has a successor
        self.command = self.current.command
        self._retire(retired, now)
        self._step(step)
        self.rolls += retired is not None
        self._settle(Outcome.SERVES)
        self._go_on(now)

    def _fail(self, code: int, why: str, now: float) -> None:
        """Remove the successor and leave all else as it was (rule 3)."""
        failed, self.successor = self.successor, None
        self._retire(failed, now)
        self._step(Step.FAILED)
        if self.current is None:
            self._code = code
            self._actions.append(Settle((), Outcome.FAILED, failed, why))
            self._settle_all_stopped("the first generation failed")
            return
        self.refused += 1
        self._settle(Outcome.REFUSED, failed, why)
        for slot in self.current.slots:
            if slot.worker is None:
                self._fill_or_decide(slot, now)
        self._go_on(now)

    def _settle(self, outcome: Outcome, generation: Generation | None = None, why: str = "") -> None:
        """Answer those who asked for the roll under way, if there is one."""
        roll, self._roll = self._roll, None
        if roll:
            self._actions.append(Settle(roll.requesters, outcome, generation or self.current, why))

    def _settle_all_stopped(self, why: str = "told to stop") -> None:
        self._settle(Outcome.STOPPED, why=why)
        self._roll, self._next = self._next, None
        self._settle(Outcome.STOPPED, why=why)

    def _fill_or_decide(self, slot: Slot, now: float) -> None:
        """Fill an empty slot of the current generation by rule 7, or follow rule 8."""
        if self.phase is Phase.SERVING:
            slot.refill_at = now + backoff(slot.crashes, self._chance())
            slot.crashes += 1
        elif self.phase is Phase.SOAKING and not self._somebody_serves():
            self._commit(Step.SOAKED, now)

    def _refill(self, slot: Slot, now: float) -> None:
        slot.refill_at = math.inf
        self.restarts += 1
        self._spawn(slot, now)

    def _somebody_serves(self) -> bool:
        return self.current is not None and bool(self.current.workers)

    def _retire(self, generation: Generation | None, now: float) -> None:
        """Tell the workers of a generation to drain."""
        if generation is None or not generation.workers:
            return
        for worker in generation.workers:
            if worker.up:
                worker.turn(Turn.DRAIN)
                worker.deadline = now + (self._limits.drain if worker.served else _ABORT_LIMIT)
                self._actions.append(Terminate(worker))
        self.draining.append(generation)
        for oldest in self.draining[:-_DRAINING_MAX]:
            self._hurry(oldest, now)

    def _hurry(self, generation: Generation, now: float) -> None:
        """Shorten what is left of a drain."""
        for worker in generation.workers:
            if worker.state is WorkerState.DRAINING:
                worker.hurried = True
                # What a worker has asked for may be years.
                worker.deadline = hurried(min(worker.deadline, now + self._limits.drain), now)
                self._actions.append(Terminate(worker))

    def _look_at_workers(self, now: float) -> None:
        for worker in self._all_workers():
            if worker.guess_at <= now:
                self._welcome(worker, now, guessed=True)
            elif worker.deadline <= now:
                self._overdue(worker, now)
            elif worker.pulse_by <= now:
                self._kill(worker, "no sign of life (WATCHDOG=1)")

    def _overdue(self, worker: Worker, now: float) -> None:
        if worker.state is WorkerState.DRAINING:
            self._kill(worker, "its drain took too long")
        elif worker.slot.generation is self.successor:
            self._fail(LATE, f"a worker did not say READY=1 within {self._limits.ready:g} s", now)
        else:
            self._kill(worker, f"no READY=1 within {self._limits.ready:g} s")

    def _kill(self, worker: Worker, why: str) -> None:
        self.killed += 1
        if worker.served and self.phase is Phase.STOPPING:
            self._code = self._code or FAILED
        worker.turn(Turn.KILL)
        self._actions.append(Kill(worker, why))

    def _stop_again(self, now: float) -> None:
        if now - self._ordered_at < SAME_ORDER:
            return
        self._ordered_at = now
        if self.phase is Phase.LEAVING:
            self._leave_at = now
        else:
            for generation in self.draining:
                self._hurry(generation, now)

    def _leave(self, now: float) -> None:
        self._step(Step.LEFT)
        self._retire(self.current, now)
        self.current = None

    def _all_workers(self) -> list[Worker]:
        generations = (self.current, self.successor, *self.draining)
        return [worker for generation in generations if generation for worker in generation.workers]

    def _step(self, step: Step) -> None:
        self.phase = PHASES[self.phase][step]
        self._actions.append(Enter(self.phase))

    def _done(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
