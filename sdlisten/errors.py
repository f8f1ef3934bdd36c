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
    ├── MessageError (ValueError)      a field, or a whole message, is not one of sd_notify(3)
    ├── StateError (ValueError)        a state is too large to be kept, or its version does not fit
    └── NotifyError                    the manager could not be told, and the caller asked for certainty
        ├── BarrierTimeoutError (TimeoutError)  it did not process the messages in time
        └── StoreRefusedError          its fd store is full, absent, or closed to us

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
    "MessageError",
    "NameNotFoundError",
    "NotActivatedError",
    "NotifyError",
    "SdlistenError",
    "StateError",
    "StoreRefusedError",
)


class SdlistenError(Exception):
    """Base of every error that sdlisten itself raises."""


class AddressError(SdlistenError, ValueError):
    """A word is no address in the grammar of ``ListenStream=``, or its path is occupied by something else."""


class ActivationError(SdlistenError):
    """What the manager passed, or did not pass, cannot be used as asked."""


class ListenEnvironmentError(ActivationError):
    """A LISTEN_* variable has a value that sd_listen_fds(3) does not allow.

    Attributes:
        variable: The variable's name, such as ``"LISTEN_FDS"``.
        value: What was found there, or None if it is missing.
    """

    def __init__(self, text: str, *, variable: str = "", value: str | None = None) -> None:
        super().__init__(text)
        self.variable = variable
        self.value = value


class DescriptorError(ActivationError):
    """A descriptor is not what was asked for.

    Attributes:
        fd: The number of the descriptor.
    """

    def __init__(self, text: str, *, fd: int = -1) -> None:
        super().__init__(text)
        self.fd = fd


class NotActivatedError(ActivationError, ValueError):
    """Nothing was passed, and binding was not asked for or not allowed."""


class NameNotFoundError(ActivationError):
    """Sockets were passed, but none has the name or the address that was asked for; nothing was bound."""


class AlreadyTakenError(ActivationError):
    """The descriptor was taken before; each is taken once in the life of a process."""


class MessageError(SdlistenError, ValueError):
    """A field, or a whole message, is not one of sd_notify(3).

    Attributes:
        field: The name of the field at fault, or None if it is the message.
        value: What was found there, or None.
    """

    def __init__(self, text: str, *, field: str | None = None, value: object = None) -> None:
        super().__init__(text)
        self.field = field
        self.value = value


class StateError(SdlistenError, ValueError):
    """A state is too large to be kept, or its version is no number that fits."""


class NotifyError(SdlistenError):
    """The manager could not be told something, and the caller had asked to know."""


class BarrierTimeoutError(NotifyError, TimeoutError):
    """The manager did not confirm within the time limit that it had processed the messages before."""


class StoreRefusedError(NotifyError):
    """The manager's descriptor store is full, absent, or closed to us.

    Attributes:
        kept: How many descriptors it keeps: the first ones of those given. It closed the others.
    """

    def __init__(self, text: str, *, kept: int = 0) -> None:
        super().__init__(text)
        self.kept = kept
