"""From words to a running supervisor, in the image that stays."""

from __future__ import annotations

import contextlib
import os
import resource

from sdlisten.errors import ActivationError, AddressError
from sdlisten.exit_codes import CONFIGURATION, FAILED, USAGE
from sdlisten.notifier import Notifier, watchdog_timeout
from sdlisten.supervisor.options import Options
from sdlisten.supervisor.output import say
from sdlisten.supervisor.runner import Supervisor
from sdlisten.supervisor.sockets import Sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("main",)

_STDERR = 2
_FOR_EACH_WORKER = 4  # descriptors: its pidfd, its notify socket, its stderr, and one while it is on trial
_OTHERS = 64  # the clients of the control socket among them


def main(words: Sequence[str]) -> int:
    """Run a supervisor.

    Args:
        words: What `Options.to_words` wrote.

    Returns:
        The exit code; 2 for more workers than can be held.
    """
    _occupy_standard_descriptors()
    options = Options.from_words(words)
    watchdog = watchdog_timeout()
    notifier = Notifier.from_environ(unset_environment=True)
    try:
        with contextlib.closing(Sockets.obtain(options.listen)) as sockets:
            needed = _OTHERS + len(sockets.descriptors) + 2 * options.workers * _FOR_EACH_WORKER
            allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if allowed < needed:
                say(
                    f"--workers {options.workers} needs up to {needed} descriptors, and RLIMIT_NOFILE is "
                    f"{allowed}: raise it (LimitNOFILE= in the unit, ulimit -n), or start fewer"
                )
                return USAGE
            return Supervisor(options, sockets, notifier, watchdog).run()
    except (ActivationError, AddressError) as error:
        say(str(error))
        return CONFIGURATION
    except OSError as error:
        say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return FAILED


def _occupy_standard_descriptors() -> None:
    """Open /dev/null at those of 0, 1 and 2 that are closed: a socket or pipe of ours would land there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)
