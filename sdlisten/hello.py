"""A daemon to try things with: ``python -m sdlisten.hello [-l [NAME=]ADDRESS]…``.

HTTP/1.1 on whatever was passed, else on what ``-l`` says, else on ``http=127.0.0.1:8080``. The first word of
each body is the pid that answered. GET and HEAD, keep-alive, pipelining; while it stops, each answer says
``Connection: close``. ``HELLO_START_DELAY`` seconds of sleep stand for a slow import.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time

from sdlisten import ActivationError, AddressError, Listeners, NotActivatedError, Service
from sdlisten.notifier import Notifier
from sdlisten.service import run, set_up_logging, take_sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from sdlisten import Connection, Listener
    from sdlisten.service import Reader, Writer

__all__ = ("Request", "RequestError", "main", "parse_request", "serve_http")

_DEFAULT = "http=127.0.0.1:8080"
_HEAD_LIMIT = 8192  # bytes
_HEAD_TIMEOUT = 10.0  # seconds from the first byte of a request to the end of its head
_LINGER = 2.0  # seconds for a client that sends a body nobody reads

# RFC 9112: 3 Request Line, 5 Field Syntax; RFC 9110: 5.6.2 Tokens.
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/1\.([0-9])" % _TOKEN)
_FIELD = re.compile(rb"(%b):[ \t]*([ \t!-~\x80-\xff]*?)[ \t]*" % _TOKEN)


class RequestError(Exception):
    """A request that is answered with an error, after which the connection ends."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Request:
    """What matters here of a request.

    Attributes:
        head: Whether the answer is to have no body.
        close: Whether the client wants the connection to end with the answer.
    """

    def __init__(self, *, head: bool, close: bool) -> None:
        self.head = head
        self.close = close


def parse_request(data: bytes) -> Request:
    """Read the head of a request, up to and including the empty line.

    Raises:
        RequestError: It is none, or has a body, or another method than GET and HEAD.
    """
    first, *lines = data[:-4].lstrip(b"\r\n").split(b"\r\n")
    start = _REQUEST_LINE.fullmatch(first)
    found = [_FIELD.fullmatch(line) for line in lines]
    if start is None or None in found:
        raise RequestError("400 Bad Request")
    fields: dict[bytes, bytes] = {}
    for field in found:
        if field is not None:
            name = field[1].lower()
            fields[name] = fields[name] + b"," + field[2].lower() if name in fields else field[2].lower()
    method, _, minor = start.groups()
    length = fields.get(b"content-length", b"0")
    if not length.isdigit() or (minor != b"0" and fields.get(b"host", b",").count(b",")):
        raise RequestError("400 Bad Request")
    if length.strip(b"0") or b"transfer-encoding" in fields:
        raise RequestError("413 Content Too Large")
    if method not in {b"GET", b"HEAD"}:
        raise RequestError("405 Method Not Allowed")
    options = [option.strip() for option in fields.get(b"connection", b"").split(b",")]
    close = b"close" in options or (minor == b"0" and b"keep-alive" not in options)
    return Request(head=method == b"HEAD", close=close)


async def serve_http(connection: Connection) -> None:
    """Answer the requests of one connection."""
    reader, writer = connection.streams(limit=_HEAD_LIMIT)
    while await connection.idle():
        try:
            request = parse_request(await _read_head(reader))
        except RequestError as error:
            await _refuse(error.status, reader, writer)
            return
        close = request.close or connection.closing
        body = f"{os.getpid()} says hello\n".encode()
        writer.write(_head("200 OK", len(body), close=close) + (b"" if request.head else body))
        await writer.drain()
        if close:
            return


async def _read_head(reader: Reader) -> bytes:
    try:
        async with asyncio.timeout(_HEAD_TIMEOUT):
            return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise RequestError("431 Request Header Fields Too Large") from None
    except TimeoutError:
        raise RequestError("408 Request Timeout") from None


async def _refuse(status: str, reader: Reader, writer: Writer) -> None:
    """Answer with an error, and take what the client is sending all the same, so that it reads our answer."""
    body = f"{os.getpid()} says {status}\n".encode()
    writer.write(_head(status, len(body), close=True) + body)
    writer.close()
    try:
        async with asyncio.timeout(_LINGER):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        pass


def _head(status: str, length: int, *, close: bool) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: text/plain", f"Content-Length: {length}"]
    if status.startswith("405"):
        lines.append("Allow: GET, HEAD")
    lines.append(f"Connection: {'close' if close else 'keep-alive'}")
    return "\r\n".join([*lines, "", ""]).encode()


def _describe(listener: Listener) -> str:
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


def _take(words: list[str]) -> Listeners | socket.socket:
    """Adopt or bind what ``-l`` says; without it, adopt all that was passed, or bind the default."""
    try:
        return take_sockets(words)
    except NotActivatedError:
        if words or os.environ.get("SDLISTEN_REQUIRE") == "1":
            raise
        return take_sockets([_DEFAULT])


def main() -> int:
    """Run the daemon; returns 0, or 78 (EX_CONFIG) if it cannot have its sockets."""
    parser = argparse.ArgumentParser(
        prog="python -m sdlisten.hello", description="A daemon to try things with."
    )
    parser.add_argument("-l", "--listen", metavar="[NAME=]ADDRESS", action="append", default=[])
    parser.add_argument("--drain-timeout", metavar="S", type=float, default=8.0, help="seconds (8)")
    arguments = parser.parse_args()
    set_up_logging()
    time.sleep(float(os.environ.get("HELLO_START_DELAY", "0")))
    try:
        taken = _take(arguments.listen)
    except (ActivationError, AddressError) as error:
        print(f"hello: {error}", file=sys.stderr)
        return 78
    service = Service(
        drain_timeout=arguments.drain_timeout, notifier=Notifier.from_environ(unset_environment=True)
    )
    if isinstance(taken, Listeners):
        for listener in taken:
            print(_describe(listener), file=sys.stderr, flush=True)
        service.attach(taken, serve_http)
    else:
        service.attach_connection(taken, serve_http)
    run(service)
    return 0


if __name__ == "__main__":
    sys.exit(main())
