"""The load that counts what a restart loses: a client of HTTP/1.x on raw sockets.

Three modes, because a restart can lose a request in three places:

=========  ====================================================================================
``short``  a new connection for each request: what is lost of the listener's queue
``slow``   connect, wait 200 ms, only then send: of connections accepted and not yet used
``keep``   connections kept alive, paced: of idle connections, and of requests that cross a close
=========  ====================================================================================

Each request ends as exactly one of: ok, refused (no connection), reset (before any byte of the answer), empty
(EOF without a byte), early close (closed before we had sent), short read (EOF or reset within the answer),
timeout, bad status (not 2xx, or not HTTP/1.x). What happens between requests is counted beside them: kept
connections closed while idle, answers with ``Connection: close``.

A kept connection that the server closed while idle is noticed and replaced before its next request. Where the
close crosses a request on its way, the request is lost and counted: as a reset, or as empty.

Latency is measured from the *planned* start. With a rate, request *n* is planned for ``start + n / rate``,
whatever became of those before it, and goes to the client that has been free longest; so a stalled server
makes late all requests that were due meanwhile, not only those on their way (no coordinated omission). Rate 0
is a closed loop: each client plans its next request for the moment of its last answer.

In a test::

    with LoadProcess("127.0.0.1:8080", mode="keep") as load:
        load.wait_started()
        restart_twenty_times()
        result = load.stop()
    assert result.clean, result
"""

from __future__ import annotations

from sdlisten.load.engine import Load
from sdlisten.load.process import LoadProcess, add_arguments, main, run
from sdlisten.load.result import Result

__all__ = ("Load", "LoadProcess", "Result", "add_arguments", "main", "run")
