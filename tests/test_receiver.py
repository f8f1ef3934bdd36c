"""sdlisten.receiver against real sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from sdlisten.receiver import Receiver


def test_a_message_arrives_with_its_sender() -> None:
    """A message is received once, with the credentials of its sender."""
    with Receiver() as receiver, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        assert receiver.receive() is None
        sender.sendto(b"READY=1\nSTATUS=up", receiver.address)
        received = receiver.receive()
        assert received is not None
        assert received.assignments == {"READY": "1", "STATUS": "up"}
        assert (received.pid, received.uid, received.gid) == (os.getpid(), os.getuid(), os.getgid())
        assert received.fds == ()
        assert receiver.receive() is None
    assert not Path(receiver.address).parent.exists()
