"""A WSGI application that tells who answered: the pid, and the generation in a field of its own."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ("application",)

time.sleep(float(os.environ.get("START_DELAY", "0")))  # stands for a slow import


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a request."""
    del environ
    body = b"%d\n" % os.getpid()
    fields = {
        "Content-Type": "text/plain",
        "Content-Length": str(len(body)),
        "Generation": os.environ.get("SDLISTEN_GENERATION", "0"),
    }
    start_response("200 OK", list(fields.items()))
    return [body]
