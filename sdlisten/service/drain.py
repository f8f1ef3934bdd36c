"""The drain: wait for what is in progress, say so, and end what is left at the limit."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging

from sdlisten.message import assignment
from sdlisten.service.report import DrainReport, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sdlisten.notifier import Notifier
    from sdlisten.service.rules import Rules
    from sdlisten.service.table import Entry, Table

__all__ = ("drain",)

_logger = logging.getLogger("sdlisten.service")

_TICK = 1.0
# Handlers that were cancelled get so many seconds to clean up.
_CLEAN_UP = 1.0
# It is asked for again each second, so a day is for ever; and the µs of any limit must fit into 64 bits.
_LONGEST_EXTENSION = 86_400.0


async def drain(
    table: Table, rules: Rules, notifier: Notifier, hook: Callable[[Any], object] | None
) -> DrainReport:
    """Wait until all connections have ended, at most until the deadline of the rules.

    Args:
        table: The connections; none is added any more.
        rules: They say that the drain has begun.
        notifier: Is told each second that we are still at it.
        hook: Called once for each connection with a request in progress.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    before = table.ended.copy()
    hooks = _call_hook(hook, [entry for entry in table if entry.begin_drain()])
    while len(table) and (left := rules.deadline - loop.time()) > 0:
        _logger.info("draining: open=%d", len(table))
        # Asked for again each second; TimeoutStopSec= may be shorter than our limit.
        extension = assignment(
            "EXTEND_TIMEOUT_USEC", round(min(left + _TICK + _CLEAN_UP, _LONGEST_EXTENSION) * 1_000_000)
        )
        notifier.send(extension, f"STATUS=draining: open={len(table)}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_TICK, left)):
                await table.empty.wait()
    for entry in table:
        entry.drop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLEAN_UP):
            await table.empty.wait()
    for task in hooks:
        task.cancel()
    ended = table.ended - before
    for entry in table:  # a handler that does not end when it is cancelled
        _logger.warning("still running after it was cancelled: %r", entry.task)
        ended[entry.outcome] += 1
    report = DrainReport(
        ended[Outcome.FINISHED] + ended[Outcome.REFUSED],
        ended[Outcome.HANDED_OVER],
        ended[Outcome.CLOSED_IDLE],
        ended[Outcome.DROPPED],
        loop.time() - began,
    )
    level = logging.WARNING if report.dropped else logging.INFO
    fields = {f"SDLISTEN_{name.upper()}": getattr(report, name) for name in DrainReport.__slots__}
    _logger.log(level, "%s", report, extra=fields)
    return report


def _call_hook(hook: Callable[[Any], object] | None, entries: list[Entry]) -> set[asyncio.Future[object]]:
    """Call the hook for each; returns what it has begun."""
    begun: set[asyncio.Future[object]] = set()
    for entry in entries:
        if hook is None:
            break
        try:
            result = hook(entry)
            if inspect.isawaitable(result):
                begun.add(asyncio.ensure_future(result))
        except Exception:
            _logger.exception("on_drain(%r) raised", entry)
    return begun
