"""A daemon that gives ``share()`` of its listeners to code which treats sockets as its own, and then ends.

One client is told what became of it: a JSON object for each listener.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

from sdlisten import listen

if TYPE_CHECKING:
    from sdlisten import Listeners


def shut_down(shared: socket.socket) -> str:
    """Shut a socket down, which would end it for all its holders."""
    try:
        shared.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        return type(error).__name__
    return "was shut down"


async def serve(listeners: Listeners) -> None:
    """Give them to servers of asyncio, which listen with a backlog of their own and close them."""
    told = asyncio.Event()
    facts: list[dict[str, object]] = []

    async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for fact, listener in zip(facts, listeners, strict=True):
            fact["backlog"] = listener.backlog
        writer.write(json.dumps(facts).encode())
        await writer.drain()
        writer.close()
        told.set()

    for listener in listeners:
        with listener.share() as shared:
            shared.listen(1)
            facts.append({"address": listener.address, "shutdown": shut_down(shared)})
    servers = [await asyncio.start_server(tell, sock=listener.share()) for listener in listeners]
    await told.wait()
    for server in servers:
        server.close()
        await server.wait_closed()


if __name__ == "__main__":
    with listen(name="web") as adopted:
        asyncio.run(serve(adopted))
