"""A daemon on Service whose requests, reloads and end a test decides about: ``worker.py [IDLE]``.

With IDLE it exits when it was idle for so many seconds. Each line is a request:

==========  ============================================================================================
``pid``     who answers
``config``  what the last good reload read
``wait S``  like ``pid``, but the answer takes so many seconds
``hang``    the event loop stands still
==========  ============================================================================================

A reload reads CONFIG, ``SECONDS TEXT``, and takes so long. One whose text begins with "bad" fails.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sdlisten import serve

if TYPE_CHECKING:
    from sdlisten import Connection

CONFIG = Path("/opt/worker.conf")

config = "at start"


async def reload() -> None:
    """Read the configuration."""
    global config  # noqa: PLW0603 -- as simple daemons have it
    seconds, _, text = CONFIG.read_text(encoding="utf-8").strip().partition(" ")  # noqa: ASYNC240 -- a few bytes
    await asyncio.sleep(float(seconds))
    if text.startswith("bad"):
        raise OSError(errno.ENOEXEC, text)
    config = text


async def answer(connection: Connection) -> None:
    """Answer the lines of one client; the last answer ends the connection."""
    reader, writer = connection.streams()
    while await connection.idle():
        word, _, seconds = (await reader.readline()).decode().strip().partition(" ")
        if word == "hang":
            time.sleep(3600)  # noqa: ASYNC251 -- that is the point
        await asyncio.sleep(float(seconds or 0))
        writer.write(f"{config if word == 'config' else os.getpid()}\n".encode())
        if connection.closing:
            return


if __name__ == "__main__":
    serve(
        answer,
        on_reload=reload,
        drain_timeout=5.0,
        exit_on_idle=float(sys.argv[1]) if sys.argv[1:] else None,
    )
