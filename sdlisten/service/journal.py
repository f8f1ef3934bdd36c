"""Log lines for the journal: with their priority where stderr leads there, with fields where wanted."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ("JournalFormatter", "set_up_logging", "stderr_is_journal")

# syslog(3) levels; journald reads them as <N> at the beginning of a line, sd-daemon(3).
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7

# sd_journal_send(3) drops what it is given, without an error, where journald does not listen: in a container.
_JOURNALD = "/run/systemd/journal/socket"


class JournalFormatter(logging.Formatter):
    """Puts ``<N>`` before each line: journald splits what it reads from stderr into lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, each of its lines with the priority."""
        level = next((number for least, number in _PRIORITIES if record.levelno >= least), _DEBUG)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def stderr_is_journal() -> bool:
    """Return whether stderr is the stream that ``$JOURNAL_STREAM`` names; systemd.exec(5)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    # Compared and not only looked for: children inherit the variable, their stderr may lead elsewhere.
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def set_up_logging(*, journal: bool = False, level: int = logging.INFO) -> None:
    """Send log records to where the service's manager reads them, unless logging is configured already.

    Args:
        journal: Send them to journald itself, with their fields, by python-systemd's ``JournalHandler``.
            Where that is not installed (``pip install sdlisten[systemd]``) or journald does not run, as
            without.
        level: The least that is logged.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    root.addHandler((_journal_handler() if journal else None) or _stderr_handler())
    root.setLevel(level)


def _journal_handler() -> logging.Handler | None:
    if not os.path.exists(_JOURNALD):
        return None
    try:
        from systemd.journal import JournalHandler  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    handler: logging.Handler = JournalHandler(SYSLOG_IDENTIFIER=os.path.basename(sys.argv[0]) or "python")
    return handler


def _stderr_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    if stderr_is_journal():
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
