"""Which of the passed listeners is meant by a name and an address.

A name decides first: an administrator writes FileDescriptorName= to mean this very socket. Then the
address, and only then that nothing else can be meant: one endpoint of the same transport, and nothing was
taken before.

The kernel is asked for what a word leaves open: the addresses of a host name, the index of an interface, the
real directory of a path.
"""

from __future__ import annotations

import os
import socket

from sdlisten.address import (
    AbstractAddress,
    HostAddress,
    InetAddress,
    PortAddress,
    UnixAddress,
    address_of_sockname,
    covering,
    parse_address,
)
from sdlisten.descriptor import Kind
from sdlisten.environment import check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdlisten.address import Address
    from sdlisten.inherited import InheritedFd

__all__ = ("Wanted", "fitting")

_TCP = (PortAddress, InetAddress, HostAddress)
_UNIX = (UnixAddress, AbstractAddress)


class Wanted:
    """What a caller of ``listen()`` asked for.

    Attributes:
        address: The parsed address, or None.
        name: The FileDescriptorName, or None.
    """

    __slots__ = ("address", "name")

    def __init__(self, word: str | int | None, name: str | None) -> None:
        """Read the request.

        Raises:
            AddressError: The word is no address.
            ListenEnvironmentError: The name cannot be a FileDescriptorName.
        """
        self.address: Address | None = None if word is None else parse_address(word)
        self.name = name
        if name is not None:
            check_name(name)

    def __str__(self) -> str:
        address = "" if self.address is None else repr(str(self.address))
        name = "" if self.name is None else f"name={self.name!r}"
        return f"listen({address}{', ' if address and name else ''}{name})"

    def is_name_of(self, found: InheritedFd) -> bool:
        """Whether the name that was asked for is the name of this one, or of its unit."""
        return self.name is not None and found.name in {self.name, f"{self.name}.socket"}

    def is_same_transport(self, found: InheritedFd) -> bool:
        """Whether it listens on TCP, unix or VM sockets as the address that was asked for."""
        return self.address is not None and _transport(found.address) == _transport(self.address)

    def at_address(self, candidates: Sequence[InheritedFd]) -> list[InheritedFd]:
        """Choose those that together listen at the address; none if something of it is missing."""
        if self.address is None or not candidates:
            return []
        own = [_real(found.address) for found in candidates]
        chosen: set[int] = set()
        for concrete in _concrete(self.address):
            covered = covering(_real(concrete) or concrete, own)
            if not covered:
                return []
            chosen.update(covered)
        return [candidates[index] for index in sorted(chosen)]

    def may_be(self, candidates: Sequence[InheritedFd]) -> bool:
        """Whether these are one endpoint, of the transport that was asked for."""
        addresses = [found.address for found in candidates]
        kinds = {(_transport(found.address), found.type) for found in candidates}
        if len(kinds) != 1 or not _is_one_endpoint(addresses):
            return False
        return self.address is None or self.is_same_transport(candidates[0])


def fitting(candidates: Sequence[InheritedFd], wanted: Wanted, *, untouched: bool) -> Sequence[InheritedFd]:
    """Choose the listeners that fit a request; see the table in the documentation of ``listen()``.

    Args:
        candidates: What may be taken; whatever does not listen is passed over.
        wanted: The request.
        untouched: Whether nothing was taken before, so that the only endpoint left is the only one there was.

    Returns:
        The listeners; empty if none fit, or if it stays open which are meant.
    """
    listeners = [found for found in candidates if found.kind is Kind.LISTENER]
    named = [found for found in listeners if wanted.is_name_of(found)]
    if named:
        return named
    unnamed = [found for found in listeners if found.unnamed]
    # Who asks for a name does not get a socket that has another one.
    groups = [] if wanted.name is not None else _by_name([found for found in listeners if not found.unnamed])
    at_address = wanted.at_address(unnamed)
    if at_address:
        return at_address
    groups_at_address = [chosen for chosen in map(wanted.at_address, groups) if chosen]
    if len(groups_at_address) == 1:
        return groups_at_address[0]
    if untouched and wanted.may_be(unnamed):
        return unnamed
    if untouched and not unnamed and len(groups) == 1 and wanted.may_be(groups[0]):
        return groups[0]
    return []


def _by_name(listeners: Sequence[InheritedFd]) -> list[list[InheritedFd]]:
    groups: dict[str, list[InheritedFd]] = {}
    for found in listeners:
        groups.setdefault(found.name, []).append(found)
    return list(groups.values())


def _is_one_endpoint(addresses: Sequence[Address | None]) -> bool:
    if len(addresses) == 1:
        return True
    ports = {address.port for address in addresses if isinstance(address, PortAddress | InetAddress)}
    families = [isinstance(address, InetAddress) and not address.is_ipv6 for address in addresses]
    tcp = all(isinstance(address, _TCP) for address in addresses)
    return tcp and len(ports) == 1 and len(set(families)) == len(families)


def _transport(address: Address | None) -> str:
    if isinstance(address, _TCP):
        return "TCP"
    return "unix" if isinstance(address, _UNIX) else type(address).__name__


def _concrete(address: Address) -> list[Address]:
    """Resolve a host name to every address it has, and the scope of an address to its index."""
    if isinstance(address, HostAddress):
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except socket.gaierror:  # what does not resolve matches nothing; binding it would raise this
            return [address]
        resolved = (address_of_sockname(family, sockaddr, v6only=True) for family, _, _, _, sockaddr in found)
        return [concrete for concrete in resolved if concrete]
    if isinstance(address, InetAddress) and address.scope and not address.scope.isdigit():
        try:
            index = socket.if_nametoindex(address.scope)
        except OSError:  # no such interface: nobody listens there
            return [address]
        return [InetAddress(address.host, address.port, str(index))]
    return [address]


def _real(address: Address | None) -> Address | None:
    """Follow symbolic links in the directory of a path; the last part is the socket itself."""
    if isinstance(address, UnixAddress) and address.path.startswith("/"):
        directory, name = os.path.split(address.path)
        return UnixAddress(os.path.join(os.path.realpath(directory), name))
    return address
