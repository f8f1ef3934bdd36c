"""The text of the four LISTEN_* variables, read and written: sd_listen_fds(3).

==================  =================================================================================
``LISTEN_FDS``      how many descriptors are passed, from 3 on
``LISTEN_PID``      for which process; nobody else may use them
``LISTEN_PIDFDID``  the same process by the inode of its pidfd, which is never used again (systemd 259)
``LISTEN_FDNAMES``  a name for each, separated by colons; without it all are called "unknown"
==================  =================================================================================

libsystemd reads numbers with strtol(3) (``" 1"``, ``"+1"``, ``"0x1"``, ``"010"``); no manager writes them so,
and here only plain decimal numbers pass. As in libsystemd, a backslash in a name quotes the next character.
Nothing here knows this process, its descriptors or ``os.environ``.
"""

from __future__ import annotations

from sdlisten.errors import ListenEnvironmentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = (
    "LISTEN_FDS_START",
    "VARIABLES",
    "ListenEnvironment",
    "check_name",
    "read_listen_environment",
    "write_listen_environment",
)

LISTEN_FDS_START = 3
VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES")

_FDNAME_MAX = 255  # FDNAME_MAX of systemd
_INT_MAX = 2**31 - 1
_UINT64_MAX = 2**64 - 1


class ListenEnvironment:
    """What the four variables say.

    Attributes:
        count: How many descriptors are passed to us, from LISTEN_FDS_START on.
        absent: If ``count`` is 0, the reason in words, such as ``"LISTEN_FDS is not set"``; else "".
    """

    __slots__ = ("_names", "absent", "count")

    def __init__(self, count: int, names: Sequence[str] | None, absent: str = "") -> None:
        self.count = count
        self.absent = absent
        self._names = names

    def name(self, fd: int) -> str:
        """Return the FileDescriptorName of a passed descriptor, "unknown" if the manager gave none."""
        return "unknown" if self._names is None else self._names[fd - LISTEN_FDS_START]


def read_listen_environment(
    environ: Mapping[str, str], *, pid: int, pidfdid: int | None = None
) -> ListenEnvironment:
    """Read what the manager says it passed to a process.

    Args:
        environ: The environment; it is not changed.
        pid: The process that asks.
        pidfdid: The inode of its pidfd, or None where inodes of pidfds identify nothing (Linux before 6.9).

    Raises:
        ListenEnvironmentError: A variable has a value that sd_listen_fds(3) forbids, or LISTEN_FDNAMES is
            there alone, which means that somebody in this process has read the rest before us.
    """
    found = environ.get("LISTEN_PID")
    fds = environ.get("LISTEN_FDS")
    if found is None:
        return _without_pid(environ, fds, pidfdid)
    for_pid = _number("LISTEN_PID", found, 1, _INT_MAX)
    if fds is None:
        return ListenEnvironment(0, None, f"LISTEN_FDS is not set, only LISTEN_PID={found}")
    if for_pid != pid:
        absent = (
            f"LISTEN_FDS={fds} is meant for pid {found}, this is {pid}: a wrapper started us without exec"
        )
        return ListenEnvironment(0, None, absent)
    for_pidfdid = environ.get("LISTEN_PIDFDID")
    if for_pidfdid is not None:
        number = _number("LISTEN_PIDFDID", for_pidfdid, 0, _UINT64_MAX)
        if pidfdid is not None and number != pidfdid:
            absent = f"LISTEN_PIDFDID={number} is meant for another process with our pid; ours is {pidfdid}"
            return ListenEnvironment(0, None, absent)
    count = _number("LISTEN_FDS", fds, 1, _INT_MAX - LISTEN_FDS_START)
    return ListenEnvironment(count, _names(environ.get("LISTEN_FDNAMES"), count))


def write_listen_environment(names: Sequence[str], *, pid: int, pidfdid: int | None = None) -> dict[str, str]:
    """Write the variables for a process that finds one descriptor for each name, from 3 on.

    Args:
        names: Names in the order of the descriptors; they may be empty or equal.
        pid: The process that will read them.
        pidfdid: The inode of its pidfd, or None to leave the variable out.

    Returns:
        The variables; none of them if there are no names, as managers do.

    Raises:
        ListenEnvironmentError: A name is not allowed, see `check_name`.
    """
    if not names:
        return {}
    for name in names:
        check_name(name)
    environ = {
        "LISTEN_FDS": str(len(names)),
        "LISTEN_PID": str(pid),
        "LISTEN_FDNAMES": ":".join(name.replace("\\", "\\\\") for name in names),
    }
    if pidfdid is not None:
        environ["LISTEN_PIDFDID"] = str(pidfdid)
    return environ


def check_name(name: str) -> None:
    """Check a FileDescriptorName: at most 255 printable ASCII characters, no colon; "" is allowed.

    Raises:
        ListenEnvironmentError: It is not one.
    """
    if len(name) > _FDNAME_MAX or any(
        not " " <= character < "\x7f" or character == ":" for character in name
    ):
        text = (
            f"{name!r} cannot be a FileDescriptorName: expected at most {_FDNAME_MAX} ASCII characters, "
            f"no control characters, no ':'"
        )
        raise ListenEnvironmentError(text, variable="LISTEN_FDNAMES", value=name)


def _without_pid(environ: Mapping[str, str], fds: str | None, pidfdid: int | None) -> ListenEnvironment:
    if fds is not None:
        return ListenEnvironment(0, None, f"LISTEN_FDS={fds} came without LISTEN_PID")
    left_behind = pidfdid is not None and environ.get("LISTEN_PIDFDID") == str(pidfdid)
    names = environ.get("LISTEN_FDNAMES")
    if names is None and not left_behind:
        return ListenEnvironment(0, None, "LISTEN_FDS is not set")
    variable, value = ("LISTEN_PIDFDID", str(pidfdid)) if names is None else ("LISTEN_FDNAMES", names)
    text = (
        f"{variable}={value} is set, but LISTEN_FDS and LISTEN_PID are gone: other code in this process has "
        f"read them already (importing twisted.internet.endpoints does). Call sdlisten before that code."
    )
    raise ListenEnvironmentError(text, variable=variable, value=value)


def _number(variable: str, value: str, lowest: int, highest: int) -> int:
    plain = value.isascii() and value.isdigit() and len(value) <= len(str(highest))
    if not plain or not lowest <= int(value) <= highest or value != str(int(value)):
        text = f"{variable}={value!r}: expected a decimal number from {lowest} to {highest}"
        raise ListenEnvironmentError(text, variable=variable, value=value)
    return int(value)


def _names(value: str | None, count: int) -> list[str] | None:
    if value is None:
        return None
    names = _split(value)
    if len(names) != count:
        text = f"LISTEN_FDNAMES={value!r} has {len(names)} names, but LISTEN_FDS={count}"
        raise ListenEnvironmentError(text, variable="LISTEN_FDNAMES", value=value)
    return names


def _split(value: str) -> list[str]:
    """Split at colons; a backslash quotes the next character, as in extract_first_word() of systemd."""
    if "\\" not in value:
        return value.split(":")
    names = [""]
    characters = iter(value)
    for character in characters:
        if character == ":":
            names.append("")
        elif character == "\\":
            quoted = next(characters, None)
            if quoted is None:
                text = f"LISTEN_FDNAMES={value!r} ends in a backslash that quotes nothing"
                raise ListenEnvironmentError(text, variable="LISTEN_FDNAMES", value=value)
            names[-1] += quoted
        else:
            names[-1] += character
    return names
