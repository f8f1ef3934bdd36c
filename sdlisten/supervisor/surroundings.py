"""The environment of the children: ours without what was meant for us alone, the --env-file, what we add."""

from __future__ import annotations

import os
import stat

from sdlisten.errors import SdlistenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ("EnvFileError", "inherited_environ", "parse_env_file", "read_env_file")

# What a manager says to its own child, systemd.exec(5). What we say to ours has these names, or SDLISTEN_*.
_OURS = (
    "FDSTORE",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "MAINPID",
    "NOTIFY_SOCKET",
    "SDLISTEN_CONTROL",
    "SDLISTEN_FDSTORE",
    "SDLISTEN_GENERATION",
    "SDLISTEN_LIFELINE_FD",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


class EnvFileError(SdlistenError, ValueError):
    """A line of an environment file is no assignment."""


def inherited_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what children inherit of an environment."""
    return {name: value for name, value in environ.items() if name not in _OURS}


def read_env_file(path: str) -> dict[str, str]:
    """Read an environment file.

    Raises:
        EnvFileError: A line is no assignment, or it is a FIFO, which can be read once and be waited for.
        OSError: It cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise EnvFileError(f"{path} is a FIFO: expected a file, which is read again at each roll")
        # As bytes: str.splitlines() knows ends of lines that are parts of values, such as U+2028.
        return parse_env_file(map(os.fsdecode, file.read().splitlines()), path)


def parse_env_file(lines: Iterable[str], path: str) -> dict[str, str]:
    """Read the lines of an environment file: ``NAME=VALUE``, ``#`` comments, nothing.

    As in systemd's EnvironmentFile= a value may stand in one pair of quotes, which do not belong to it. There
    is no other syntax: no escapes, no continuation, no expansion.

    Raises:
        EnvFileError: A line is none of these.
    """
    environ = {}
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word[0] in "#;":
            continue
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or "\0" in value:
            raise EnvFileError(f"{path}:{number}: {word!r} is no assignment; expected NAME=VALUE")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        environ[name] = value
    return environ
