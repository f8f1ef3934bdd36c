"""The control socket: who may ask, one line of JSON each way, and nobody who keeps others waiting.

A client has 5 s and 64 KiB for its question. It is answered once, at once or when what it asked for has
happened, and then the connection ends. Only our own user and root are heard (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time

from sdlisten.address import UnixAddress
from sdlisten.adopt_or_bind import bind
from sdlisten.exit_codes import LATE, USAGE
from sdlisten.supervisor.status import shorter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from sdlisten.supervisor.loop import Loop

__all__ = ("LINE_MAX", "QUESTION_SECONDS", "Client", "Control")

LINE_MAX = 65536
"""Bytes in a line, either way."""

QUESTION_SECONDS = 5.0
"""How long a question may take to arrive, and an answer that waits for nothing."""

_CLIENTS_MAX = 32
_TEXT_MAX = LINE_MAX // 16  # characters: JSON writes one in at most 12 bytes
_UCRED = struct.Struct("iII")  # pid, uid, gid
_ROOT = 0
# Nobody had time for the question, as when the queue is full. 1 would say that nobody serves, 3 that a roll
# was refused; and nothing at all would look like 5: start another supervisor.
_TURNED_AWAY = LATE
_PAUSE = 1.0  # seconds


class Client:
    """Somebody who asks."""

    __slots__ = ("_drop", "deadline", "question", "sock")

    def __init__(self, sock: socket.socket, deadline: float, drop: Callable[[Client], None]) -> None:
        self.sock = sock
        self.deadline = deadline
        self.question = b""
        self._drop = drop

    def answer(
        self, code: int, text: str = "", *, status: Mapping[str, Any] | None = None, **more: object
    ) -> None:
        """Answer, and let the client go; if it has gone already, nothing happens.

        Of an answer that is too long the text is cut, and of the status left out what can best be missed.

        Args:
            code: The exit code for ``sdlisten ctl``.
            text: What to tell people.
            status: How the whole is, as `sdlisten.supervisor.status.snapshot` has it.
            more: What else to tell programs.
        """
        answer: dict[str, object] = {"code": code, "text": text, **more}
        cut: dict[str, object] = {"code": code, "text": text[:_TEXT_MAX]}
        answers = [answer, cut]  # shorter and shorter; the last one always fits
        if status is not None:
            answer["status"] = status
            answers = [answer, *({**cut, "status": facts} for facts in (status, *shorter(status)))]
        line = next(line for line in map(_line, answers) if len(line) <= LINE_MAX)
        # It fits into the buffer of a fresh connection. Who does not read it misses it.
        with contextlib.suppress(OSError):
            self.sock.send(line)
        self._drop(self)


def _line(answer: Mapping[str, object]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


class Control:
    """The control socket, and its clients.

    Args:
        path: Where it is; only our user can connect.
        loop: Who waits for it.
        ask: Called with each question and its client, to whom it gives an answer, now or later.

    Raises:
        AddressError: The path is no path for a socket, or something else is there.
        OSError: It is in use, or cannot be made.
    """

    def __init__(self, path: str, loop: Loop, ask: Callable[[Mapping[str, object], Client], object]) -> None:
        (self._listener,) = bind(UnixAddress(os.path.abspath(path)), mode=0o600, backlog=_CLIENTS_MAX)
        self._loop = loop
        self._ask = ask
        self._clients: dict[Client, None] = {}
        self._resume_at = math.inf
        loop.watch(self._listener.fileno(), self._accept)

    def tick(self, now: float) -> None:
        """Let go who takes too long to ask, and accept again after a pause."""
        if self._resume_at <= now:
            self._resume_at = math.inf
            self._loop.watch(self._listener.fileno(), self._accept)
        for client in [client for client in self._clients if client.deadline <= now]:
            self._drop(client)

    def next_deadline(self) -> float:
        """Return when `tick` has something to do."""
        return min((self._resume_at, *(client.deadline for client in self._clients)))

    def close(self) -> None:
        """Let all go and remove the socket; harmless twice."""
        for client in list(self._clients):
            self._drop(client)
        self._loop.forget(self._listener.fileno())
        self._listener.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except BlockingIOError:  # it went away
            return
        except OSError:  # no descriptor is left, and poll(2) would say at once that somebody waits
            self._loop.forget(self._listener.fileno())
            self._resume_at = time.monotonic() + _PAUSE
            return
        sock.setblocking(False)
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in {_ROOT, os.geteuid()}:
            sock.close()
            return
        client = Client(sock, time.monotonic() + QUESTION_SECONDS, self._drop)
        self._clients[client] = None
        if len(self._clients) > _CLIENTS_MAX:
            client.answer(_TURNED_AWAY, f"{_CLIENTS_MAX} others ask already, or wait: not asked, try again")
            return
        self._loop.watch(sock.fileno(), lambda _events: self._read(client))

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(LINE_MAX)
        except OSError:  # a reset: it has gone away with an answer of ours unread
            data = b""
        client.question += data
        line, end, _ = client.question.partition(b"\n")
        if len(client.question) > LINE_MAX:
            client.answer(USAGE, f"a question of more than {LINE_MAX} bytes")
        elif end:
            # From now on only its going away matters.
            client.deadline = math.inf
            self._loop.watch(client.sock.fileno(), lambda _events: self._drop(client), 0)
            self._understand(client, line)
        elif not data:
            self._drop(client)

    def _understand(self, client: Client, line: bytes) -> None:
        try:
            question = json.loads(line)
            if not isinstance(question, dict):
                raise TypeError(f"{question!r}: expected an object")  # noqa: TRY301 - one kind of answer for both
        except (TypeError, ValueError, RecursionError) as error:
            client.answer(USAGE, f"not a question: {error}")
            return
        self._ask(question, client)

    def _drop(self, client: Client) -> None:
        if self._clients.pop(client, self) is None:
            self._loop.forget(client.sock.fileno())
            client.sock.close()
