"""The command lines of ``sdlisten run`` and ``sdlisten ctl``: words in, exit code out.

Only commands that end import this: it brings argparse along.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys

from sdlisten.supervisor import ctl
from sdlisten.supervisor.loop import SIGNALS
from sdlisten.supervisor.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ("ctl_command", "run_command")

_NICE_MAX = 19


def run_command(words: Sequence[str], *, execv: Callable[[str, list[str]], object] = os.execv) -> int:
    """Become the supervisor that the words describe.

    Args:
        words: What follows ``sdlisten run``.
        execv: What replaces the process.

    Returns:
        Never, unless it cannot be executed: then `execv` raises.
    """
    words, command = _split(words)
    parser = _run_parser()
    options = Options()
    # Beside a generation it is the socket of the supervisor that started us, for its workers to ask.
    if "SDLISTEN_GENERATION" not in os.environ:
        options.control = os.environ.get("SDLISTEN_CONTROL", "")
    parser.parse_args(words, namespace=options)
    if not command:
        parser.error("what shall run? Expected -- COMMAND at the end")
    options.command = command
    # Until it has its handlers, an order waits: the mask outlives exec, and so does what is pending.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    execv(sys.executable, [sys.executable, *_flags(), "-m", "sdlisten.supervisor", *options.to_words()])
    return 0


def ctl_command(words: Sequence[str]) -> int:
    """Ask a running supervisor.

    Args:
        words: What follows ``sdlisten ctl``.

    Returns:
        The exit code: 0 done; 1 it does not serve (status); 2 wrong question; 3 roll refused; 4 timed out;
        5 no supervisor.
    """
    words, command = _split(words)
    parser = _ctl_parser()
    asked = parser.parse_args(words)
    if command and asked.do != "roll":
        parser.error(f"{asked.do} takes no command")
    if not asked.control:
        parser.error("where is it? Expected --control PATH, or SDLISTEN_CONTROL in the environment")
    question: dict[str, object] = {"do": asked.do, "wait": asked.wait}
    if command:
        question["command"] = command
    answer = ctl.ask_as_command(asked.control, question, timeout=asked.timeout)
    if asked.json:
        print(json.dumps(answer.get("status", answer)))
    else:
        _show(answer)
    code = answer["code"]
    assert isinstance(code, int)  # noqa: S101 - `ask` has looked
    return code


def _flags() -> list[str]:
    """Let the image that stays look for modules where this one has found them."""
    if sys.flags.isolated:
        return ["-I"]
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # -m puts the current directory first, for `python -m sdlisten` in a checkout. Elsewhere it would import
    # any socket.py that lies about.
    in_checkout = not sys.flags.safe_path and os.path.realpath(sys.path[0] or ".") == home == os.getcwd()
    return [] if in_checkout else ["-P"]


def _show(answer: ctl.Answer) -> None:
    out = sys.stderr if answer["code"] else sys.stdout
    text = str(answer["text"])
    if answer.get("stderr"):
        text += f"\nIt wrote last:\n{answer['stderr']}"
    # Commands and paths may be no UTF-8, and a stdout that is strict takes nothing else.
    encoding = out.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=out)


def _split(words: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """Part our words from those of the program, which argparse would mix up."""
    if "--" not in words:
        return words, []
    end = words.index("--")
    return words[:end], list(words[end + 1 :])


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlisten run",
        usage="sdlisten run [-l [NAME=]ADDRESS]… [OPTION]… -- COMMAND …",
        description="Hold sockets, and roll generations of a program: the new one ready first.",
        epilog="Signals: HUP rolls; TERM, INT and QUIT drain and stop; USR1 writes the status to stderr.",
    )
    add = parser.add_argument
    add(
        "-l", "--listen", metavar="[NAME=]ADDRESS", action="append",
        help="adopt or bind this; without any, all that was passed is passed on",
    )  # fmt: skip
    add("--workers", type=_count, metavar="N", help="processes in a generation (1)")
    add(
        "--ready", dest="guess", type=_ready, metavar="notify|SECONDS",
        help="ready when it says READY=1 (notify), or SECONDS after its start, a guess",
    )  # fmt: skip
    add("--ready-timeout", type=_seconds, metavar="S", help="to become ready in (60)")
    add("--drain-timeout", type=_seconds, metavar="S", help="to end in; a second later it is killed (8)")
    add(
        "--soak",
        type=_seconds,
        metavar="S",
        help="both generations accept that long, the new one on trial (0)",
    )
    add("--stop-delay", type=_seconds, metavar="S", help="serve on that long after the order to stop (0)")
    add("--control", metavar="PATH", help="socket for sdlisten ctl ($SDLISTEN_CONTROL)")
    add("--env-file", metavar="F", help="NAME=VALUE lines for the program, read again at each roll")
    add("--pid-file", metavar="F", help="write the pid of the supervisor there")
    add("--nice-start", type=_nice, metavar="N", help="start workers N nicer, until they are ready")
    add("--non-blocking", action="store_true", help="pass listeners with O_NONBLOCK")
    add(
        "--watchdog",
        type=_pulse,
        metavar="S",
        help="kill and replace a worker that stops sending WATCHDOG=1",
    )
    add("--stop-signal", type=_signal, metavar="NAME", help="what tells the program to drain (TERM)")
    return parser


def _ctl_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlisten ctl",
        usage="sdlisten ctl [--control PATH] roll|stop|status [--wait] [--timeout S] [--json] [-- COMMAND …]",
        description="Ask a supervisor.",
        epilog="Exit codes: 0 done, 1 not serving, 2 usage, 3 roll refused, 4 timed out, 5 no supervisor.",
    )
    add = parser.add_argument
    add("do", choices=("roll", "stop", "status"))
    add(
        "--control",
        metavar="PATH",
        default=os.environ.get("SDLISTEN_CONTROL"),
        help="its socket ($SDLISTEN_CONTROL)",
    )
    add(
        "--wait",
        action="store_true",
        help="until the new generation serves or was refused, or all has stopped",
    )
    add("--timeout", type=_seconds, metavar="S", help="how long to wait (5; with --wait as long as it takes)")
    add("--json", action="store_true", help="the answer as one line of JSON")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError(text)
    return seconds


def _pulse(text: str) -> float:
    # It becomes WATCHDOG_USEC, and after 0 of them each sign of life would be late already.
    if not 1 <= _seconds(text) * 1e6 < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, a microsecond or more")
    return _seconds(text)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def _nice(text: str) -> int:
    if not 0 <= int(text) <= _NICE_MAX:
        raise ValueError(text)
    return int(text)


def _ready(text: str) -> float:
    return math.inf if text == "notify" else _seconds(text)


def _signal(text: str) -> int:
    try:
        number = signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    except KeyError:
        raise ValueError(text) from None
    if number in {signal.SIGKILL, signal.SIGSTOP}:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a signal that a program can handle")
    return int(number)
