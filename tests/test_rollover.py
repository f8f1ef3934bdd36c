"""The machine that decides when generations start, serve, drain and end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sdlisten.supervisor.action import Enter, Exit, Kill, Outcome, Settle, Spawn, Terminate, Welcome
from sdlisten.supervisor.generation import WORKER_STATES, Turn, Worker, WorkerState
from sdlisten.supervisor.pace import Limits, backoff
from sdlisten.supervisor.phase import Phase, Step
from sdlisten.supervisor.rollover import PHASES, Rollover

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdlisten.supervisor.action import Action
    from sdlisten.supervisor.generation import Generation

OLD, NEW = ["old"], ["new"]


class Told:
    """A rollover, its clock, and what it ordered: the outside world in small."""

    def __init__(self, workers: int = 1, **limits: float) -> None:
        self.now = 1000.0
        self.machine = Rollover(OLD, workers=workers, limits=Limits(**limits), chance=lambda: 0.0)
        self.actions: list[Action] = []
        self.told: list[Action] = []

    def take(self, actions: Sequence[Action]) -> list[Action]:
        """Remember what was ordered."""
        self.actions = list(actions)
        self.told += actions
        return self.actions

    def start(self) -> list[Action]:
        """Start."""
        return self.take(self.machine.start(self.now))

    def serving(self) -> Told:
        """Start, and make the first generation ready."""
        self.start()
        self.all_ready()
        assert self.machine.phase is Phase.SERVING
        return self

    def all_ready(self) -> None:
        """Let every worker of the generation on trial say READY=1."""
        assert self.machine.successor
        for worker in self.machine.successor.workers:
            self.ready(worker)

    def ready(self, worker: Worker) -> list[Action]:
        """Let one worker say READY=1."""
        return self.take(self.machine.ready(worker, self.now))

    def end(self, worker: Worker, code: int = 0) -> list[Action]:
        """Let one worker end."""
        return self.take(self.machine.ended(worker, code, self.now))

    def roll(self, requester: object = None, command: Sequence[str] | None = None) -> list[Action]:
        """Ask for a roll."""
        return self.take(self.machine.roll(self.now, requester, command))

    def stop(self) -> list[Action]:
        """Order to stop."""
        return self.take(self.machine.stop(self.now))

    def pass_time(self, seconds: float) -> list[Action]:
        """Let time pass, and all that becomes due happen in its order."""
        end = self.now + seconds
        actions: list[Action] = []
        while (due := self.machine.next_deadline()) <= end:
            self.now = max(due, self.now)
            actions += self.take(self.machine.tick(self.now))
        self.now = end
        return actions

    @property
    def current(self) -> Generation:
        """The generation that serves."""
        assert self.machine.current
        return self.machine.current

    @property
    def successor(self) -> Generation:
        """The generation on trial."""
        assert self.machine.successor
        return self.machine.successor

    @property
    def worker(self) -> Worker:
        """The first worker of the generation that serves."""
        return self.current.workers[0]


def kinds(actions: Sequence[Action]) -> list[str]:
    """Return what kinds of orders they are."""
    return [type(action).__name__ for action in actions]


def outcomes(actions: Sequence[Action]) -> list[tuple[tuple[object, ...], Outcome]]:
    """Return who was told what."""
    return [(action.requesters, action.outcome) for action in actions if isinstance(action, Settle)]


def test_the_tables_are_whole() -> None:
    """Every phase and state has its row, every step and turn is used, and only the ends have no way on."""
    assert set(PHASES) == set(Phase)
    assert set(WORKER_STATES) == set(WorkerState)
    assert {step for row in PHASES.values() for step in row} == set(Step)
    assert {turn for row in WORKER_STATES.values() for turn in row} == set(Turn)
    assert [phase for phase, row in PHASES.items() if not row] == [Phase.STOPPED]
    assert [state for state, row in WORKER_STATES.items() if not row] == [WorkerState.ENDED]


def test_the_first_generation_serves_when_all_its_workers_are_ready() -> None:
    """The start is over with the last READY=1, not with the first."""
    told = Told(workers=2)

    assert kinds(told.start()) == ["Enter", "Spawn", "Spawn"]
    first, second = told.successor.workers
    assert told.ready(first) == [Welcome(first, guessed=False)]
    assert told.ready(second) == [Welcome(second, guessed=False), Enter(Phase.SERVING)]


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (-11, 139), (0, 1)])
def test_a_first_generation_that_fails_ends_the_whole(code: int, expected: int) -> None:
    """The supervisor ends with the code of its first generation, 128+n for a signal, and never with 0."""
    told = Told(workers=2)
    told.start()
    told.roll("somebody")
    first, second = told.successor.workers

    assert kinds(told.end(first, code)) == ["Terminate", "Enter", "Settle", "Settle"]
    assert outcomes(told.actions) == [((), Outcome.FAILED), (("somebody",), Outcome.STOPPED)]
    assert told.end(second) == [Enter(Phase.STOPPED), Exit(expected)]


def test_a_first_generation_that_is_late_ends_the_whole() -> None:
    """A first generation that is never ready is told to go, killed, and the code is 4."""
    told = Told(ready=5)
    told.start()
    (worker,) = told.successor.workers

    first = told.successor
    why = "a worker did not say READY=1 within 5 s"
    failed = Settle((), Outcome.FAILED, first, why)
    assert told.pass_time(5) == [Terminate(worker), Enter(Phase.STOPPING), failed]
    assert told.pass_time(2) == [Kill(worker, "its drain took too long")]
    assert told.end(worker, -9) == [Enter(Phase.STOPPED), Exit(4)]


def test_the_old_generation_drains_after_the_new_one_is_ready() -> None:
    """Rule 2: nobody is told to drain before the last worker of the successor is ready."""
    told = Told(workers=2).serving()
    old = told.current.workers
    told.roll("me")
    first, second = told.successor.workers

    assert kinds(told.ready(first)) == ["Welcome"]
    told.ready(second)
    assert kinds(told.actions) == ["Welcome", "Enter", "Terminate", "Terminate", "Enter", "Settle"]
    assert outcomes(told.actions) == [(("me",), Outcome.SERVES)]
    assert [worker.state for worker in old] == [WorkerState.DRAINING] * 2
    assert told.current.number == 2
    assert [told.end(worker) for worker in old] == [[], []]
    assert (told.machine.rolls, told.machine.refused, told.machine.draining) == (1, 0, [])


def test_both_generations_accept_during_the_soak() -> None:
    """Rule 2: with a soak the old generation is told to drain when that is over."""
    told = Told(soak=3).serving()
    old = told.worker
    told.roll()
    told.all_ready()

    assert told.actions[-1] == Enter(Phase.SOAKING)
    assert told.pass_time(2.9) == []
    assert told.pass_time(0.1) == [
        Terminate(old),
        Enter(Phase.SERVING),
        Settle([], Outcome.SERVES, told.current, ""),
    ]


@pytest.mark.parametrize("soak", [0.0, 5.0])
def test_a_failed_successor_changes_nothing(soak: float) -> None:
    """Rule 3: it is removed, the requester told, the old command kept; the old workers hear nothing."""
    told = Told(workers=2, soak=soak).serving()
    old = told.current
    told.roll("me", NEW)
    first, second = told.successor.workers
    assert told.successor.command == NEW
    if soak:
        told.all_ready()

    told.end(first, -11)
    (settle,) = (action for action in told.actions if isinstance(action, Settle))
    assert (settle.outcome, settle.why) == (Outcome.REFUSED, "a worker was killed by signal 11")
    assert [action for action in told.actions if isinstance(action, Terminate)] == [Terminate(second)]
    assert (told.machine.current, told.machine.successor, told.machine.command) == (old, None, OLD)
    assert told.machine.refused == 1
    told.end(second)
    assert kinds(told.roll()) == ["Enter", "Spawn", "Spawn"]
    assert told.successor.command == OLD


def test_a_late_successor_is_refused() -> None:
    """Rule 3: one of its workers is not ready in time, and the others are removed with it."""
    told = Told(workers=2, ready=5).serving()
    told.roll("me", NEW)
    told.ready(told.successor.workers[0])

    actions = told.pass_time(5)
    assert kinds(actions) == ["Terminate", "Terminate", "Enter", "Settle"]
    (settle,) = (action for action in actions if isinstance(action, Settle))
    assert (settle.outcome, settle.why) == (Outcome.REFUSED, "a worker did not say READY=1 within 5 s")


def test_a_new_command_is_remembered_on_success() -> None:
    """The command of a roll that succeeded is that of crash restarts and of later rolls."""
    told = Told().serving()
    told.roll("me", NEW)
    told.all_ready()

    assert told.machine.command == NEW
    told.roll()
    assert told.successor.command == NEW


def test_rolls_asked_for_meanwhile_are_one_more() -> None:
    """Rule 4: all who asked get the outcome of that one, and it has the last command that was given."""
    told = Told().serving()
    told.roll("first")
    assert told.roll("second", ["other"]) == []
    assert told.roll("third", NEW) == []
    assert told.roll("fourth") == []

    told.all_ready()
    assert outcomes(told.actions) == [(("first",), Outcome.SERVES)]
    assert (told.successor.number, told.successor.command) == (3, NEW)
    told.all_ready()
    assert outcomes(told.actions) == [(("second", "third", "fourth"), Outcome.SERVES)]
    assert told.machine.phase is Phase.SERVING


def test_a_roll_asked_for_during_the_start_comes_after_it() -> None:
    """Rule 4: the first generation gets its chance."""
    told = Told()
    told.roll("early")
    told.start()
    told.roll("early too")

    told.all_ready()
    assert told.machine.phase is Phase.ROLLING
    told.all_ready()
    assert outcomes(told.actions) == [(("early", "early too"), Outcome.SERVES)]


def test_a_roll_after_a_refused_one_still_comes() -> None:
    """Rule 4: what was asked for meanwhile is not refused with the first."""
    told = Told().serving()
    told.roll("first", NEW)
    told.roll("second")

    told.end(told.successor.workers[0], 1)
    assert outcomes(told.actions) == [(("first",), Outcome.REFUSED)]
    assert (told.machine.phase, told.successor.command) == (Phase.ROLLING, OLD)


def test_a_stop_ends_all() -> None:
    """Rule 5: everybody is told to drain, who waits for a roll learns it, and the last end is the exit."""
    told = Told().serving()
    old = told.worker
    told.roll("first")
    told.roll("second")
    new = told.successor.workers[0]

    told.stop()
    assert [action for action in told.actions if isinstance(action, Terminate)] == [
        Terminate(new),
        Terminate(old),
    ]
    assert outcomes(told.actions) == [(("first",), Outcome.STOPPED), (("second",), Outcome.STOPPED)]
    assert outcomes(told.roll("third")) == [(("third",), Outcome.STOPPED)]
    assert told.end(new, -15) == []
    assert told.end(old) == [Enter(Phase.STOPPED), Exit(0)]
    assert told.stop() == []
    assert told.machine.next_deadline() == math.inf


@pytest.mark.parametrize("started", [False, True])
def test_a_stop_before_anything_serves(started: bool) -> None:
    """An order to stop is no failure, however early it comes."""
    told = Told()
    if started:
        told.start()
        (worker,) = told.successor.workers
        assert told.stop() == [Terminate(worker), Enter(Phase.STOPPING)]
        assert told.end(worker, -15) == [Enter(Phase.STOPPED), Exit(0)]
    else:
        assert told.stop() == [Enter(Phase.STOPPING), Enter(Phase.STOPPED), Exit(0)]


def test_the_stop_delay_keeps_serving() -> None:
    """With a stop delay nobody is told to drain until it is over; a crash is not mended."""
    told = Told(workers=2, stop_delay=5).serving()
    first, second = told.current.workers

    assert told.stop() == [Enter(Phase.LEAVING)]
    assert told.end(first) == []
    assert told.pass_time(4.9) == []
    assert told.pass_time(0.1) == [Enter(Phase.STOPPING), Terminate(second)]


def test_the_stop_delay_ends_with_the_last_worker() -> None:
    """There is nothing to wait for when nobody serves any more."""
    told = Told(stop_delay=5).serving()
    told.stop()

    assert told.end(told.worker) == [Enter(Phase.STOPPING), Enter(Phase.STOPPED), Exit(0)]


def test_orders_to_stop_within_a_second_are_one() -> None:
    """A later one ends the stop delay, and each after that shortens the drain to a tenth, at least 1 s."""
    told = Told(drain=50, stop_delay=5).serving()
    worker = told.worker
    told.stop()
    told.pass_time(0.9)
    assert told.stop() == []
    told.pass_time(0.1)
    assert told.stop() == [Enter(Phase.STOPPING), Terminate(worker)]
    told.pass_time(1)
    assert told.stop() == [Terminate(worker)]
    assert worker.deadline == pytest.approx(told.now + 4.9)
    assert told.take(told.machine.extend(worker, 60, told.now)) == []
    assert worker.deadline == pytest.approx(told.now + 4.9)
    told.pass_time(1)
    told.stop()
    assert told.pass_time(1) == [Kill(worker, "its drain took too long")]
    assert told.end(worker, -9) == [Enter(Phase.STOPPED), Exit(1)]
    assert told.machine.killed == 1


def test_a_hurried_start_changes_nothing_for_the_killed() -> None:
    """Who has SIGKILL on its way is not told anything more."""
    told = Told(drain=1).serving()
    worker = told.worker
    told.stop()
    told.pass_time(1)

    assert worker.state is WorkerState.KILLED
    assert told.stop() == []


def test_the_oldest_of_three_draining_generations_hurries() -> None:
    """Two generations may drain in peace."""
    told = Told(drain=100).serving()
    first = told.worker
    told.roll()
    told.all_ready()
    second = told.worker
    told.roll()
    told.all_ready()
    assert not first.hurried
    told.roll()
    told.all_ready()

    assert told.told.count(Terminate(first)) == 2
    assert (first.hurried, second.hurried) == (True, False)
    assert first.deadline == told.now + 10


def test_a_worker_prolongs_its_limits() -> None:
    """EXTEND_TIMEOUT_USEC counts from now, while it starts and while it drains, and never shortens."""
    told = Told(ready=5, drain=5)
    told.start()
    (worker,) = told.successor.workers
    told.machine.extend(worker, 8, told.now)
    told.machine.extend(worker, 1, told.now)
    assert told.pass_time(7.9) == []
    told.ready(worker)
    told.machine.extend(worker, 1, told.now)
    assert told.pass_time(60) == []
    told.stop()
    told.machine.extend(worker, 8, told.now)
    assert told.pass_time(7.9) == []
    assert kinds(told.pass_time(0.1)) == ["Kill"]


def test_a_hurry_ends_what_was_prolonged() -> None:
    """Whoever prolonged its drain for years gets a tenth of the usual limit when it is told again."""
    told = Told(drain=50).serving()
    worker = told.worker
    told.stop()
    told.machine.extend(worker, (2**64 - 2) / 1e6, told.now)
    told.pass_time(2)

    told.stop()

    assert told.pass_time(4.9) == []
    assert kinds(told.pass_time(0.1)) == ["Kill"]


def test_a_crashed_worker_is_replaced() -> None:
    """Rule 7: at once, then later and later, and at once again after 10 s of being ready."""
    told = Told().serving()
    assert kinds(told.end(told.worker, 1)) == ["Spawn"]
    waits = []
    for _ in range(3):
        assert told.end(told.worker, 1) == []
        waits.append(told.machine.next_deadline() - told.now)
        assert kinds(told.pass_time(waits[-1])) == ["Spawn"]
    assert waits == pytest.approx([0.1, 0.15, 0.225])
    told.ready(told.worker)
    told.pass_time(10)
    assert kinds(told.end(told.worker, 1)) == ["Spawn"]
    assert told.machine.restarts == 5


def test_backoff() -> None:
    """It grows to 30 s and no further, and chance takes up to a half off."""
    assert backoff(0, 0) == 0
    assert [round(backoff(crashes, 0), 3) for crashes in (1, 2, 3, 15, 10_000)] == [
        0.1,
        0.15,
        0.225,
        29.193,
        30,
    ]
    assert backoff(10_000, 1) == 15


def test_a_replacement_that_is_late_is_killed() -> None:
    """Rule 7: it is a crash like any other, and the others serve on."""
    told = Told(ready=5).serving()
    told.end(told.worker, 1)
    worker = told.worker

    assert told.pass_time(5) == [Kill(worker, "no READY=1 within 5 s")]
    assert told.end(worker, -9) == []
    assert told.machine.phase is Phase.SERVING


def test_an_old_worker_is_not_replaced_while_a_roll_is_in_doubt() -> None:
    """Rule 8: neither at once nor by the clock; it is when the successor has failed."""
    told = Told(workers=2).serving()
    told.end(told.worker, 1)
    assert told.end(told.current.workers[0], 1) == []
    told.roll()
    assert told.pass_time(30) == []
    told.end(told.current.workers[0], 1)

    told.end(told.successor.workers[0], 1)
    assert told.machine.phase is Phase.SERVING
    assert kinds(told.pass_time(1)) == ["Spawn"]


def test_the_last_old_worker_ends_while_the_successor_starts() -> None:
    """Rule 8: then there is no soak: nobody else serves."""
    told = Told(soak=60).serving()
    told.roll("me")
    assert told.end(told.worker, 1) == []

    told.all_ready()
    assert outcomes(told.actions) == [(("me",), Outcome.SERVES)]
    assert told.machine.phase is Phase.SERVING


def test_the_last_old_worker_ends_in_the_soak() -> None:
    """Rule 8: the roll is committed at once; an earlier one of several changes nothing."""
    told = Told(workers=2, soak=60).serving()
    told.roll("me")
    told.all_ready()

    assert told.end(told.worker, 1) == []
    told.end(told.worker, 1)
    assert outcomes(told.actions) == [(("me",), Outcome.SERVES)]
    assert told.current.number == 2


def test_a_worker_without_a_sign_of_life_is_killed_and_replaced() -> None:
    """The watchdog runs from the first sign of life until the worker is told to stop."""
    told = Told(watchdog=5).serving()
    worker = told.worker
    assert told.pass_time(100) == []
    told.machine.alive(worker, told.now)
    told.pass_time(4)
    told.machine.alive(worker, told.now)
    assert told.pass_time(4.9) == []
    assert told.pass_time(0.1) == [Kill(worker, "no sign of life (WATCHDOG=1)")]
    told.machine.alive(worker, told.now)
    assert kinds(told.end(worker, -9)) == ["Spawn"]
    told.machine.alive(told.worker, told.now, 2)
    told.stop()
    assert told.machine.next_deadline() == told.now + 2  # never ready: it is given 2 s to go


def test_a_killed_worker_is_not_told_to_drain() -> None:
    """Who was killed, and has not ended yet when the successor takes over, gets no second order."""
    told = Told(watchdog=5, workers=2).serving()
    hung, sound = told.current.workers
    told.machine.alive(hung, told.now)
    assert told.pass_time(5) == [Kill(hung, "no sign of life (WATCHDOG=1)")]

    told.roll("me")
    for worker in told.successor.workers:
        told.ready(worker)

    assert (hung.state, sound.state) == (WorkerState.KILLED, WorkerState.DRAINING)


def test_a_program_that_never_notifies_is_taken_for_ready() -> None:
    """With a guess the time alone makes it ready."""
    told = Told(guess=2)
    told.start()
    (worker,) = told.successor.workers

    assert told.pass_time(2) == [Welcome(worker, guessed=True), Enter(Phase.SERVING)]


def test_words_out_of_turn_change_nothing() -> None:
    """Rule 6: a second READY=1, or one while draining, is not heard; a second end is a mistake of ours."""
    told = Told().serving()
    worker = told.worker
    assert told.ready(worker) == []
    told.stop()
    assert told.ready(worker) == []
    told.end(worker)

    with pytest.raises(KeyError):
        told.end(worker)


def test_what_things_look_like() -> None:
    """Orders, workers and generations say in a log what they are."""
    told = Told().serving()

    assert repr(Kill(told.worker, "why")) == "Kill('why', <Worker 1.0 ready>)"
    assert repr(told.current) == "<Generation 1 [<Worker 1.0 ready>]>"
    assert Exit(1) != Exit(2)
    assert Exit(1) != Enter(Phase.NEW)
    assert len({Exit(1), Exit(1)}) == 1


class Rules(RuleBasedStateMachine):
    """Anything may happen at any time; the rules hold all the same."""

    @initialize(
        workers=st.integers(1, 3),
        soak=st.sampled_from([0.0, 4.0]),
        stop_delay=st.sampled_from([0.0, 3.0]),
        guess=st.sampled_from([math.inf, 6.0]),
    )
    def begin(self, workers: int, soak: float, stop_delay: float, guess: float) -> None:
        """Start."""
        self.now = 0.0
        self.machine = Rollover(
            OLD,
            workers=workers,
            limits=Limits(ready=7, drain=5, soak=soak, stop_delay=stop_delay, watchdog=9, guess=guess),
            chance=lambda: 0.5,
        )
        self.alive: dict[Worker, None] = {}
        self.asked: set[int] = set()
        self.answered: set[int] = set()
        self.serving = OLD
        self.stopped = self.exited = False
        self.told: set[Worker] = set()
        self.apply(self.machine.start(self.now))

    def apply(self, actions: Sequence[Action]) -> None:
        """Do as told, and check each order by itself."""
        for action in actions:
            match action:
                case Spawn():
                    assert not self.stopped, "rule 5"
                    self.alive[action.worker] = None
                case Terminate():
                    assert action.worker in self.alive
                    self.told.add(action.worker)
                    self.check_may_drain(action.worker)
                case Kill():
                    assert action.worker in self.alive
                case Settle():
                    for requester in action.requesters:
                        assert isinstance(requester, int)
                        assert requester not in self.answered, "rule 4: one outcome for each"
                        self.answered.add(requester)
                case Exit():
                    assert not self.alive, "who exits leaves nobody behind"
                    assert not self.exited
                    self.exited = True

    def check_may_drain(self, worker: Worker) -> None:
        """Rule 2: only for a stop, a failed successor, or when another generation is ready."""
        machine = self.machine
        generation = worker.slot.generation
        if self.stopped or (machine.current and generation.number > machine.current.number):
            return
        if machine.current is None:
            assert machine.phase is Phase.STOPPING
            return
        assert generation is not machine.current
        assert generation.number < machine.current.number

    def some(self, number: int, wanted: Callable[[Worker], bool] = lambda _worker: True) -> Worker | None:
        """Return one of the workers alive."""
        workers = [worker for worker in self.alive if wanted(worker)]
        return workers[number % len(workers)] if workers else None

    @rule(number=st.integers(0, 9))
    def worker_is_ready(self, number: int) -> None:
        """One says READY=1, perhaps out of turn."""
        worker = self.some(number)
        if worker:
            self.apply(self.machine.ready(worker, self.now))

    @rule()
    def all_are_ready(self) -> None:
        """Everybody says READY=1."""
        for worker in list(self.alive):
            self.apply(self.machine.ready(worker, self.now))

    @rule(number=st.integers(0, 9), code=st.sampled_from([0, 1, -9, -11]))
    def worker_ends(self, number: int, code: int) -> None:
        """One ends, asked or unasked; what it says then is not heard."""
        worker = self.some(number)
        if worker:
            before = self.machine.current
            trial = worker.slot.generation is self.machine.successor
            command = self.machine.command
            del self.alive[worker]
            self.apply(self.machine.ended(worker, code, self.now))
            if trial and before:
                assert self.machine.current is before, "rule 3"
                assert self.machine.command == command, "rule 3"
                assert not self.told & set(before.workers), "rule 3"
            with pytest.raises(KeyError):
                self.machine.ended(worker, 0, self.now)

    @rule(number=st.integers(0, 9))
    def told_worker_ends(self, number: int) -> None:
        """One that was told to end does."""
        worker = self.some(number, lambda worker: worker in self.told)
        if worker:
            del self.alive[worker]
            self.apply(self.machine.ended(worker, 0, self.now))

    @rule(number=st.integers(0, 9), seconds=st.sampled_from([0.0, 3.0, 20.0]))
    def worker_speaks(self, number: int, seconds: float) -> None:
        """One shows life or asks for time."""
        worker = self.some(number)
        if worker:
            self.apply(self.machine.alive(worker, self.now))
            self.apply(self.machine.extend(worker, seconds, self.now))

    @rule(command=st.sampled_from([None, NEW, ["other"]]))
    def roll(self, command: list[str] | None) -> None:
        """Somebody asks for a roll."""
        requester = len(self.asked)
        self.asked.add(requester)
        self.apply(self.machine.roll(self.now, requester, command))

    @precondition(lambda self: self.now > 20)
    @rule()
    def stop(self) -> None:
        """Somebody orders to stop."""
        self.stopped = True
        self.apply(self.machine.stop(self.now))

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        """What becomes due happens at its time."""
        end = self.now + seconds
        while (due := self.machine.next_deadline()) <= end:
            self.now = max(due, self.now)
            self.apply(self.machine.tick(self.now))
            assert self.machine.next_deadline() > self.now, "what was due is done"
        self.now = end

    @invariant()
    def at_most_one_generation_starts(self) -> None:
        """Rule 1, and the workers alive are those the machine knows."""
        machine = self.machine
        generations = [machine.current, machine.successor, *machine.draining]
        known = [worker for generation in generations if generation for worker in generation.workers]
        assert set(known) == set(self.alive)
        starting = {worker.slot.generation for worker in known if worker.state is WorkerState.STARTING} - {
            machine.current
        }
        assert starting <= {machine.successor}

    @invariant()
    def everybody_is_answered(self) -> None:
        """Rule 4: who asked is answered, or a roll is under way."""
        if self.machine.phase in {Phase.SERVING, Phase.LEAVING, Phase.STOPPING, Phase.STOPPED}:
            assert self.asked == self.answered

    @invariant()
    def every_empty_slot_has_a_date(self) -> None:
        """Rules 7 and 8: while nothing is in doubt, an empty slot will be filled; in doubt, none is."""
        machine = self.machine
        if machine.current is None:
            return
        empty = [slot.refill_at for slot in machine.current.slots if slot.worker is None]
        if machine.phase is Phase.SERVING:
            assert all(refill_at <= self.now + 30 for refill_at in empty)
        elif machine.phase in {Phase.ROLLING, Phase.SOAKING}:
            assert set(empty) <= {math.inf}
            assert machine.phase is Phase.ROLLING or machine.current.workers, "rule 8"

    def teardown(self) -> None:
        """From anywhere a stop leads to an exit, with everybody answered and nobody alive."""
        if not hasattr(self, "machine"):
            return
        self.stopped = True
        self.apply(self.machine.stop(self.now))
        for _ in range(1000):
            if self.exited:
                break
            self.now = min(self.machine.next_deadline(), self.now + 1)
            self.apply(self.machine.tick(self.now))
            for worker in [worker for worker in self.alive if worker.state is WorkerState.KILLED]:
                del self.alive[worker]
                self.apply(self.machine.ended(worker, -9, self.now))
        assert self.exited
        assert self.asked == self.answered


Rules.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRules = Rules.TestCase
