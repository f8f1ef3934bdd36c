"""What a service tells its manager beside READY=1, as the manager sees it."""

from __future__ import annotations

import socket
import sys

from sdlisten.testing import activate

HELLO = [sys.executable, "-m", "sdlisten.hello"]


def test_untaken_stored_names_are_removed_after_ready() -> None:
    """What an earlier program left in the store is removed by a start that did not take it, once ready."""
    with socket.create_server(("127.0.0.1", 0)) as left, socket.create_server(("127.0.0.1", 0)) as web:
        sockets = [("http", web), ("sdlisten.f.old", left), ("sdlisten.f.old", left), ("stored", left)]
        with activate(HELLO, sockets) as daemon:
            daemon.wait_output("nobody took 'sdlisten.f.old' from the manager's store: removed")
            assert daemon.terminate() == 0
            told = [message for message in daemon.messages if "STATUS" not in message]
    assert told == [{"READY": "1"}, {"FDSTOREREMOVE": "1", "FDNAME": "sdlisten.f.old"}, {"STOPPING": "1"}]
