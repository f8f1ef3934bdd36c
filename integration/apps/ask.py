"""Connect to all that the arguments name, then read what each says: one JSON object, of argument to text.

``ask.py 127.0.0.1:80 [::1]:80 /path @abstract seqpacket:/path``; an error is an answer, too. Before that, it
sends a word to each ``datagram:127.0.0.1:53`` and ``fifo:/path``. ``--http`` in front: it sends a request.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

SECONDS = 15.0
TYPES = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET, "datagram": socket.SOCK_DGRAM}


def connect(word: str) -> socket.socket:
    """Connect a socket of the kind that the word begins with, of a stream if it names none."""
    kind, _, address = word.partition(":")
    if kind not in TYPES:
        kind, address = "stream", word
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET if host else socket.AF_UNIX
    sock = socket.socket(family, TYPES[kind])
    sock.settimeout(SECONDS)
    sock.connect((host.strip("[]"), int(port)) if host else address.replace("@", "\0", 1))
    return sock


def send(word: str) -> None:
    """Send a word to what cannot be connected to."""
    if word.startswith("fifo:"):
        Path(word.removeprefix("fifo:")).write_text("word", encoding="ascii")
    else:
        with connect(word) as sock:
            sock.send(b"word")


def read(sock: socket.socket) -> str:
    """Read until the other side closes."""
    return b"".join(iter(lambda: sock.recv(65536), b"")).decode()


def main() -> None:
    """Send, connect, read."""
    http = sys.argv[1:2] == ["--http"]
    words = sys.argv[1 + http :]
    told = [word for word in words if word.startswith(("fifo:", "datagram:"))]
    for word in told:
        send(word)
    sockets: dict[str, socket.socket] = {}
    answers: dict[str, str] = {}
    for word in words:
        if word not in told:
            try:
                sockets[word] = connect(word)
                sockets[word].sendall(b"GET / HTTP/1.0\r\n\r\n" if http else b"")
            except OSError as error:
                answers[word] = repr(error)
    for word, sock in sockets.items():
        with sock:
            try:
                answers[word] = read(sock)
            except OSError as error:
                answers[word] = repr(error)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
