"""An ASGI application that tells who answered: the pid, and the generation in a field of its own."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ("application",)

time.sleep(float(os.environ.get("START_DELAY", "0")))  # stands for a slow import


async def application(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Answer a request."""
    del receive
    assert scope["type"] == "http", "started with --lifespan off"
    body = b"%d\n" % os.getpid()
    fields = {
        b"content-type": b"text/plain",
        b"content-length": str(len(body)).encode(),
        b"generation": os.environ.get("SDLISTEN_GENERATION", "0").encode(),
    }
    await send({"type": "http.response.start", "status": 200, "headers": list(fields.items())})
    await send({"type": "http.response.body", "body": body})
