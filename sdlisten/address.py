"""Addresses as systemd writes them in ``ListenStream=``: read, written, compared.

The grammar is that of systemd.socket(5), and one word more:

===================  ============================================================================
``8080``             the port on every interface: one dual-stack ``[::]`` socket
``127.0.0.1:80``     an IPv4 address
``[::1]:80``         an IPv6 address; ``[fe80::1]:80%eth0`` with a scope, a name or an index
``/run/x.sock``      a unix socket at an absolute path
``@name``            a unix socket in the abstract namespace (Linux)
``vsock:2:80``       a VM socket; an empty CID (``vsock::80``) means any
``host:80``          ours alone, never for units: a name, resolved when it is used
===================  ============================================================================

systemd writes the scope behind the port and refuses ``[fe80::1%eth0]:80`` (252: "Invalid argument"). Both are
read here, systemd's is written. Port 0, which systemd refuses in units, means a free port.

Nothing here touches the kernel: no name is resolved, no path is looked up (``inet_pton`` is plain C).
"""

from __future__ import annotations

import socket

from sdlisten.errors import AddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "SUN_PATH_MAX",
    "VMADDR_ANY",
    "AbstractAddress",
    "Address",
    "HostAddress",
    "InetAddress",
    "PortAddress",
    "UnixAddress",
    "VsockAddress",
    "address_of_sockname",
    "covering",
    "parse_address",
    "parse_named_address",
)

# sizeof(sun_path) is 108, and systemd wants a closing NUL, behind an abstract name too (whose "@" counts).
SUN_PATH_MAX = 107
VMADDR_ANY = 0xFFFFFFFF
_MAPPED = "::ffff:"


class Address:
    """An address a stream listener can have: immutable, compared with ``==``, written with ``str()``."""

    __slots__: tuple[str, ...] = ()

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, slot) for slot in self.__slots__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Address):
            return NotImplemented
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


class PortAddress(Address):
    """A TCP port on every interface, IPv6 and IPv4 together: ``8080``."""

    __slots__ = ("port",)

    def __init__(self, port: int) -> None:
        self.port = port

    def __str__(self) -> str:
        return str(self.port)


class InetAddress(Address):
    """A TCP port at one IP address: ``127.0.0.1:80``, ``[::1]:80``, ``[fe80::1]:80%eth0``.

    ``host`` is in the form that ``inet_ntop`` writes; ``scope`` is an interface's name or index, "" for none.
    """

    __slots__ = ("host", "port", "scope")

    def __init__(self, host: str, port: int, scope: str = "") -> None:
        self.host = host
        self.port = port
        self.scope = scope

    @property
    def is_ipv6(self) -> bool:
        """Whether ``host`` is an IPv6 address."""
        return ":" in self.host

    def __str__(self) -> str:
        if not self.is_ipv6:
            return f"{self.host}:{self.port}"
        return f"[{self.host}]:{self.port}" + (f"%{self.scope}" if self.scope else "")


class UnixAddress(Address):
    """A unix socket in the file system: ``/run/x.sock``. Bytes that are not UTF-8 are surrogate escapes."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __str__(self) -> str:
        return self.path


class AbstractAddress(Address):
    """A unix socket in Linux's abstract namespace: ``@name``. ``name`` has no leading NUL byte."""

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        self.name = name

    def __str__(self) -> str:
        return "@" + self.name.decode("utf-8", "surrogateescape")


class VsockAddress(Address):
    """A VM socket, vsock(7): ``vsock:2:80``. The CID 4294967295 (any) is written as nothing."""

    __slots__ = ("cid", "port")

    def __init__(self, cid: int, port: int) -> None:
        self.cid = cid
        self.port = port

    def __str__(self) -> str:
        return f"vsock:{'' if self.cid == VMADDR_ANY else self.cid}:{self.port}"


class HostAddress(Address):
    """A TCP port at a host name, which is resolved only when it is used: ``localhost:80``."""

    __slots__ = ("host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_address(word: str | int) -> Address:
    """Read an address word.

    Args:
        word: A word of the grammar above. An int is a port.

    Raises:
        AddressError: The word is none of these; the text says what was found and what is expected.
    """
    if isinstance(word, int) and not isinstance(word, bool):
        word = str(word)
    if not isinstance(word, str):
        text = f"an address is a word such as '8080' or '/run/x.sock', not {word!r}"
        raise AddressError(text)
    if word.startswith("/"):
        return _parse_unix(word)
    if word.startswith("@"):
        return _parse_abstract(word)
    if word.startswith("vsock:"):
        return _parse_vsock(word)
    if word.startswith("["):
        return _parse_ipv6(word)
    if ":" in word:
        return _parse_host(word)
    if word[:1].isdigit():
        return PortAddress(_parse_port(word, word))
    raise _not_an_address(word, "it has no port")


def parse_named_address(word: str) -> tuple[str | None, Address]:
    """Read ``[NAME=]ADDRESS``, the argument of ``-l``.

    NAME has none of ``/ @ : [ ]`` before the first ``=``; otherwise the whole word is an address.

    Returns:
        The name, or None if the word has none, and the address.

    Raises:
        AddressError: The address is not one.
    """
    name, equals, rest = word.partition("=")
    if equals and not any(character in name for character in "/@:[]"):
        return name, parse_address(rest)
    return None, parse_address(word)


def address_of_sockname(family: int, sockname: object, *, v6only: bool) -> Address | None:
    """Return the address that ``getsockname()`` of a stream socket stands for.

    Args:
        family: ``SO_DOMAIN`` of the socket.
        sockname: What ``getsockname()`` returned; each family has its own shape.
        v6only: ``IPV6_V6ONLY`` of the socket; only asked for the address ``::``.

    Returns:
        The address, or None for an unnamed unix socket and for families that have no word.
    """
    found: Address | None = None
    match sockname:
        case str() if sockname:
            found = UnixAddress(sockname)
        case bytes() if sockname:
            found = AbstractAddress(sockname[1:])
        case (str() as host, int() as port) if family == socket.AF_INET:
            found = InetAddress(host, port)
        case ("::", int() as port, _, _) if not v6only:
            found = PortAddress(port)
        case (str() as host, int() as port, _, int() as scope):
            found = InetAddress(host.partition("%")[0], port, str(scope) if scope else "")
        case (int() as cid, int() as port) if family == getattr(socket, "AF_VSOCK", None):
            found = VsockAddress(cid, port)
    return found


def covering(wanted: Address, own: Sequence[Address | None]) -> list[int]:
    """Find which of a set of listeners' own addresses together are the wanted one.

    Addresses compare parsed. IPv4-mapped IPv6 equals IPv4. ``8080`` is a dual-stack socket, or the pair of a
    v6-only ``[::]:8080`` and ``0.0.0.0:8080``, or the latter alone, as systemd binds it where IPv6 is off.
    ``[::]:8080`` is the dual-stack socket or the v6-only one, whichever ``BindIPv6Only=`` made of it.

    Args:
        wanted: What was asked for; host names and scope names must be resolved before.
        own: The address of each listener.

    Returns:
        Indices into ``own`` in ascending order; empty if they do not make up the wanted address.
    """
    found = _indices(wanted, own)
    if isinstance(wanted, PortAddress) and not found:
        v4 = _indices(InetAddress("0.0.0.0", wanted.port), own)  # noqa: S104 - compared, not bound
        return sorted(_indices(InetAddress("::", wanted.port), own) + v4) if v4 else []
    if isinstance(wanted, InetAddress) and wanted.host == "::" and not found:
        return _indices(PortAddress(wanted.port), own)
    return found


def _indices(wanted: Address, own: Sequence[Address | None]) -> list[int]:
    canonical = _canonical(wanted)
    return [index for index, address in enumerate(own) if address and _canonical(address) == canonical]


def _canonical(address: Address) -> Address:
    if isinstance(address, InetAddress) and address.host.startswith(_MAPPED) and "." in address.host:
        return InetAddress(address.host.removeprefix(_MAPPED), address.port)
    return address


def _parse_unix(word: str) -> Address:
    if "\0" in word:
        raise _not_an_address(word, "a path has no NUL byte")
    if word == "/":
        raise _not_an_address(word, "a path is more than a slash")
    _checked_bytes(word)
    return UnixAddress(word)


def _parse_abstract(word: str) -> Address:
    if word == "@":
        raise _not_an_address(word, "an abstract name has at least one byte behind the '@'")
    return AbstractAddress(_checked_bytes(word)[1:])


def _checked_bytes(word: str) -> bytes:
    try:
        encoded = word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise _not_an_address(word, "it has characters that no path can have") from None
    if len(encoded) > SUN_PATH_MAX:
        raise _not_an_address(word, f"it has {len(encoded)} bytes, systemd allows {SUN_PATH_MAX}")
    return encoded


def _parse_vsock(word: str) -> Address:
    cid, colon, port = word.removeprefix("vsock:").partition(":")
    if not colon:
        raise _not_an_address(word, "a VM socket is vsock:CID:PORT")
    number = _parse_number(cid, VMADDR_ANY) if cid else VMADDR_ANY
    if number is None:
        raise _not_an_address(word, f"the CID {cid!r} is no number up to {VMADDR_ANY}")
    return VsockAddress(number, _parse_port(word, port, VMADDR_ANY))


def _parse_ipv6(word: str) -> Address:
    host, bracket, rest = word[1:].partition("]")
    if not bracket or not rest.startswith(":"):
        raise _not_an_address(word, "an IPv6 address is [ADDRESS]:PORT")
    port, _, scope_behind = rest[1:].partition("%")
    host, _, scope_within = host.partition("%")
    if (scope_within and scope_behind) or word.count("%") > bool(scope_within or scope_behind):
        raise _not_an_address(word, "a scope is [ADDRESS]:PORT%SCOPE, once")
    canonical = _canonical_ip(socket.AF_INET6, host)
    if canonical is None:
        raise _not_an_address(word, f"{host!r} is no IPv6 address")
    scope = scope_within or scope_behind
    # 0 means no interface to the kernel, and nothing to systemd.
    if scope == "0" or any(character in scope for character in "/[]: \0"):
        raise _not_an_address(word, f"{scope!r} is no name or index of an interface")
    return InetAddress(canonical, _parse_port(word, port), scope)


def _parse_host(word: str) -> Address:
    host, _, port = word.rpartition(":")
    number = _parse_port(word, port)
    canonical = _canonical_ip(socket.AF_INET, host)
    if canonical is not None:
        return InetAddress(canonical, number)
    labels = host.removesuffix(".").split(".")
    if ":" in host:
        raise _not_an_address(word, f"an IPv6 address is written [{host}]:{port}")
    if not all(label and all(c.isalnum() or c in "-_" for c in label) for label in labels):
        raise _not_an_address(word, f"{host!r} is no host name")
    if labels[-1].isdigit():
        raise _not_an_address(word, f"{host!r} is no IPv4 address")
    return HostAddress(host, number)


def _canonical_ip(family: int, text: str) -> str | None:
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError):  # ValueError: a NUL byte, or characters outside ASCII
        return None


def _parse_port(word: str, port: str, highest: int = 65535) -> int:
    number = _parse_number(port, highest)
    if number is None:
        raise _not_an_address(word, f"the port {port!r} is no number from 0 to {highest}")
    return number


def _parse_number(text: str, highest: int) -> int | None:
    """Return a plain decimal number, or None: no sign, no leading zero, no '_', ASCII digits alone."""
    if (
        not (text.isascii() and text.isdigit())
        or (text[0] == "0" and text != "0")
        or len(text) > len(str(highest))
    ):
        return None
    number = int(text)
    return number if number <= highest else None


def _not_an_address(word: str, why: str) -> AddressError:
    return AddressError(
        f"{word!r} is not an address: {why}. Expected one of 8080, 127.0.0.1:80, [::1]:80, "
        f"[fe80::1]:80%eth0, /run/x.sock, @abstract, vsock:2:80, host:80"
    )
