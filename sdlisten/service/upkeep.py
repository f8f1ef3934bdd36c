"""Between a service and its manager: signs of life both ways, reloads, and what was stored for nobody."""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
from typing import Literal, TypeAlias

from sdlisten.activation import close_untaken_stored, lifeline
from sdlisten.message import assignment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sdlisten.notifier import Notifier

    Verdict: TypeAlias = bool | Literal["trigger"] | None
    Health: TypeAlias = Callable[[], Verdict | Awaitable[Verdict]]
    OnReload: TypeAlias = Callable[[], object]

__all__ = ("Lifeline", "Reloads", "Watchdog", "forget_untaken")

_logger = logging.getLogger("sdlisten.service")

_ERRNO_MAX = 4095  # of the kernel, and of systemd


def forget_untaken(notifier: Notifier) -> None:
    """Make the manager forget what an earlier program of ours stored and this one has not taken.

    Nobody else would: it stays in the manager's store over every restart, and is passed to each start. Call
    it after READY=1; until then an older version may have to come back and find what it has left.
    """
    for name in close_untaken_stored():
        _logger.info("nobody took %r from the manager's store: removed", name)
        notifier.remove_as(name)


class Lifeline:
    """Notices that the supervisor (``sdlisten run``) has gone, if there was one; see `sdlisten.lifeline`.

    Args:
        gone: Called then, once.
    """

    __slots__ = ("_fd", "_gone", "_loop")

    def __init__(self, gone: Callable[[], object]) -> None:
        self._gone = gone
        self._fd: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Watch until `stop`."""
        fd = lifeline()
        if fd is not None:
            self._loop = asyncio.get_running_loop()
            self._fd = os.dup(fd)  # another service in this loop has a reader of its own
            self._loop.add_reader(self._fd, self._ended)

    def stop(self) -> None:
        """Watch no longer; harmless twice."""
        fd, self._fd = self._fd, None
        if fd is not None and self._loop is not None:
            self._loop.remove_reader(fd)
            os.close(fd)

    def _ended(self) -> None:
        self.stop()
        _logger.warning("the supervisor has gone: stopping")
        self._gone()


class Watchdog:
    """Sends ``WATCHDOG=1`` from the event loop: a loop that hangs sends none.

    Args:
        notifier: The manager.
        timeout: After how many seconds of silence the manager acts; None: there is no watchdog.
        health: Asked before each; see `sdlisten.service.Service`.
    """

    __slots__ = ("_check", "_health", "_interval", "_notifier", "_timer")

    def __init__(self, notifier: Notifier, timeout: float | None, health: Health | None) -> None:
        self._notifier = notifier
        # sd_watchdog_enabled(3) advises half; a third leaves room for one that is late.
        self._interval = None if timeout is None else timeout / 3
        self._health = health
        self._timer: asyncio.TimerHandle | None = None
        self._check: asyncio.Future[Verdict] | None = None

    def start(self) -> None:
        """Send the first, and go on until `stop`."""
        if self._interval is not None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self.start)
            self._ask()

    def stop(self) -> None:
        """Send no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._check is not None:
            self._check.cancel()

    def _ask(self) -> None:
        if self._health is None:
            self._judge(True)
        elif self._check is None:
            try:
                verdict = self._health()
                if inspect.isawaitable(verdict):
                    self._check = asyncio.ensure_future(verdict)
                    self._check.add_done_callback(self._answered)
                else:
                    self._judge(verdict)
            except Exception:
                _logger.exception("health() raised: the watchdog gets nothing")

    def _answered(self, check: asyncio.Future[Verdict]) -> None:
        self._check = None
        if check.cancelled():
            return
        if (error := check.exception()) is not None:
            _logger.error("health() raised: the watchdog gets nothing", exc_info=error)
        else:
            self._judge(check.result())

    def _judge(self, verdict: Verdict) -> None:
        if verdict == "trigger":
            _logger.error("health() said: trigger the watchdog")
            self._notifier.watchdog_trigger()
        elif verdict or verdict is None:
            self._notifier.watchdog()


class Reloads:
    """Reloads one after the other; orders that come during one become one more.

    Args:
        notifier: The manager.
        on_reload: Does it, or raises; may return an awaitable. None: there is nothing to do.
    """

    __slots__ = ("_again", "_failed", "_notifier", "_on_reload", "_task")

    def __init__(self, notifier: Notifier, on_reload: OnReload | None) -> None:
        self._notifier = notifier
        self._on_reload = on_reload
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._failed = False

    def order(self) -> None:
        """Begin a reload, or another one after that which is under way."""
        if self._task is None or self._task.done():  # however it ended
            self._task = asyncio.get_running_loop().create_task(self._run())
        else:
            self._again = True

    def stop(self) -> None:
        """Cancel what is under way: after STOPPING=1 there is no READY=1."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            self._again = False
            # Without RELOADING=1, sent after the signal, Type=notify-reload waits for ever; P27 of field.md.
            self._notifier.reloading()
            self._notifier.send("READY=1", *await self._reload())
            if not self._again:
                return

    async def _reload(self) -> tuple[str, ...]:
        """Reload; returns what is to be said of it."""
        try:
            if self._on_reload is not None:
                result = self._on_reload()
                if inspect.isawaitable(result):
                    await result
        except Exception as error:
            _logger.exception("reload failed, the old configuration stays")
            self._failed = True
            return assignment("STATUS", f"reload failed: {error!r}"), assignment("ERRNO", _number_of(error))
        _logger.info("reloaded")
        failed, self._failed = self._failed, False
        return ("STATUS=", "ERRNO=0") if failed else ()


def _number_of(error: Exception) -> int:
    """Return what ERRNO= says of an error; EINVAL where it has no number of the kernel."""
    number: object = error.errno if isinstance(error, OSError) else None
    # socket.gaierror counts below 0, others have what they were given: texts, or numbers of a library.
    return int(number) if isinstance(number, int) and 0 < number <= _ERRNO_MAX else errno.EINVAL
