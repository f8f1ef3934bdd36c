"""Run one daemon from its sockets to its clean end: ready, reload, watchdog, drain.

::

    async def handler(connection):
        reader, writer = connection.streams()
        while await connection.idle():          # False: just return
            writer.write(answer(await read_request(reader), close=connection.closing))
            await writer.drain()

    serve(handler, "http=8080")

**How it stops.** After SIGTERM (`Service.stop`) no connection is accepted any more; the manager's socket goes
on queueing them for the next start. What is open ends so:

===========================  ==============================================================================
request in progress          is finished; `Connection.closing` lets its answer say that it is the last
nothing owed, silent         handed over to a successor, once there is one (not with TLS); else it waits for
                             its next request, which is answered as the last. Closed without that when it has
                             been silent for ``idle_timeout`` (2 s), silence before the drain included
nothing ever came            the same, with ``fresh_timeout`` (5 s) from its beginning
all, at ``drain_timeout``    closed; those with a request in progress are counted and logged as dropped
===========================  ==============================================================================

Why silence counts: a connection must not be closed under a client that is just sending, and nobody can see
that. How likely it is depends on how long the client has been silent, not on how long we have been waiting: a
client that asks every 20 ms is answered and told within 20 ms, while one that has said nothing for a minute
gains little from two more seconds, which everybody else would spend in the queue of a service that restarts.
So an idle server stops at once, a busy one within ``idle_timeout``. Before each such close the socket is read
a last time, and what has come is served.
"""

from __future__ import annotations

from sdlisten.service.connection import Connection
from sdlisten.service.core import Service
from sdlisten.service.journal import set_up_logging
from sdlisten.service.reader import Reader
from sdlisten.service.report import Counters, DrainReport
from sdlisten.service.running import run, serve, take_sockets
from sdlisten.service.writer import Writer

__all__ = (
    "Connection",
    "Counters",
    "DrainReport",
    "Reader",
    "Service",
    "Writer",
    "run",
    "serve",
    "set_up_logging",
    "take_sockets",
)
