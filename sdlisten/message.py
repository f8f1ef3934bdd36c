"""The text of sd_notify(3), read and written. Pure: no kernel, no clock.

A message is one datagram of lines ``NAME=VALUE``. The fields are those of sd_notify(3) up to systemd 262; the
limits that the page leaves out are what its manager does with a message (src/core/service.c, manager.c and
src/shared/notify-recv.c of systemd). ``X_NAME=`` is for fields of one's own.

=======================  ============================  ===================================================
field                    value                         needs, in the same message
=======================  ============================  ===================================================
READY                    1
RELOADING                1                             MONOTONIC_USEC, where the unit is Type=notify-reload
STOPPING                 1
MONOTONIC_USEC           CLOCK_MONOTONIC in µs
STATUS                   one line of text
ERRNO                    0 to 4095; 0 clears
BUSERROR, VARLINKERROR   a dotted name; "" clears
EXIT_STATUS              0 to 255
NOTIFYACCESS             none, main, exec, all
MAINPID                  a process
MAINPIDFDID              the inode of its pidfd        MAINPID
MAINPIDFD                1                             exactly one descriptor
WATCHDOG                 1, trigger
WATCHDOG_USEC            µs
EXTEND_TIMEOUT_USEC      µs
RESTART_RESET            1
FDSTORE                  1                             descriptors
FDSTOREREMOVE            1                             FDNAME
FDNAME                   see `check_fdname`            FDSTORE or FDSTOREREMOVE
FDPOLL                   0                             FDSTORE
BARRIER                  1                             exactly one descriptor, and nothing else
=======================  ============================  ===================================================
"""

from __future__ import annotations

from sdlisten.errors import MessageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = (
    "FDNAME_MAX",
    "FDS_MAX",
    "MESSAGE_MAX",
    "STATUS_MAX",
    "assignment",
    "check_fdname",
    "decode_message",
    "encode_message",
    "value_of",
)

MESSAGE_MAX = 4096
"""Bytes in a message: systemd reads NOTIFY_BUFFER_MAX = PIPE_BUF of them and drops a longer message whole."""

FDS_MAX = 253
"""Descriptors beside one message: SCM_MAX_FD of the kernel, unix(7)."""

FDNAME_MAX = 255
"""Characters in FDNAME=; systemd calls what has a longer or otherwise invalid name "stored", silently."""

STATUS_MAX = 2048
"""Bytes of STATUS= that we send, so that a long text does not cost the fields beside it; the rest is cut."""

_CHOICES = {
    "READY": ("1",),
    "RELOADING": ("1",),
    "STOPPING": ("1",),
    "NOTIFYACCESS": ("none", "main", "exec", "all"),
    "MAINPIDFD": ("1",),
    "WATCHDOG": ("1", "trigger"),
    "RESTART_RESET": ("1",),
    "FDSTORE": ("1",),
    "FDSTOREREMOVE": ("1",),
    "FDPOLL": ("0",),
    "BARRIER": ("1",),
}
_USEC_MAX = 2**64 - 2  # 2**64 - 1 is USEC_INFINITY: not set
_RANGES = {
    "MONOTONIC_USEC": (0, _USEC_MAX),
    "ERRNO": (0, 4095),  # ERRNO_MAX of the kernel
    "EXIT_STATUS": (0, 255),
    "MAINPID": (1, 2**31 - 1),
    "MAINPIDFDID": (1, 2**64 - 1),
    "WATCHDOG_USEC": (0, _USEC_MAX),
    "EXTEND_TIMEOUT_USEC": (0, _USEC_MAX),
}
_DOTTED = ("BUSERROR", "VARLINKERROR")
_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_BREAKS = ("\n", "\r", "\0")  # NEWLINE of systemd is both, and a NUL makes it drop the message
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What a message asks of the rest of it: of the first, if it is there, at least one of the second.
_COMPANIONS = (
    ("MAINPIDFDID", ("MAINPID",)),
    ("FDSTOREREMOVE", ("FDNAME",)),
    ("FDNAME", ("FDSTORE", "FDSTOREREMOVE")),
    ("FDPOLL", ("FDSTORE",)),
)


def assignment(name: str, value: int | str) -> str:
    r"""Write one field.

    In STATUS, control characters and what systemd does not take for UTF-8 are replaced, and more than
    STATUS_MAX bytes are cut: a status may quote anything. All else is refused, not mended.

    Args:
        name: The field, such as ``"STATUS"`` or ``"X_MINE"``.
        value: Its value; numbers as int or in plain decimal.

    Returns:
        The line ``NAME=VALUE`` without its end.

    Raises:
        MessageError: There is no such field, or the value is none for it.
    """
    return f"{name}={value_of(name, str(value))}"


def value_of(name: str, text: str) -> int | str:
    """Read the value of one field: an int for the numbers, else a string.

    Raises:
        MessageError: There is no such field, or this is no value for it.
    """
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise _not_a_value(name, text, " or ".join(_CHOICES[name]))
        return text
    if name in _RANGES:
        return _number(name, text)
    if name == "STATUS":
        return _one_line(text)
    if name == "FDNAME":
        check_fdname(text)
    elif name in _DOTTED:
        if text and not _is_dotted(text):
            raise _not_a_value(name, text, "a dotted name such as org.example.Error.Failed, or nothing")
    elif not _is_vendor(name):
        raise MessageError(
            f"{name!r} is no field of sd_notify(3); own ones begin with X_", field=name, value=text
        )
    elif any(character in text for character in _BREAKS) or not _is_utf8(text):
        raise _not_a_value(name, text, "one line of UTF-8")
    return text


def check_fdname(name: str) -> None:
    """Check a name for the descriptor store: at most 255 ASCII characters, no control characters, no ``:``.

    Raises:
        MessageError: It is not one.
    """
    if len(name) > FDNAME_MAX or not name.isascii() or not name.isprintable() or ":" in name:
        wanted = f"at most {FDNAME_MAX} ASCII characters, no control characters, no ':'"
        raise _not_a_value("FDNAME", name, wanted)


def encode_message(*assignments: str, fd_count: int = 0) -> bytes:
    """Write a message.

    Args:
        assignments: Its fields as ``NAME=VALUE``; each is checked as in `assignment`.
        fd_count: How many descriptors will go with it.

    Raises:
        MessageError: A field is invalid or given twice, a field that it needs is missing, the descriptors do
            not fit the fields, or the message is longer than MESSAGE_MAX.
    """
    fields: dict[str, str] = {}
    for line in assignments:
        name, equals, value = line.partition("=")
        if not equals:
            raise MessageError(f"{line!r} is no assignment; expected NAME=VALUE", value=line)
        if name in fields:
            raise MessageError(
                f"{name}= twice in a message: systemd reads the first", field=name, value=value
            )
        fields[name] = assignment(name, value)
    if not fields:
        raise MessageError("a message without a field; expected at least one NAME=VALUE")
    for name, companions in _COMPANIONS:
        if name in fields and not any(companion in fields for companion in companions):
            raise MessageError(f"{name}= needs {'= or '.join(companions)}= in the same message", field=name)
    _check_descriptors(fields, fd_count)
    data = "\n".join(fields.values()).encode()
    if len(data) > MESSAGE_MAX:
        raise MessageError(f"a message of {len(data)} bytes; systemd drops what is longer than {MESSAGE_MAX}")
    return data


def decode_message(data: bytes) -> dict[str, str]:
    """Read a message as a manager does: what it does not know is kept, what is no assignment is skipped.

    Of a name given twice the first counts, and bytes that are no UTF-8 become U+FFFD.

    Args:
        data: One whole datagram; one NUL may end it.

    Returns:
        Name to value in the order of the message; values are as they came: see `value_of`.

    Raises:
        MessageError: The datagram is empty, too long, holds a NUL, or holds no assignment.
    """
    if not data or len(data) > MESSAGE_MAX:
        raise MessageError(f"a message of {len(data)} bytes; expected 1 to {MESSAGE_MAX}")
    if b"\0" in data[:-1]:
        raise MessageError(f"a NUL inside the message {data[:80]!r}; expected lines NAME=VALUE")
    fields: dict[str, str] = {}
    for line in data.removesuffix(b"\0").decode(errors="replace").replace("\r", "\n").split("\n"):
        name, equals, value = line.partition("=")
        if name and equals:
            fields.setdefault(name, value)
    if not fields:
        raise MessageError(f"no assignment in the message {data[:80]!r}; expected lines NAME=VALUE")
    return fields


def _check_descriptors(fields: Mapping[str, str], count: int) -> None:
    if count > FDS_MAX:
        raise MessageError(f"{count} descriptors with one message; the kernel takes at most {FDS_MAX}")
    if "BARRIER" in fields and len(fields) > 1:
        raise MessageError("BARRIER=1 goes alone: systemd would ignore the fields beside it", field="BARRIER")
    for name in ("BARRIER", "MAINPIDFD"):
        if name in fields and count != 1:
            raise MessageError(f"{name}=1 with {count} descriptors; expected exactly one", field=name)
    if "FDSTORE" in fields and not count:
        raise MessageError("FDSTORE=1 without a descriptor to store", field="FDSTORE")
    if "FDSTORE" in fields and "FDSTOREREMOVE" in fields:
        raise MessageError("FDSTORE=1 beside FDSTOREREMOVE=1: systemd would only remove", field="FDSTORE")
    takers = ("FDSTORE", "BARRIER", "MAINPIDFD")
    if count and not any(name in takers or _is_vendor(name) for name in fields):
        raise MessageError(f"{count} descriptors that no field takes; expected FDSTORE=1 beside them")


def _number(name: str, text: str) -> int:
    """Read plain decimal, the one form that every reader of numbers agrees on."""
    lowest, highest = _RANGES[name]
    # 20 digits hold 2**64; int() of thousands of them raises its own ValueError.
    if text.isascii() and text.isdigit() and len(text) <= 20 and lowest <= int(text) <= highest:  # noqa: PLR2004
        return int(text)
    raise _not_a_value(name, text, f"a decimal number from {lowest} to {highest}")


def _one_line(text: str) -> str:
    """Make any text a STATUS that systemd shows: it ignores the whole of one that it finds invalid."""
    if not text.isprintable():
        text = "".join(map(_printed, text))
    data = text.encode()
    if len(data) <= STATUS_MAX:
        return text
    ellipsis = "…"
    return data[: STATUS_MAX - len(ellipsis.encode())].decode(errors="ignore") + ellipsis


def _printed(character: str) -> str:
    code = ord(character)
    if character in "\t\n\r\v\f\x85\u2028\u2029":
        return " "
    # C0, DEL and C1; then what unichar_is_valid() of systemd refuses: surrogates and noncharacters.
    control = code < 0x20 or 0x7F <= code <= 0x9F  # noqa: PLR2004 - the ranges are their own names
    if control or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:  # noqa: PLR2004
        return _REPLACEMENT
    return character


def _is_dotted(text: str) -> bool:
    """Tell the name of a D-Bus or Varlink error; the latter may have ``-`` in it."""
    parts = text.replace("-", "_").split(".")
    return len(parts) > 1 and all(part and _NAME_CHARACTERS.issuperset(part) for part in parts)


def _is_vendor(name: str) -> bool:
    return name.startswith("X_") and len(name) > len("X_") and _NAME_CHARACTERS.issuperset(name)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_a_value(name: str, value: str, wanted: str) -> MessageError:
    return MessageError(f"{name}={value!r}: expected {wanted}", field=name, value=value)
