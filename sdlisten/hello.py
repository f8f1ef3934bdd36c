"""A daemon to try things with: ``python -m sdlisten.hello [-l [NAME=]ADDRESS]…``.

HTTP/1.0 on whatever was passed, else on what ``-l`` says, else on ``http=127.0.0.1:8080``: one read, one
answer, and the first word of the body is the pid that answered. SIGTERM: it stops accepting, finishes what
it has accepted, and exits with 0. ``HELLO_START_DELAY`` seconds of sleep stand for a slow import.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time

from sdlisten import Activation, ActivationError, AddressError, Kind, Listeners, add_accept_handler, listen
from sdlisten.address import parse_named_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from sdlisten import Listener

__all__ = ("main",)

FINISH_TIMEOUT = 2.0  # seconds
REQUEST_TIMEOUT = 10.0  # seconds


def take_listeners(words: list[str]) -> Listeners:
    """Adopt or bind what ``-l`` says; without it, adopt all that was passed, or bind the default."""
    if not words:
        activation = Activation.current()
        names = [
            found.name for found in activation.remaining if found.kind is Kind.LISTENER and not found.stored
        ]
        if names:
            return Listeners(one for name in dict.fromkeys(names) for one in activation.take_listeners(name))
    wanted = [parse_named_address(word) for word in words or ["http=127.0.0.1:8080"]]
    return Listeners(one for name, address in wanted for one in listen(str(address), name=name))


def describe(listener: Listener) -> str:
    """Write what we got as NAME=VALUE words, for people, journals and the demo."""
    facts = {
        "name": listener.name or "-",
        "address": listener.address,
        "family": listener.socket.family.name,
        "non-blocking": "no" if os.get_blocking(listener.fileno()) else "yes",
        "close-on-exec": "no" if os.get_inheritable(listener.fileno()) else "yes",
        "backlog": listener.backlog,
    }
    return f"{listener.origin.value} " + " ".join(f"{name}={value}" for name, value in facts.items())


async def answer(connection: socket.socket) -> None:
    """Read once, answer once, close."""
    loop = asyncio.get_running_loop()
    with connection:
        if await asyncio.wait_for(loop.sock_recv(connection, 8192), REQUEST_TIMEOUT):
            body = f"{os.getpid()} says hello\n"
            head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            await loop.sock_sendall(connection, (head + body).encode())


async def serve(listeners: Listeners) -> None:
    """Answer until SIGTERM or SIGINT, then finish what is accepted."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    answers: set[asyncio.Task[None]] = set()

    def accepted(connection: socket.socket, _address: object) -> None:
        task = asyncio.create_task(answer(connection))
        answers.add(task)
        task.add_done_callback(finished)

    def finished(task: asyncio.Task[None]) -> None:
        answers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            print(f"a client was not answered: {error!r}", file=sys.stderr, flush=True)

    with listeners:
        handles = [add_accept_handler(listener, accepted) for listener in listeners]
        for listener in listeners:
            print(describe(listener), file=sys.stderr, flush=True)
        await stop.wait()
        for remove in handles:
            remove()
        if answers:
            await asyncio.wait(answers, timeout=FINISH_TIMEOUT)


def main() -> int:
    """Run the daemon; returns 0, or 78 (EX_CONFIG) if it cannot have its sockets."""
    parser = argparse.ArgumentParser(
        prog="python -m sdlisten.hello", description="A daemon to try things with."
    )
    parser.add_argument("-l", "--listen", metavar="[NAME=]ADDRESS", action="append", default=[])
    words = parser.parse_args().listen
    time.sleep(float(os.environ.get("HELLO_START_DELAY", "0")))
    try:
        listeners = take_listeners(words)
    except (ActivationError, AddressError) as error:
        print(f"hello: {error}", file=sys.stderr)
        return 78
    asyncio.run(serve(listeners))
    return 0


if __name__ == "__main__":
    sys.exit(main())
