"""What a generation is started with, settled once for all its workers: the env file may change meanwhile."""

from __future__ import annotations

import math
import os

from sdlisten.supervisor import surroundings
from sdlisten.supervisor.output import Tail
from sdlisten.supervisor.store import store_max

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdlisten.supervisor.generation import Generation
    from sdlisten.supervisor.options import Options

__all__ = ("Provision", "Provisions")


class Provision:
    """What the workers of one generation are started with.

    Attributes:
        tail: The end of what they write to stderr.
        environ: Their environment; empty until the first of them is started, or while it cannot be made.
    """

    __slots__ = ("environ", "tail")

    def __init__(self) -> None:
        self.tail = Tail()
        self.environ: Mapping[str, str] = {}


class Provisions:
    """The provisions of all generations that have workers.

    Args:
        options: What to run, and how.
        watchdog: Seconds between two signs of life that workers are asked for; infinite for none.
    """

    __slots__ = ("_environ", "_made", "_options", "_watchdog")

    def __init__(self, options: Options, watchdog: float) -> None:
        self._options = options
        self._watchdog = watchdog
        self._environ = surroundings.inherited_environ(os.environ)
        self._made: dict[int, Provision] = {}

    def of(self, generation: Generation) -> Provision:
        """Return what there is for a generation; to look does not make it."""
        return self._made.get(generation.number) or Provision()

    def provide(self, generation: Generation, alive: Iterable[Generation]) -> Provision:
        """Make what a worker of a generation needs, and forget what was for generations that have gone.

        Args:
            generation: Whose worker is to be started.
            alive: The other generations that have workers.

        Returns:
            Its provision. If it raises, that is there all the same, for its `tail`.

        Raises:
            OSError: The env file cannot be read.
            EnvFileError: It has a line that is no assignment.
        """
        numbers = {generation.number, *(one.number for one in alive)}
        self._made = {number: made for number, made in self._made.items() if number in numbers}
        provision = self._made.setdefault(generation.number, Provision())
        if not provision.environ:
            provision.environ = self._environ_of(generation)
        return provision

    def _environ_of(self, generation: Generation) -> dict[str, str]:
        environ = dict(self._environ)
        if self._options.env_file:
            environ.update(surroundings.read_env_file(self._options.env_file))
        environ["SDLISTEN_GENERATION"] = str(generation.number)
        environ["SDLISTEN_FDSTORE"] = str(store_max())
        if self._options.control:
            environ["SDLISTEN_CONTROL"] = os.path.abspath(self._options.control)
        if self._watchdog < math.inf:
            # Without WATCHDOG_PID: the pid is not known yet, and sd_watchdog_enabled(3) can do without.
            environ["WATCHDOG_USEC"] = str(round(self._watchdog * 1e6))
        return environ
