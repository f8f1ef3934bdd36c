"""A daemon from which another holder of its listener takes a connection that its event loop has seen already.

It adopts ``web``, shared with other services, and ``control``, which takes one word:

========  ===========================================================================================
``flag``  answered with "blocking" or "non-blocking", what ``web`` is now
``rob``   answered with "go"; then the loop stands still until a connection waits on ``web``, and that
          connection is taken between the loop's select() and the accept handler, and told "robbed"
``ping``  answered with "pong", if the loop runs
========  ===========================================================================================
"""

from __future__ import annotations

import asyncio
import os
import select
import socket

from sdlisten import add_accept_handler, listen

SECONDS = 10.0


async def main() -> None:
    """Serve both."""
    loop = asyncio.get_running_loop()
    (web,) = listen(name="web")
    (control,) = listen(name="control")

    def take() -> None:
        with socket.socket(fileno=os.dup(web.fileno())) as other_holder:
            robbed, _ = other_holder.accept()
        with robbed:
            robbed.sendall(b"robbed")

    def obey(connection: socket.socket, _: object) -> None:
        with connection:
            connection.settimeout(SECONDS)
            word = connection.recv(16)
            if word == b"flag":
                connection.sendall(b"blocking" if os.get_blocking(web.fileno()) else b"non-blocking")
            elif word == b"ping":
                connection.sendall(b"pong")
            else:
                connection.sendall(b"go")
                select.select([web], [], [], SECONDS)
                # asyncio polls before it runs this, and runs it before the handlers of what it polled.
                loop.call_soon(take)

    def answer(connection: socket.socket, _: object) -> None:
        with connection:
            connection.sendall(b"served")

    add_accept_handler(web, answer)
    add_accept_handler(control, obey)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
