"""Words in, exit code out: the ``sdlisten`` command.

Exit codes: `sdlisten.exit_codes`. Commands are imported when they run, so that none carries another along.
"""

from __future__ import annotations

import argparse
import os
import sys

from sdlisten import __version__
from sdlisten.exit_codes import USAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("main",)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: The command and its arguments; those of the process if None.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if words is None else list(words)
    # argparse would take the options of the program for ours.
    if words[:1] == ["exec"]:
        return _exec(words[1:])
    if words[:1] in (["run"], ["ctl"]):
        from sdlisten.supervisor.words import ctl_command, run_command  # noqa: PLC0415 - see above

        return (run_command if words[0] == "run" else ctl_command)(words[1:])
    parser = argparse.ArgumentParser(
        prog="sdlisten", description="Adopt the sockets systemd passes, or bind them."
    )
    parser.add_argument("--version", action="version", version=f"sdlisten {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="show the main job on real sockets")
    commands.add_parser("run", help="run … -- COMMAND …: hold sockets, and roll generations of COMMAND")
    commands.add_parser("ctl", help="ctl roll|stop|status: ask what run runs")
    commands.add_parser("exec", help="exec -- COMMAND …: pass LISTEN_* on to COMMAND with its own pid")
    load = commands.add_parser("load", help="send requests to a server and count what is lost")
    if words[:1] == ["load"]:
        from sdlisten.load import add_arguments  # noqa: PLC0415 - see above

        add_arguments(load)
    arguments = parser.parse_args(words)
    if arguments.command == "load":
        from sdlisten.load import run as run_load  # noqa: PLC0415 - see above

        return run_load(arguments)
    from sdlisten.demo import run  # noqa: PLC0415 - see above

    return run()


def _exec(words: Sequence[str]) -> int:
    """Become a program, with LISTEN_PID and LISTEN_PIDFDID rewritten to this process.

    For wrappers that were started with the sockets and start the real program as a child, such as an
    entrypoint that runs ``sh -c``: put ``sdlisten exec --`` before that program.
    """
    command = words[1:] if words[:1] == ["--"] else words
    if not command or command[0].startswith("-"):
        print("usage: sdlisten exec -- COMMAND [ARGUMENT …]", file=sys.stderr)
        return 0 if command[:1] in (["-h"], ["--help"]) else USAGE
    from sdlisten import exec_shim  # noqa: PLC0415 - see above

    exec_shim.reset_signals()
    environ = dict(os.environb)
    if b"LISTEN_FDS" in environ:
        exec_shim.stamp(environ, os.getpid(), exec_shim.pidfdid())
    return exec_shim.execute([os.fsencode(word) for word in command], environ)
