"""Get listening sockets from systemd or bind them, and be restarted without a client noticing.

The public names load on first use: ``import sdlisten`` alone costs nothing, and a program that only adopts a
socket never pays for asyncio.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdlisten.accepting import AcceptHandle, add_accept_handler
    from sdlisten.activation import Activation, listen_fds
    from sdlisten.adopt_or_bind import Adopt, listen
    from sdlisten.binding import DEFAULT_BACKLOG, bind_sockets, bind_unix_socket
    from sdlisten.descriptor import Kind
    from sdlisten.errors import (
        ActivationError,
        AddressError,
        AlreadyTakenError,
        BarrierTimeoutError,
        DescriptorError,
        ListenEnvironmentError,
        MessageError,
        NameNotFoundError,
        NotActivatedError,
        NotifyError,
        SdlistenError,
        StateError,
        StoreRefusedError,
    )
    from sdlisten.inherited import InheritedFd
    from sdlisten.listener import Listener, Listeners, Origin, SharedSocket
    from sdlisten.notifier import Notifier, booted, notify, watchdog_timeout
    from sdlisten.service import Connection, DrainReport, Service, serve
    from sdlisten.state import State, take_state

__all__ = (
    "DEFAULT_BACKLOG",
    "AcceptHandle",
    "Activation",
    "ActivationError",
    "AddressError",
    "Adopt",
    "AlreadyTakenError",
    "BarrierTimeoutError",
    "Connection",
    "DescriptorError",
    "DrainReport",
    "InheritedFd",
    "Kind",
    "ListenEnvironmentError",
    "Listener",
    "Listeners",
    "MessageError",
    "NameNotFoundError",
    "NotActivatedError",
    "Notifier",
    "NotifyError",
    "Origin",
    "SdlistenError",
    "Service",
    "SharedSocket",
    "State",
    "StateError",
    "StoreRefusedError",
    "add_accept_handler",
    "bind_sockets",
    "bind_unix_socket",
    "booted",
    "listen",
    "listen_fds",
    "notify",
    "serve",
    "take_state",
    "watchdog_timeout",
)

__version__ = "0.1.0"

_HOME = {
    "AcceptHandle": "accepting",
    "Activation": "activation",
    "Adopt": "adopt_or_bind",
    "Connection": "service",
    "DEFAULT_BACKLOG": "binding",
    "DrainReport": "service",
    "InheritedFd": "inherited",
    "Kind": "descriptor",
    "Listener": "listener",
    "Listeners": "listener",
    "Notifier": "notifier",
    "Origin": "listener",
    "Service": "service",
    "SharedSocket": "listener",
    "State": "state",
    "add_accept_handler": "accepting",
    "bind_sockets": "binding",
    "bind_unix_socket": "binding",
    "booted": "notifier",
    "listen": "adopt_or_bind",
    "listen_fds": "activation",
    "notify": "notifier",
    "serve": "service",
    "take_state": "state",
    "watchdog_timeout": "notifier",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        text = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(text)
    home = _HOME.get(name, "errors")
    value = getattr(__import__(f"{__name__}.{home}", fromlist=(name,)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
