"""A daemon that tells every client, as one line of JSON, what it was passed and what sdlisten made of it.

``probe.py [-l [NAME=]ADDRESS]… [--look PATH]…``: each ``-l`` is a ``listen()``; without any, all that was
passed is adopted by name. A connection that was passed (Accept=yes) is answered, and the probe ends. Clients
need not send anything. What cannot be used ends it with 78, as it should every daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from sdlisten import Activation, ActivationError, Kind, Listeners, add_accept_handler, listen, listen_fds

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from sdlisten import InheritedFd, Listener


def flags(fd: int) -> dict[str, object]:
    """Say what of a descriptor belongs to us or is shared with its other holders."""
    return {"fd": fd, "blocking": os.get_blocking(fd), "inheritable": os.get_inheritable(fd)}


def of_listener(listener: Listener) -> dict[str, object]:
    """Describe a listener by its public attributes."""
    sock = listener.socket
    return flags(listener.fileno()) | {
        "name": listener.name,
        "origin": listener.origin.value,
        "address": listener.address,
        "family": sock.family.name,
        "type": sock.type.name,
        "backlog": listener.backlog,
        "queued": listener.queued,
    }


def of_passed(found: InheritedFd) -> dict[str, object]:
    """Describe a passed descriptor by its public attributes."""
    return flags(found.fd) | {"name": found.name, "kind": found.kind.value, "stored": found.stored}


def pidfd_inode() -> int:
    """Return what LISTEN_PIDFDID has to be."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        return os.fstat(pidfd).st_ino
    finally:
        os.close(pidfd)


def inherited_variables() -> list[str]:
    """Name the variables about passed descriptors that a child finds: those of the C environment."""
    words = subprocess.check_output(["/usr/bin/env", "-0"]).decode().split("\0")
    return sorted(
        name for name, _, _ in (word.partition("=") for word in words) if name.startswith("LISTEN_")
    )


def adopt(words: Sequence[str]) -> Listeners:
    """Adopt what the words say; without words, all listeners under the names they were passed with."""
    if words:
        wanted = [word.rpartition("=") for word in words]
        return Listeners(one for name, _, address in wanted for one in listen(address, name=name or None))
    activation = Activation.current()
    names = [found.name for found in activation.remaining if found.kind is Kind.LISTENER]
    return Listeners(one for name in dict.fromkeys(names) for one in activation.take_listeners(name))


def main() -> int:
    """Adopt, then tell everybody who connects."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-l", dest="words", metavar="[NAME=]ADDRESS", action="append", default=[])
    parser.add_argument("--look", metavar="PATH", action="append", default=[])
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "sees": [path for path in arguments.look if os.path.lexists(path)],
        "pidfd": {"passed": os.environ.get("LISTEN_PIDFDID"), "own": pidfd_inode()},
    }
    connection: socket.socket | None = None
    listeners = Listeners()
    try:
        listeners = adopt(arguments.words)
    except ActivationError as error:
        report["error"] = str(error)
        if [found.kind for found in Activation.current().remaining] != [Kind.CONNECTION]:
            sys.stderr.write(f"probe: {error}\n")
            return 78
        (connection,) = Activation.current().take_sockets("connection")
    report["passed"] = [of_passed(found) for found in Activation.current().descriptors]
    report["left"] = [of_passed(found) | {"start": start(found)} for found in listen_fds()]
    report["listeners"] = [of_listener(listener) for listener in listeners]
    report["variables"] = sorted(name for name in os.environ if name.startswith("LISTEN_"))
    report["inherited variables"] = inherited_variables()
    report["libsystemd"] = "systemd.daemon" in sys.modules
    if connection is not None:
        tell(connection, report)
    else:
        asyncio.run(serve(listeners, report))
    return 0


def start(found: InheritedFd) -> str:
    """Read the beginning of what a client sent us, or of a file."""
    readable = found.kind in {Kind.FILE, Kind.FIFO, Kind.DATAGRAM} and select.select([found.fd], [], [], 0)[0]
    return os.read(found.fd, 20).decode() if readable else ""


async def serve(listeners: Listeners, report: dict[str, Any]) -> None:
    """Tell everybody who connects, until killed."""
    for listener in listeners:
        add_accept_handler(listener, lambda connection, _: tell(connection, report))
    await asyncio.Event().wait()


def tell(connection: socket.socket, report: dict[str, Any]) -> None:
    """Send the report, in one piece for seqpacket sockets, and close."""
    with connection:
        connection.send(f"{json.dumps(report)}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
