"""What a service tells its manager and its log: watchdog, health, reloads, priorities."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.notifier import Notifier
from sdlisten.receiver import Receiver
from sdlisten.service.journal import JournalFormatter, stderr_is_journal
from sdlisten.service.upkeep import Reloads, Watchdog
from sdlisten.testing import activate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 20.0


class Manager:
    """A manager to talk to."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.notifier = Notifier(receiver.address)

    def heard(self) -> list[dict[str, str]]:
        """Return what was said since the last call."""
        messages = []
        while (received := self._receiver.receive()) is not None:
            with received:
                messages.append(dict(received.assignments))
        return messages


@pytest.fixture
def manager() -> Iterator[Manager]:
    """Give a manager that listens on a socket."""
    with Receiver() as receiver:
        made = Manager(receiver)
        yield made
        made.notifier.close()


def ask(manager: Manager, health: Callable[[], Any], times: int = 1) -> list[dict[str, str]]:
    """Let a watchdog ask so often, and return what the manager heard."""

    async def test() -> None:
        watchdog = Watchdog(manager.notifier, FOREVER, health)
        for _ in range(times):
            watchdog.start()
            watchdog.stop()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(test())
    return manager.heard()


FOREVER = 600.0
PING = {"WATCHDOG": "1"}


@pytest.mark.parametrize(
    ("verdict", "said"),
    [(True, [PING]), (None, [PING]), (False, []), ("trigger", [{"WATCHDOG": "trigger"}])],
)
@pytest.mark.parametrize("waiting", [False, True], ids=["sync", "async"])
def test_health_may_withhold_or_trigger(
    manager: Manager,
    verdict: Any,  # noqa: ANN401 - what people return
    said: list[dict[str, str]],
    *,
    waiting: bool,
) -> None:
    """True and None let the ping go, False withholds it, "trigger" asks the manager to act."""

    async def later() -> Any:  # noqa: ANN401
        return verdict

    async def test() -> None:
        watchdog = Watchdog(manager.notifier, FOREVER, later if waiting else lambda: verdict)
        watchdog.start()
        for _ in range(3):
            await asyncio.sleep(0)
        watchdog.stop()

    asyncio.run(test())
    assert manager.heard() == said


@pytest.mark.parametrize("waiting", [False, True], ids=["sync", "async"])
def test_a_health_check_that_raises_withholds(
    manager: Manager, caplog: pytest.LogCaptureFixture, *, waiting: bool
) -> None:
    """An error in the check is no sign of life: it is logged, and no ping goes out."""

    def now() -> bool:
        raise ValueError("the check's fault")

    async def later() -> bool:
        return now()

    async def test() -> None:
        watchdog = Watchdog(manager.notifier, FOREVER, later if waiting else now)
        watchdog.start()
        for _ in range(3):
            await asyncio.sleep(0)
        watchdog.stop()

    asyncio.run(test())
    assert manager.heard() == []
    assert "the check's fault" in caplog.text


def test_a_health_check_that_hangs_withholds(manager: Manager) -> None:
    """While a check has not answered there is no ping and no second check; stopping cancels it."""
    calls: list[int] = []

    async def hang() -> bool:
        calls.append(1)
        await asyncio.Event().wait()
        return True

    async def test() -> None:
        watchdog = Watchdog(manager.notifier, 0.003, hang)
        watchdog.start()
        first = watchdog._timer
        while watchdog._timer is first:  # noqa: ASYNC110 - until the second tick
            await asyncio.sleep(0)
        watchdog.stop()
        await asyncio.sleep(0)

    asyncio.run(test())
    assert manager.heard() == []
    assert calls == [1]


def test_pings_come_at_a_third_of_the_timeout(manager: Manager) -> None:
    """The watchdog sends at once, then again and again, until it is stopped; without a timeout nothing."""

    async def test() -> None:
        watchdog = Watchdog(manager.notifier, 0.003, None)
        watchdog.start()
        assert watchdog._interval == pytest.approx(0.001)
        heard = manager.heard()
        while len(heard) < 4:
            await asyncio.sleep(0)
            heard += manager.heard()
        watchdog.stop()
        assert heard == [PING] * len(heard)
        none = Watchdog(manager.notifier, None, None)
        none.start()
        none.stop()
        assert manager.heard() == []

    asyncio.run(test())


def test_reloads_are_one_after_the_other(manager: Manager) -> None:
    """Orders that come during a reload become one more, each with RELOADING=1 and READY=1."""
    gates: list[asyncio.Event] = []

    async def reload() -> None:
        gates.append(asyncio.Event())
        await gates[-1].wait()

    async def test() -> None:
        reloads = Reloads(manager.notifier, reload)
        for _ in range(3):
            reloads.order()
            await asyncio.sleep(0)
        assert [set(message) for message in manager.heard()] == [{"RELOADING", "MONOTONIC_USEC"}]
        gates[0].set()
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(gates) == 2
        gates[1].set()
        for _ in range(3):
            await asyncio.sleep(0)
        names = [next(iter(message)) for message in manager.heard()]
        assert names == ["READY", "RELOADING", "READY"]
        reloads.order()
        await asyncio.sleep(0)
        assert len(gates) == 3
        reloads.stop()
        await asyncio.sleep(0)
        assert [next(iter(message)) for message in manager.heard()] == ["RELOADING"]

    asyncio.run(test())


def test_without_on_reload_a_reload_is_over_at_once(manager: Manager) -> None:
    """A service that has nothing to reload says so: ``systemctl reload`` must not hang."""

    async def test() -> None:
        reloads = Reloads(manager.notifier, None)
        reloads.stop()
        reloads.order()
        await asyncio.sleep(0)

    asyncio.run(test())
    assert [next(iter(message)) for message in manager.heard()] == ["RELOADING", "READY"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (socket.gaierror(-2, "Name or service not known"), errno.EINVAL),
        (OSError(4096, "beyond"), errno.EINVAL),
        (OSError(4095, "the last"), 4095),
        (OSError("a text", "in its place"), errno.EINVAL),
        (OSError(), errno.EINVAL),
        (OSError(errno.ENOENT, "no such file"), errno.ENOENT),
    ],
    ids=repr,
)
def test_a_failed_reload_ends_whatever_the_number(manager: Manager, error: OSError, number: int) -> None:
    """An error whose number is none of the kernel's is told as EINVAL, and READY=1 ends the reload."""

    def fail() -> None:
        raise error

    async def test() -> None:
        reloads = Reloads(manager.notifier, fail)
        for _ in range(2):
            reloads.order()
            await asyncio.sleep(0)
            assert [message.get("ERRNO") for message in manager.heard()] == [None, str(number)]

    asyncio.run(test())


def test_a_reload_that_breaks_off_is_not_the_last(manager: Manager) -> None:
    """Whatever ends a reload, here an error that cannot even be written, the next order begins another."""

    class UnspeakableError(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    def fail() -> None:
        raise UnspeakableError

    async def test() -> None:
        reloads = Reloads(manager.notifier, fail)
        for _ in range(2):
            reloads.order()
            task = reloads._task
            assert task is not None
            with pytest.raises(RuntimeError, match="no words"):
                await task
            assert [next(iter(message)) for message in manager.heard()] == ["RELOADING"]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("level", "number"),
    [
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
        (5, 7),
    ],
)
def test_each_line_has_its_priority(level: int, number: int) -> None:
    """The journal reads line by line, so each line of a record begins with its priority."""
    record = logging.LogRecord("a.b", level, __file__, 1, "one\ntwo", None, None)

    text = JournalFormatter("%(name)s: %(message)s").format(record)

    assert text == f"<{number}>a.b: one\n<{number}>two"


def test_the_variable_alone_makes_no_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JOURNAL_STREAM that names something else than stderr, or nothing, means nothing."""
    for value in ("", "1:2", "nonsense", ":"):
        monkeypatch.setenv("JOURNAL_STREAM", value)
        assert not stderr_is_journal()


LOGGING = """
import logging, os, sys, types
from sdlisten.service import journal, set_up_logging
journal._JOURNALD = "/"
{before}
set_up_logging(journal={journal})
logging.getLogger("app").warning("hello", extra=dict(FIELD=1))
logging.getLogger("app").debug("not this")
"""
AS_JOURNAL = "s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'"
HANDLER = """
class JournalHandler(logging.Handler):
    def __init__(self, **fields):
        super().__init__()
        self.fields = fields
    def emit(self, record):
        print("journal", record.getMessage(), record.FIELD, self.fields, file=sys.stderr)
sys.modules["systemd"] = types.ModuleType("systemd")
sys.modules["systemd.journal"] = types.ModuleType("systemd.journal")
sys.modules["systemd.journal"].JournalHandler = JournalHandler
"""
MISSING = "sys.modules['systemd'] = None"


@pytest.mark.parametrize(
    ("before", "journal", "wanted"),
    [
        ("", False, "WARNING app: hello\n"),
        (AS_JOURNAL, False, "<4>app: hello\n"),
        (AS_JOURNAL + "\n" + MISSING, True, "<4>app: hello\n"),
        (HANDLER, True, "journal hello 1 {'SYSLOG_IDENTIFIER': '-c'}\n"),
        (HANDLER, False, "WARNING app: hello\n"),
        (HANDLER + "journal._JOURNALD = '/nowhere'", True, "WARNING app: hello\n"),
        ("logging.basicConfig(format='mine %(message)s')", True, "mine hello\n"),
        ("os.close(2); sys.stderr = None; os.environ['JOURNAL_STREAM'] = '1:2'", False, ""),
    ],
    ids=["plain", "journal", "no-extra", "extra", "extra-not-asked", "no-journald", "configured", "closed"],
)
def test_where_log_records_go(before: str, wanted: str, *, journal: bool) -> None:
    """Priorities where stderr is the journal, fields where wanted and possible; a configured log stays."""
    script = LOGGING.format(before=before, journal=journal)
    with activate([sys.executable, "-c", script], [], notify=False) as program:
        child = program._child
        assert child is not None
        assert child.wait(DEADLINE) == 0, program.output
        assert program.output.endswith(wanted)
        assert len(program.output.splitlines()) == len(wanted.splitlines())
