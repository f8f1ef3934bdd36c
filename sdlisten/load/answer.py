"""One answer of HTTP/1.x, judged as its bytes arrive. Touches no socket."""

from __future__ import annotations

import re

__all__ = ("Answer",)

_START = b"HTTP/1."
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: .*)?")
_HEAD_LIMIT = 65536
_PID_DIGITS = 10


class Answer:
    """An answer to GET: with a Content-Length, or with a body that ends with the connection.

    Attributes:
        close: Whether the connection ends with this answer; known once it is whole.
    """

    __slots__ = ("_body_at", "_length", "_received", "close")

    def __init__(self) -> None:
        self.close = True
        self._received = bytearray()
        self._body_at = 0  # where the body begins; 0 until the head is whole
        self._length: int | None = None  # of the body; None: it ends with the connection

    def __len__(self) -> int:
        """Bytes received so far."""
        return len(self._received)

    def feed(self, data: bytes) -> bool:
        """Take what arrived, ``b""`` for EOF, and return whether the answer is whole.

        Raises:
            ValueError: It is not a good answer; the text says why.
        """
        self._received += data
        if not self._body_at:
            self._read_head()
        if not self._body_at:
            return False
        if self._length is None:
            return not data
        surplus = len(self._received) - self._body_at - self._length
        if surplus > 0:
            raise ValueError(f"{surplus} bytes more than its Content-Length of {self._length}")
        return surplus == 0

    def first_word(self) -> bytes:
        """Return the first word of the body, if it is not longer than a pid, else ``b""``."""
        words = self._received[self._body_at : self._body_at + _PID_DIGITS + 1].split(None, 1)
        return bytes(words[0]) if words and len(words[0]) <= _PID_DIGITS else b""

    def _read_head(self) -> None:
        received = self._received
        end = received.find(b"\r\n\r\n")
        if not received.startswith(_START[: len(received)]) or (end < 0 and len(received) > _HEAD_LIMIT):
            raise ValueError(f"not an answer of HTTP/1.x: {bytes(received[:60])!r}")
        if end < 0:
            return
        first, *lines = bytes(received[:end]).split(b"\r\n")
        status = _STATUS_LINE.fullmatch(first)
        if not status or not status[2].startswith(b"2"):
            raise ValueError(f"answered {first[:60]!r}")
        fields = {
            name.lower(): value.strip().lower() for name, _, value in (ln.partition(b":") for ln in lines)
        }
        if b"transfer-encoding" in fields:
            raise ValueError("a body in chunks, which is not read here: give the answer a Content-Length")
        length = fields.get(b"content-length", b"0" if status[2] == b"204" else None)
        if length is not None:
            if not length.isdigit():
                raise ValueError(f"answered with Content-Length {length[:60]!r}")
            self._length = int(length)
        options = fields.get(b"connection", b"")
        self.close = (
            length is None or b"close" in options or (status[1] == b"0" and b"keep-alive" not in options)
        )
        self._body_at = end + 4
