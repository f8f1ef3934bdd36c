"""The text of sd_notify(3), read and written. Pure: no kernel, no clock.

A message is a datagram of lines ``NAME=VALUE``. The facts follow sd_notify(3) of systemd 262 and what its
manager does with a message (src/core/service.c, src/shared/notify-recv.c).
"""

from __future__ import annotations

from sdlisten.errors import SdlistenError

__all__ = ("FDS_MAX", "MESSAGE_MAX", "MessageError", "decode_message")

MESSAGE_MAX = 4096
"""Bytes in a message: systemd reads NOTIFY_BUFFER_MAX = PIPE_BUF bytes and ignores a longer message whole."""

FDS_MAX = 253
"""Descriptors beside one message: SCM_MAX_FD of the kernel, see unix(7)."""


class MessageError(SdlistenError, ValueError):
    """A text, or what arrived in its place, is no message of sd_notify(3)."""


def decode_message(data: bytes) -> dict[str, str]:
    """Read a message into its assignments, as a manager does.

    Lines that are no assignment are skipped and of a name given twice the first counts, as in systemd.

    Args:
        data: One whole datagram; one NUL may end it.

    Returns:
        Name to value, unchecked, in the order of the message.

    Raises:
        MessageError: The datagram is empty, too long, holds a NUL, or holds no assignment.
    """
    if not data or len(data) > MESSAGE_MAX:
        raise MessageError(f"a message of {len(data)} bytes; expected 1 to {MESSAGE_MAX} (NOTIFY_BUFFER_MAX)")
    if b"\0" in data[:-1]:
        raise MessageError(f"a NUL inside the message {data[:80]!r}; expected lines NAME=VALUE")
    assignments: dict[str, str] = {}
    for line in data.removesuffix(b"\0").decode("utf-8", "replace").split("\n"):
        name, equals, value = line.rstrip("\r").partition("=")
        if name and equals:
            assignments.setdefault(name, value)
    if not assignments:
        raise MessageError(f"no assignment in the message {data[:80]!r}; expected lines NAME=VALUE")
    return assignments
