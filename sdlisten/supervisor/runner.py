"""The supervisor: does what `sdlisten.supervisor.rollover` decides, and tells it what happens.

One thread, one poll(2). All that can happen comes from the loop: a signal, a message of a worker, its end, a
question at the control socket, a time that has come. Each becomes an event of the machine, whose orders are
carried out before anything else is looked at.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import signal
import time

from sdlisten.errors import MessageError
from sdlisten.exit_codes import REFUSED
from sdlisten.message import value_of
from sdlisten.supervisor import nice
from sdlisten.supervisor.action import Enter, Exit, Kill, Outcome, Settle, Spawn, Terminate, Welcome
from sdlisten.supervisor.control import Control
from sdlisten.supervisor.loop import SIGNALS, Loop, Signals
from sdlisten.supervisor.output import Output, say
from sdlisten.supervisor.pace import Limits
from sdlisten.supervisor.phase import Phase
from sdlisten.supervisor.process import Process
from sdlisten.supervisor.provision import Provisions
from sdlisten.supervisor.questions import Questions
from sdlisten.supervisor.rollover import Rollover
from sdlisten.supervisor.status import headline, report, snapshot
from sdlisten.supervisor.store import Store
from sdlisten.supervisor.upstream import Upstream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sdlisten.notifier import Notifier
    from sdlisten.receiver import Received
    from sdlisten.supervisor.action import Action
    from sdlisten.supervisor.generation import Worker
    from sdlisten.supervisor.options import Options
    from sdlisten.supervisor.sockets import Sockets

__all__ = ("Supervisor",)

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_MARGIN = 1.0  # seconds that a worker gets beyond its own drain limit, to say what it dropped and end
_MESSAGES_MAX = 1000  # of one worker that has ended: more than its queue holds (net.unix.max_dgram_qlen)
_CANNOT_START = 126


class Supervisor:
    """Holds sockets and rolls generations of a program over them.

    Args:
        options: What to run, and how.
        sockets: What to pass; the caller keeps it (*borrows*) and closes it afterwards.
        notifier: The way to our own manager.
        watchdog: Seconds after which that manager takes us for dead, or None; workers that show life get the
            same limit, unless the options have one.

    Attributes:
        machine: Who decides.
        processes: The workers that have not ended.
        sockets: As given.
        store: What the workers let us keep.
        started: When, by `time.monotonic`.
    """

    def __init__(
        self, options: Options, sockets: Sockets, notifier: Notifier, watchdog: float | None = None
    ) -> None:
        self.sockets = sockets
        self.started = time.monotonic()
        self.processes: dict[Worker, Process] = {}
        self._options = options
        self._watchdog = options.watchdog if options.watchdog < math.inf else watchdog or math.inf
        limits = Limits(
            ready=options.ready_timeout,
            drain=options.drain_timeout + _MARGIN,
            soak=options.soak,
            stop_delay=options.stop_delay,
            watchdog=self._watchdog,
            guess=options.guess,
        )
        self.machine = Rollover(options.command, workers=options.workers, limits=limits, chance=_chance)
        self._provisions = Provisions(options, self._watchdog)
        self._upstream = Upstream(notifier, watchdog)
        self._loop = Loop()
        self._output = Output(self._loop)
        self.store = Store(self._loop)
        self._control: Control | None = None
        self._questions = Questions(self)
        self._not_started: collections.deque[Worker] = collections.deque()
        self._code: int | None = None
        self._lifeline = -1
        self._nice = options.nice_start

    def run(self) -> int:
        """Run until told to stop, or until the first generation has failed.

        Returns:
            The exit code.

        Raises:
            AddressError, OSError: The control socket cannot be made, or the pid file cannot be written.
        """
        with contextlib.ExitStack() as closing:
            signals = closing.enter_context(Signals(SIGNALS))
            closing.callback(self._output.close)
            closing.callback(self.store.close)
            reader, writer = os.pipe2(os.O_CLOEXEC)  # whoever holds the reader sees our end
            closing.callback(os.close, reader)
            closing.callback(os.close, writer)
            self._lifeline = reader
            if self._options.control:
                self._control = Control(self._options.control, self._loop, self._questions.take)
                closing.callback(self._control.close)
            if self._options.pid_file:
                closing.enter_context(_pid_file(self._options.pid_file))
            if self._nice and not nice.can_return():
                say("--nice-start is left out: without CAP_SYS_NICE or RLIMIT_NICE there is no way back")
                self._nice = 0
            self._loop.watch(signals.fileno(), lambda _events: self._signalled(signals.take()))
            closing.callback(self._loop.forget, signals.fileno())
            for fd in self.sockets.listening:
                self._loop.watch(fd, functools.partial(self._shut_down, fd), 0)
            self._reap()  # who ended before there was a handler: no SIGCHLD was kept for them
            self.apply(self.machine.start(time.monotonic()))
            while self._code is None:
                self._loop.wait(self._next_deadline())
                self._tick()
            return self._code

    def apply(self, actions: Sequence[Action]) -> None:
        """Carry out orders, and those that come of it."""
        queue = collections.deque(actions)
        while queue or self._not_started:
            if queue:
                self._carry_out(queue.popleft())
            else:  # The machine hears of it when all that it wanted before has been done.
                worker = self._not_started.popleft()
                queue.extend(self.machine.ended(worker, _CANNOT_START, time.monotonic()))

    def _next_deadline(self) -> float:
        control = self._control.next_deadline() if self._control else math.inf
        return min(self.machine.next_deadline(), self._upstream.next_deadline(), control)

    def _tick(self) -> None:
        now = time.monotonic()
        self.apply(self.machine.tick(now))
        self._upstream.tick(now)
        if self._control:
            self._control.tick(now)

    def _signalled(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            now = time.monotonic()
            if number == signal.SIGHUP:
                self.apply(self.machine.roll(now))
            elif number in _STOPS:
                self.apply(self.machine.stop(now))
            elif number == signal.SIGUSR1:
                say(report(snapshot(self)))
            elif number == signal.SIGCHLD:
                self._reap()

    def _reap(self) -> None:
        """Reap whoever ended: our workers by their pidfds, strangers (as PID 1 gets them) by their pids."""
        while True:
            try:
                # Only a look: the pid must stay taken until we know whose it is.
                end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if end is None:
                return
            # Looked up each time: the end of one worker may have started another, which may have ended too.
            ours = (process for process in self.processes.values() if process.pid == end.si_pid)
            process = next(ours, None)
            if process:
                self._ended(process)
            else:
                os.waitid(os.P_PID, end.si_pid, os.WEXITED | os.WNOHANG)

    def _ended(self, process: Process) -> None:
        """Take the end of a worker, after what it still had to say."""
        if process.worker.up:
            # What it has forked would go on to accept, beside the next one.
            process.signal_orphans(self._options.stop_signal)
        code = process.child.wait(0)
        if code is None:
            return
        self._hear(process, limit=_MESSAGES_MAX)
        del self.processes[process.worker]
        self._loop.forget(process.child.fileno())
        self._loop.forget(process.receiver.fileno())
        process.close()
        if process.worker.up:
            how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
            say(f"worker {process.pid} of generation {process.worker.slot.generation.number} {how}, unasked")
        self.apply(self.machine.ended(process.worker, code, time.monotonic()))

    def _hear(self, process: Process, limit: int = 64) -> None:
        for message in process.messages(limit):
            self._heed(process, message)

    def _heed(self, process: Process, message: Received) -> None:
        """Do what a message of a worker says. Nothing of it goes to our own manager."""
        fields, worker, now = message.assignments, process.worker, time.monotonic()
        process.note(fields)
        self.store.heed(fields, message.detach())
        usec = _number(fields, "EXTEND_TIMEOUT_USEC")
        if usec is not None:
            self.apply(self.machine.extend(worker, usec / 1e6, now))
        usec = _number(fields, "WATCHDOG_USEC")
        if usec is not None:
            process.watchdog = usec / 1e6 or math.inf
        if fields.get("WATCHDOG") in {"1", "trigger"}:
            seconds = process.watchdog if fields["WATCHDOG"] == "1" else 0.0
            self.apply(self.machine.alive(worker, now, seconds))
        if fields.get("READY") == "1" and process.child.returncode is None:  # else a dead one would serve
            self.apply(self.machine.ready(worker, now))

    def _shut_down(self, fd: int, _events: int) -> None:
        """Mend a listener that hangs up: a worker has called shutdown(2) on what all share."""
        name = dict(self.sockets.descriptors)[fd]
        try:
            self.sockets.listen_again(fd)
        except OSError:
            self._loop.forget(fd)
            say(f"a worker has shut down the listener {name!r}, which cannot be undone: start anew")
        else:
            say(f"a worker has shut down the listener {name!r}; it listens again")

    def _carry_out(self, action: Action) -> None:
        match action:
            case Spawn():
                self._spawn(action.worker)
            case Terminate() | Kill() if action.worker in self._not_started:
                pass  # there is no process
            case Welcome():
                self._welcome(action.worker, guessed=action.guessed)
            case Terminate():
                self.processes[action.worker].send_signal(self._options.stop_signal)
            case Kill():
                process = self.processes[action.worker]
                say(f"killing worker {process.pid}: {action.why}")
                process.kill()
            case Settle():
                self._settle(action)
            case Enter():
                self._enter(action.phase)
            case Exit():
                self._code = action.code
                self._questions.ended(action.code)

    def _enter(self, phase: Phase) -> None:
        self._upstream.enter(phase, time.monotonic())
        seconds = {Phase.SOAKING: self._options.soak, Phase.LEAVING: self._options.stop_delay}
        if seconds.get(phase, math.inf):  # else it is over already
            line = headline(self.machine, phase)
            say(line)
            self._upstream.status(line, time.monotonic())

    def _spawn(self, worker: Worker) -> None:
        generation, machine = worker.slot.generation, self.machine
        alive = [one for one in (machine.current, machine.successor, *machine.draining) if one]
        if not self.processes:
            # All who hold the sockets share the flag: a worker that has made them non-blocking for its event
            # loop would wait in accept(2) if we did this later.
            self.sockets.set_blocking(not self._options.non_blocking)
        try:
            provision = self._provisions.provide(generation, alive)
            process = Process(
                worker,
                generation.command,
                [*self.sockets.descriptors, *self.store.descriptors],
                provision.environ,
                lifeline=self._lifeline,
                relay=self._output.relay(provision.tail) if self._control else None,
                watchdog=self._watchdog,
                on_trial=machine.current is not None and generation is machine.successor,
            )
        except (OSError, ValueError) as error:
            say(f"cannot start a worker of generation {generation.number}: {error}")
            self._provisions.of(generation).tail.add(f"{error}\n".encode(errors="replace"))
            self._not_started.append(worker)
            return
        self.processes[worker] = process
        self._loop.watch(process.receiver.fileno(), lambda _events: self._hear(process))
        self._loop.watch(process.child.fileno(), lambda _events: self._ended(process))
        if self._nice:
            nice.lower(process.pid, self._nice)

    def _welcome(self, worker: Worker, *, guessed: bool) -> None:
        process = self.processes[worker]
        if self._nice:
            nice.restore(process.pid)
        if guessed:
            say(
                f"worker {process.pid} is TAKEN for ready after {self._options.guess:g} s: a guess, for it "
                f"never said READY=1. Clients may wait, or a broken version be let in."
            )

    def _settle(self, action: Settle) -> None:
        """Tell everybody what became of a roll."""
        number = action.generation.number if action.generation else 0
        text, code = f"generation {number} serves", 0
        if action.outcome is Outcome.SERVES:
            for process in self.processes.values():
                if process.worker.slot.generation is action.generation:
                    process.accepted()
        else:
            code = REFUSED
            text = f"the roll to generation {number} was refused: {action.why}"
            if action.outcome is Outcome.STOPPED:
                text = f"the roll was given up: {action.why}"
            elif action.outcome is Outcome.FAILED:
                text = f"generation {number} failed: {action.why}"
            say(text)
            self._upstream.status(text, time.monotonic())
        refused = action.outcome is Outcome.REFUSED and action.generation
        wrote = str(self._provisions.of(refused).tail) if refused else ""
        self._questions.settled(action, code, text, wrote=wrote)


def _number(fields: Mapping[str, str], name: str) -> int | None:
    """Return a number of a message; None if it is not there, or none."""
    try:
        return int(value_of(name, fields[name]))
    except (KeyError, MessageError):
        return None


def _chance() -> float:
    # The random module would cost 1 MiB, and this is asked for after crashes only.
    return os.urandom(1)[0] / 255


@contextlib.contextmanager
def _pid_file(path: str) -> Iterator[None]:
    """Keep our pid in a file; it is there whole or not at all, and is removed only while it is ours."""
    text = f"{os.getpid()}\n"
    draft = f"{path}.{os.getpid()}"
    try:
        with open(draft, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            if file.read() == text:
                os.unlink(path)
