"""What ``sdlisten run`` was told, as words from the image that reads the command line to the one that stays.

The reader has argparse in its memory, which a supervisor should not carry for months. So it writes the
options plainly, and becomes the supervisor by execve(2): the pid stays, and what was passed.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

__all__ = ("Options",)

_TERM = 15


class Options:
    """Options of ``sdlisten run``; times are in seconds.

    Attributes:
        listen: ``[NAME=]ADDRESS`` words; without one everything that was passed is passed on.
        workers: Processes in a generation.
        guess: How long a program that never says READY=1 may take to be ready; infinite: it says so.
        ready_timeout: How long a worker may take to say READY=1.
        drain_timeout: How long a worker may take to end.
        soak: How long both generations accept.
        stop_delay: How long to serve on after the order to stop.
        watchdog: Between two WATCHDOG=1 of a worker; infinite: as our own manager has it.
        control: Path of the control socket, "" for none.
        env_file: Variables for the workers, read again at each roll, "" for none.
        pid_file: Where to write our pid, "" for nowhere.
        nice_start: How much nicer workers are until they are ready.
        stop_signal: What tells a worker to drain.
        non_blocking: Whether listeners are passed with O_NONBLOCK.
        command: What to run.
    """

    def __init__(self) -> None:
        self.listen: list[str] = []
        self.workers = 1
        self.guess = math.inf
        self.ready_timeout = 60.0
        self.drain_timeout = 8.0
        self.soak = 0.0
        self.stop_delay = 0.0
        self.watchdog = math.inf
        self.control = ""
        self.env_file = ""
        self.pid_file = ""
        self.nice_start = 0
        self.stop_signal = _TERM
        self.non_blocking = False
        self.command: Sequence[str] = ()

    def to_words(self) -> list[str]:
        """Write what is not as by default, for `from_words`."""
        defaults = vars(type(self)())
        words = []
        for name, value in vars(self).items():
            if name != "command" and value != defaults[name]:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}={one}" for one in values]
        return [*words, "--", *self.command]

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        """Read what `to_words` wrote."""
        options = cls()
        end = words.index("--")
        options.command = words[end + 1 :]
        for word in words[:end]:
            name, _, text = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            default = getattr(options, name)
            if isinstance(default, list):
                default.append(text)
            elif isinstance(default, bool):
                setattr(options, name, text == "True")
            else:
                setattr(options, name, type(default)(text))
        return options
