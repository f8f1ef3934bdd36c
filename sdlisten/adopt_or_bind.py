"""listen(): adopt what the manager passed, or bind. One decision, `_choose`; never a silent mix of both."""

from __future__ import annotations

import enum
import os

from sdlisten import activation
from sdlisten.address import AbstractAddress, HostAddress, InetAddress, PortAddress, UnixAddress, VsockAddress
from sdlisten.binding import DEFAULT_BACKLOG, bind_sockets, bind_unix_path, bind_unix_socket, bind_vsock
from sdlisten.descriptor import Kind
from sdlisten.errors import (
    AlreadyTakenError,
    DescriptorError,
    ListenEnvironmentError,
    NameNotFoundError,
    NotActivatedError,
)
from sdlisten.inherited import join
from sdlisten.listener import Listener, Listeners, Origin
from sdlisten.matching import Wanted, fitting

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from sdlisten.activation import Activation
    from sdlisten.address import Address
    from sdlisten.inherited import InheritedFd

__all__ = ("Adopt", "bind", "listen")

_CGROUP = "/proc/self/cgroup"


class Adopt(enum.Enum):
    """What `listen` may do about sockets that the manager passed."""

    AUTO = "auto"
    """Adopt if sockets were passed, bind if not. ``SDLISTEN_REQUIRE=1`` turns it into REQUIRE."""
    REQUIRE = "require"
    """Adopt, or fail."""
    NEVER = "never"
    """Bind; what was passed stays open for others to take."""


def listen(
    address: str | int | None = None,
    *,
    name: str | None = None,
    adopt: Adopt = Adopt.AUTO,
    backlog: int = DEFAULT_BACKLOG,
    reuse_port: bool = False,
    mode: int = 0o600,
) -> Listeners:
    """Adopt the listeners that the manager passed, or bind.

    Args:
        address: Where to listen, a word as in ``ListenStream=`` (an int is a port). None: only adopt.
        name: The FileDescriptorName to look for. Without one the address decides, or that there is no choice.
        adopt: Whether to adopt or to bind, see `Adopt`.
        backlog: Connections that may wait; for bound sockets only.
        reuse_port: Set SO_REUSEPORT; for bound TCP sockets only.
        mode: Permissions of a unix socket; for bound ones only.

    Returns:
        The listeners, which own their descriptors: non-blocking, close-on-exec, with their backlog as it was.

    Raises:
        AddressError: ``address`` is no address, or its path is occupied by something else.
        NotActivatedError: Nothing was passed, and binding is not allowed or there is no address.
        NameNotFoundError: Sockets were passed, but none fits; nothing is bound.
        AlreadyTakenError: What fits was taken before, or belongs to our parent.
        DescriptorError: A connection was passed (``Accept=yes``), or a descriptor is not open.
        ListenEnvironmentError: A LISTEN_* or SDLISTEN_* variable is malformed.
        OSError: Binding failed; notes say what to do about it.
    """
    wanted = Wanted(address, name)
    adopt = _required_by_environment() if adopt is Adopt.AUTO else Adopt(adopt)
    with activation.lock:
        passed = activation.process_activation()
        chosen = _choose(passed, wanted, adopt)
        if chosen:
            return passed.adopt(chosen, by=str(wanted))
    # Binding is not done under the lock: resolving a host name can take long.
    try:
        bound = bind(wanted.address, name=name, backlog=backlog, reuse_port=reuse_port, mode=mode)
    except OSError as error:
        if " meant for " in passed.absent:
            error.add_note(f"{passed.absent}.")
        raise
    passed.claim()
    return bound


def _choose(passed: Activation, wanted: Wanted, adopt: Adopt) -> Sequence[InheritedFd]:
    """Decide: returns what to adopt, nothing if it is to be bound, and raises if neither is right."""
    sockets = [found for found in passed.descriptors if found.kind.is_socket and not found.stored]
    free = [found for found in sockets if found.taken_by is None]
    if len(free) == 1 and free[0].kind is Kind.CONNECTION:
        raise _accept_yes(free[0])
    if adopt is not Adopt.NEVER and sockets:
        passed.check_not_forked()
        chosen = fitting(free, wanted, untouched=len(free) == len(sockets))
        if chosen:
            return chosen
        _check_not_taken([found for found in sockets if found.taken_by], wanted)
        if free:
            raise _none_fits(passed, wanted)
    if adopt is Adopt.REQUIRE or wanted.address is None:
        raise _nothing_passed(passed, wanted)
    return ()


def _required_by_environment() -> Adopt:
    value = os.environ.get("SDLISTEN_REQUIRE", "")
    if value not in {"", "0", "1"}:
        text = f"SDLISTEN_REQUIRE={value!r}: expected 1 (sockets must be passed), 0 or nothing"
        raise ListenEnvironmentError(text, variable="SDLISTEN_REQUIRE", value=value)
    return Adopt.REQUIRE if value == "1" else Adopt.AUTO


def bind(
    address: Address | None,
    *,
    name: str | None = None,
    backlog: int = DEFAULT_BACKLOG,
    reuse_port: bool = False,
    mode: int = 0o600,
) -> Listeners:
    """Bind, whatever was passed; `listen` says what the arguments mean.

    Raises:
        AddressError: The path is occupied by something that is no socket.
        OSError: Binding failed; notes say what to do about it.
        ValueError: ``reuse_port`` for anything but TCP.
    """
    created: tuple[int, int] | None = None
    if isinstance(address, PortAddress | InetAddress | HostAddress):
        sockets = _bind_tcp(address, backlog=backlog, reuse_port=reuse_port)
    elif reuse_port:
        text = f"reuse_port is for TCP, not for {address}"
        raise ValueError(text)
    elif isinstance(address, UnixAddress):
        sock, created = bind_unix_path(address.path, mode, backlog)
        sockets = [sock]
    elif isinstance(address, AbstractAddress):
        sockets = [bind_unix_socket(b"\0" + address.name, backlog=backlog)]
    else:
        assert isinstance(address, VsockAddress)  # noqa: S101 - the only kind left; None never comes here
        sockets = [bind_vsock(address.cid, address.port, backlog)]
    return Listeners(Listener(s, name=name or "", origin=Origin.BOUND, created=created) for s in sockets)


def _bind_tcp(
    address: PortAddress | InetAddress | HostAddress, *, backlog: int, reuse_port: bool
) -> list[socket.socket]:
    port = address.port
    if isinstance(address, HostAddress):
        return bind_sockets(port, address.host, backlog=backlog, reuse_port=reuse_port)
    if isinstance(address, PortAddress) or address.host == "::":
        # As systemd does with BindIPv6Only=default: one socket for both families.
        host = None if isinstance(address, PortAddress) else "::"
        return bind_sockets(port, host, backlog=backlog, reuse_port=reuse_port, dual_stack=True)
    host = f"{address.host}%{address.scope}" if address.scope else address.host
    return bind_sockets(port, host, backlog=backlog, reuse_port=reuse_port)


def _accept_yes(found: InheritedFd) -> DescriptorError:
    return DescriptorError(
        f"{found} is one accepted connection: its .socket unit says Accept=yes, one service for each. "
        f"Use serve(), which takes both, or Activation.current().take_sockets({found.name!r}); "
        f"or put Accept=no into the unit.",
        fd=found.fd,
    )


def _check_not_taken(taken: Sequence[InheritedFd], wanted: Wanted) -> None:
    # The only endpoint there was may be asked for twice, and fits neither by name nor by address.
    again = [found for found in taken if found.taken_by == str(wanted)]
    for found in (*fitting(taken, wanted, untouched=False), *again):
        text = f"{found} was taken before, by {found.taken_by}; {wanted} comes second"
        raise AlreadyTakenError(text)


def _none_fits(passed: Activation, wanted: Wanted) -> NameNotFoundError:
    free = [found for found in passed.remaining if found.kind.is_socket and not found.stored]
    listeners = [found for found in free if found.kind is Kind.LISTENER]
    likely = [found for found in listeners if wanted.is_same_transport(found)]
    meant = (*likely, *listeners, *free)[0]
    address = f"address {wanted.address}" if wanted.address else "the only endpoint"
    if wanted.name is not None:
        headline = f"no passed socket is named {wanted.name!r}"
        asked = f"name {wanted.name!r}" + (f", else {address}" if wanted.address else "")
    else:
        headline = f"no passed socket is {'at ' + address if wanted.address else address}"
        asked = address
    systemctl, own = _own_service()
    unit = meant.name if meant.name.endswith(".socket") else f"{own or 'NAME'}.socket"
    service = f"{own or unit.removesuffix('.socket')}.service"
    where = f" that has ListenStream={meant.address}" if meant.address else ""
    return NameNotFoundError(
        f"{headline}. Passed: {join(free)}. Wanted: {asked}. "
        f"Put FileDescriptorName={wanted.name or 'NAME'} into the .socket unit{where}"
        f"{'' if wanted.name else ' and ask for that name'}, then: {systemctl} daemon-reload; "
        f"{systemctl} stop {service}; {systemctl} restart {unit}."
    )


def _nothing_passed(passed: Activation, wanted: Wanted) -> NotActivatedError:
    why = passed.absent or f"{join(passed.descriptors)} are taken or no sockets"
    bind = "" if wanted.address else ", and there is no address to bind"
    systemctl, own = _own_service()
    unit = f"{own or wanted.name or 'NAME'}.socket"
    fdname = f" --fdname={wanted.name}" if wanted.name else ""
    return NotActivatedError(
        f"no sockets were passed ({why}){bind}. Start it through its unit: {systemctl} start {unit}; "
        f"to try it: systemd-socket-activate -l {wanted.address or 8080}{fdname} COMMAND."
    )


def _own_service() -> tuple[str, str]:
    """Return how to call the manager that runs us, and our service without its suffix; "" outside of one."""
    # systemd.exec(5): the process that a unit started. Its descendants may be anything: a login shell, a cron
    # job. If it is our parent, it is a wrapper that started us without exec.
    if os.environ.get("SYSTEMD_EXEC_PID") not in {str(os.getpid()), str(os.getppid())}:
        return "systemctl", ""
    try:
        # cgroups(7): ID:CONTROLLERS:PATH for each hierarchy; systemd calls the last directory like the unit.
        with open(_CGROUP, encoding="utf-8", errors="replace") as lines:
            paths = [line.rstrip("\n") for line in lines]
    except OSError:  # no /proc
        paths = []
    path = next((path for path in paths if path.endswith(".service")), "")
    service = path.rpartition("/")[2].removesuffix(".service")
    return "systemctl --user" if "/user@" in path else "systemctl", service
