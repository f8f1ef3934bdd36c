"""Ask a supervisor at its control socket: one line of JSON each way."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import time

from sdlisten.exit_codes import LATE, NOBODY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Answer = Mapping[str, Any]

__all__ = ("ask", "ask_as_command")

_ANSWER_SECONDS = 5.0
_LONGEST = 1e6  # seconds; poll(2) counts milliseconds in an int
_PAUSE = 0.02
_STOPPING = {"leaving", "stopping", "stopped"}


class _ToldToEndError(Exception):
    """SIGTERM came."""


def ask(path: str, question: Mapping[str, object], *, timeout: float | None = None) -> Answer:
    """Ask, and wait for the answer.

    Args:
        path: The control socket.
        question: ``do`` is ``roll``, ``stop`` or ``status``; ``wait``; for a roll ``command``.
        timeout: Seconds, at most a million. None: 5, or with ``wait`` as long as the supervisor takes.

    Returns:
        The answer: ``code`` is the exit code for a command, ``text`` for people. That nobody answered, or not
        in time, is an answer too.
    """
    if timeout is None and not question.get("wait"):
        timeout = _ANSWER_SECONDS
    timeout = None if timeout is None else min(timeout, _LONGEST)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    late = "the supervisor is busy: not asked within {:g} s, try again"
    received = b""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            _connect(sock, path, deadline)
            # It may have answered before it has heard all, and gone: too long a question, too many clients.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _limit(sock, deadline)
                sock.sendall(json.dumps(question).encode() + b"\n")
            late = "no answer within {:g} s; what was asked for goes on"
            _limit(sock, deadline)
            with contextlib.suppress(ConnectionResetError):  # likewise, after its answer
                # To its end, so that the supervisor has let go of us when we say what it answered.
                while data := sock.recv(65536):
                    received += data
                    _limit(sock, deadline)
    except TimeoutError:
        return {"code": LATE, "text": late.format(timeout)}
    except OSError as error:
        return {"code": NOBODY, "text": f"no supervisor at {path}: {error.strerror or error}"}
    return _understood(received, path)


def ask_as_command(path: str, question: Mapping[str, object], *, timeout: float | None = None) -> Answer:
    """Ask as `ask` does, in the main thread of a command that may be the ExecReload= of a unit.

    systemd that stops a unit in the middle of a reload sends SIGTERM to that command too, and takes its end
    by a signal, or any code but 0, for a failure of the *unit* (service_sigchld_event, src/core/service.c).
    There is none: all does as it is told. For other reasons, and elsewhere, it is a failure.
    """
    # systemd.exec(5), since 248.
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        return ask(path, question, timeout=timeout)

    def end(_number: int, _frame: object) -> None:
        raise _ToldToEndError

    signal.signal(signal.SIGTERM, end)
    try:
        answer = ask(path, question, timeout=timeout)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all that is left to do is to say what we know
    except _ToldToEndError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        answer = ask(path, {"do": "status"})
        if answer["code"] == NOBODY or _phase(answer) in _STOPPING:
            return {"code": 0, "text": "given up: told to stop"}
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    if answer.get("outcome") == "stopped":
        answer = {**answer, "code": 0}
    return answer


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    while True:
        _limit(sock, deadline)
        try:
            sock.connect(path)
        except BlockingIOError:
            # Its queue is full. connect(2) waits for room only where it may wait for ever; else unix(7) has
            # EAGAIN, at once, and poll(2) does not tell when there is room.
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(_PAUSE)
        else:
            return


def _limit(sock: socket.socket, deadline: float) -> None:
    """Let a socket wait no longer than until then."""
    # 0 would mean not to wait for what has come already.
    sock.settimeout(None if deadline == math.inf else max(deadline - time.monotonic(), 0.001))


def _phase(answer: Answer) -> object:
    """Return the phase in an answer; None if it has none: it came too late, or is of another version."""
    status = answer.get("status")
    return status.get("phase") if isinstance(status, dict) else None


def _understood(line: bytes, path: str) -> Answer:
    try:
        answer = json.loads(line)
        if isinstance(answer["code"], int) and isinstance(answer["text"], str):
            found: Answer = answer
            return found
    except (ValueError, KeyError, TypeError):
        pass
    return {"code": NOBODY, "text": f"no supervisor at {path}: it ended without an answer"}
