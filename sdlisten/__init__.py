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
        DescriptorError,
        ListenEnvironmentError,
        NameNotFoundError,
        NotActivatedError,
        SdlistenError,
    )
    from sdlisten.inherited import InheritedFd
    from sdlisten.listener import Listener, Listeners, Origin, SharedSocket

__all__ = (
    "DEFAULT_BACKLOG",
    "AcceptHandle",
    "Activation",
    "ActivationError",
    "AddressError",
    "Adopt",
    "AlreadyTakenError",
    "DescriptorError",
    "InheritedFd",
    "Kind",
    "ListenEnvironmentError",
    "Listener",
    "Listeners",
    "NameNotFoundError",
    "NotActivatedError",
    "Origin",
    "SdlistenError",
    "SharedSocket",
    "add_accept_handler",
    "bind_sockets",
    "bind_unix_socket",
    "listen",
    "listen_fds",
)

__version__ = "0.1.0"

_HOME = {
    "AcceptHandle": "accepting",
    "Activation": "activation",
    "Adopt": "adopt_or_bind",
    "DEFAULT_BACKLOG": "binding",
    "InheritedFd": "inherited",
    "Kind": "descriptor",
    "Listener": "listener",
    "Listeners": "listener",
    "Origin": "listener",
    "SharedSocket": "listener",
    "add_accept_handler": "accepting",
    "bind_sockets": "binding",
    "bind_unix_socket": "binding",
    "listen": "adopt_or_bind",
    "listen_fds": "activation",
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
