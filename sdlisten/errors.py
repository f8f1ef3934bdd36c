"""What can go wrong, as types a program can catch.

The whole tree::

    SdlistenError
    ├── AddressError (ValueError)      a word that is no address, or a path that cannot become one
    ├── ActivationError                what the manager passed cannot be used
    │   ├── ListenEnvironmentError     a LISTEN_* variable has a value that sd_listen_fds(3) forbids
    │   ├── DescriptorError            a passed descriptor is not what was asked for
    │   ├── NotActivatedError (ValueError)  nothing was passed, and nothing may be bound
    │   ├── NameNotFoundError          sockets were passed, none of them fits
    │   └── AlreadyTakenError          somebody took the descriptor before
    └── NotifyError                    the manager could not be told, and the caller asked for certainty
        └── BarrierTimeoutError (TimeoutError)  the manager did not process the messages in time

An `AddressError` or `ActivationError` that ends a program should end it with exit code 78 (EX_CONFIG of
sysexits.h): starting again does not help, and units say ``RestartPreventExitStatus=78``.

The kernel's own refusals (a port in use, a missing permission) stay `OSError`; what an operator can do about
them is attached as a note (`BaseException.add_note`).

Only types live here: texts are built where the fault is found, because they quote what was found.
"""

from __future__ import annotations

__all__ = (
    "ActivationError",
    "AddressError",
    "AlreadyTakenError",
    "BarrierTimeoutError",
    "DescriptorError",
    "ListenEnvironmentError",
    "NameNotFoundError",
    "NotActivatedError",
    "NotifyError",
    "SdlistenError",
)


class SdlistenError(Exception):
    """Base of every error that sdlisten itself raises."""


class AddressError(SdlistenError, ValueError):
    """A word is not an address in the grammar of ``ListenStream=``, or its path is occupied by something else."""


class ActivationError(SdlistenError):
    """What the manager passed, or did not pass, cannot be used as asked."""


class ListenEnvironmentError(ActivationError):
    """A LISTEN_* variable has a value that sd_listen_fds(3) does not allow.

    Attributes:
        variable: The variable's name, such as ``"LISTEN_FDS"``.
        value: What was found there, or None if it is missing.
    """

    def __init__(self, text: str, *, variable: str, value: str | None = None) -> None:
        super().__init__(text)
        self.variable = variable
        self.value = value


class DescriptorError(ActivationError):
    """A descriptor is not what was asked for.

    Attributes:
        fd: The number of the descriptor.
    """

    def __init__(self, text: str, *, fd: int) -> None:
        super().__init__(text)
        self.fd = fd


class NotActivatedError(ActivationError, ValueError):
    """Nothing was passed, and binding was not asked for or not allowed."""


class NameNotFoundError(ActivationError):
    """Sockets were passed, but none has the name or the address that was asked for; nothing was bound."""


class AlreadyTakenError(ActivationError):
    """The descriptor was taken before; each is taken once in the life of a process."""


class NotifyError(SdlistenError):
    """The manager could not be told something, and the caller had asked to know."""


class BarrierTimeoutError(NotifyError, TimeoutError):
    """The manager did not confirm within the time limit that it had processed the messages before."""
