"""One client of the load: a connection, a request, and what became of it."""

from __future__ import annotations

import enum
import errno
import math
import os
import selectors
import socket
from typing import TYPE_CHECKING

from sdlisten.load.answer import Answer

if TYPE_CHECKING:
    from sdlisten.load.engine import Engine

__all__ = ("Client", "Phase")

# Seconds until a unix listener whose queue is full is tried again.
_RETRY = 0.005
# Seconds that a closed loop rests after a failure; else a refusing server would measure how fast we can ask.
_REST = 0.05


class Phase(enum.Enum):
    """Where a client is; the value says so in a sample."""

    FREE = "between requests"
    QUEUED = "waiting for room in the listener's queue"
    CONNECTING = "connecting"
    HOLDING = "connected, before sending"
    ASKED = "waiting for the answer"


class Client:
    """One client: at most one connection, at most one request in flight."""

    __slots__ = (
        "answer",
        "answers",
        "deadline",
        "due",
        "engine",
        "free_at",
        "number",
        "phase",
        "sock",
        "wake_at",
        "watched",
    )

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.number = number
        self.phase = Phase.FREE
        self.sock: socket.socket | None = None
        self.watched = 0  # the events that the selector reports of sock
        self.wake_at = self.free_at = self.due = self.deadline = 0.0
        self.answers = 0  # on this connection
        self.answer = Answer()

    def begin(self, planned: float, now: float) -> None:
        """Begin a request: connect, or ask on the kept connection."""
        load = self.engine.load
        self.due = planned + load.delay
        self.deadline = now + load.delay + load.timeout
        self.engine.active[self] = None
        if self.sock:
            self._ask(self.sock, now)
        else:
            self.answers = 0
            self.sock = socket.socket(load.family, socket.SOCK_STREAM)
            self.sock.setblocking(False)
            self._connect(self.sock, now)

    def ready(self, sock: socket.socket, now: float) -> None:
        """Go on after the selector has reported our socket: readable, writable, or broken."""
        if self.phase is Phase.CONNECTING:
            self._connected(sock, now)
            return
        data = b""
        broken = None
        try:
            data = sock.recv(65536)
        except BlockingIOError:  # a wake-up for nothing; select(2), BUGS
            return
        except OSError as error:
            broken = error
        if self.phase is Phase.FREE:
            # Whatever comes here, even a 408, ends the connection; RFC 9112, 9.3.
            self.engine.tally.counts["closed_idle"] += 1
            self.drop()
        elif broken:
            self._lost(now, broken)
        elif self.phase is Phase.HOLDING:
            if data:
                self._fail(now, "bad_status", f"answered before it was asked: {data[:60]!r}")
            else:
                self._fail(now, "early_close", "closed")
        else:
            self._read(now, data)

    def awake(self, now: float) -> None:
        """Go on at the moment that was waited for."""
        if not self.sock:
            self.free_at = self.wake_at
            self.engine.free.append(self)
        elif self.phase is Phase.QUEUED:
            self._connect(self.sock, now)
        else:
            self._ask(self.sock, now)

    def expire(self, now: float) -> None:
        """Give the request up at its deadline."""
        so_far = f" ({len(self.answer)} bytes came)" if self.phase is Phase.ASKED else ""
        self._fail(now, "timeout", f"{self.engine.load.timeout:g} s are over{so_far}")

    def drop(self) -> None:
        """Close the connection, if there is one."""
        if self.sock:
            if self.watched:
                self.engine.selector.unregister(self.sock)
                self.watched = 0
            self.sock.close()
            self.sock = None

    def _connect(self, sock: socket.socket, now: float) -> None:
        self.phase = Phase.CONNECTING
        code = sock.connect_ex(self.engine.load.sockaddr)
        if code == errno.EAGAIN:
            # A unix listener's queue is full. A blocking connect(2) would wait; this one cannot be polled.
            self.phase = Phase.QUEUED
            self.engine.wake(self, now + _RETRY)
        elif code not in (0, errno.EINPROGRESS):
            self._lost(now, OSError(code, os.strerror(code)))
        elif self.engine.load.delay:
            self._watch(sock, selectors.EVENT_WRITE)
        else:
            # On loopback the handshake is over before connect(2) returns: one turn of the loop saved.
            self._ask(sock, now)

    def _connected(self, sock: socket.socket, now: float) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._lost(now, OSError(code, os.strerror(code)))
        elif self.engine.load.delay:
            self.engine.tally.counts["opened"] += 1
            self.phase = Phase.HOLDING
            self._watch(sock, selectors.EVENT_READ)
            self.engine.wake(self, now + self.engine.load.delay)
        else:
            self._ask(sock, now)

    def _ask(self, sock: socket.socket, now: float) -> None:
        # Taken whole or not at all: nothing else is on its way on this connection.
        try:
            sock.send(self.engine.load.request)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOTCONN):
                self._lost(now, error)
                return
            # Not connected yet; Linux says EAGAIN, macOS ENOTCONN.
            self._watch(sock, selectors.EVENT_WRITE)
            return
        if self.phase is Phase.CONNECTING:
            self.engine.tally.counts["opened"] += 1
        self.phase = Phase.ASKED
        self.answer = Answer()
        self._watch(sock, selectors.EVENT_READ)

    def _watch(self, sock: socket.socket, events: int) -> None:
        if not self.watched:
            self.engine.selector.register(sock, events, self)
        elif self.watched != events:
            self.engine.selector.modify(sock, events, self)
        self.watched = events

    def _read(self, now: float, data: bytes) -> None:
        try:
            whole = self.answer.feed(data)
        except ValueError as error:
            self._fail(now, "bad_status", str(error))
            return
        if whole:
            self._answered(now)
        elif not data:
            self._fail(
                now, "short_read" if len(self.answer) else "empty", f"EOF after {len(self.answer)} bytes"
            )

    def _answered(self, now: float) -> None:
        engine = self.engine
        self.answers += 1
        engine.tally.good(now, self.due, engine.oldest.due, self.answer.first_word())
        if engine.load.mode != "keep":
            self.drop()
        elif self.answer.close:
            engine.tally.counts["close_announced"] += 1
            self.drop()
        self._end(now)
        engine.free.append(self)

    def _lost(self, now: float, error: OSError) -> None:
        """Say which failure it is that the kernel reports."""
        gone = error.errno in {errno.ECONNRESET, errno.EPIPE}  # there was a connection
        connecting = self.phase is Phase.CONNECTING
        if connecting and not gone:
            kind = "timeout" if error.errno == errno.ETIMEDOUT else "refused"
        elif self.phase is Phase.HOLDING or (connecting and self.engine.load.delay):
            kind = "early_close"
        else:
            kind = "short_read" if self.phase is Phase.ASKED and len(self.answer) else "reset"
        self.engine.tally.counts["opened"] += connecting and gone
        self._fail(now, kind, str(error))

    def _fail(self, now: float, kind: str, detail: str) -> None:
        where = f"{detail}, {self.phase.value}, request {self.answers + 1} of its connection"
        self.engine.tally.bad(now, self.due, kind, where)
        self.drop()
        self._end(now)
        if self.engine.load.rate:
            self.engine.free.append(self)
        else:
            self.engine.wake(self, now + _REST)

    def _end(self, now: float) -> None:
        del self.engine.active[self]
        self.phase = Phase.FREE
        self.wake_at = -math.inf
        self.free_at = now
