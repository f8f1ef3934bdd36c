"""The environment of the children: ours without what was meant for us alone, the --env-file, what we add."""

from __future__ import annotations

import os

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
        EnvFileError: A line is no assignment.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return parse_env_file(os.fsdecode(file.read()).splitlines(), path)


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
