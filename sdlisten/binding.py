"""Make listening sockets: TCP, unix, vsock; non-blocking and close-on-exec from birth, owned by the caller.

`bind_sockets` and `bind_unix_socket` take Tornado's arguments and mean what Tornado means, its faults mended:
whatever fails, every socket of the call is closed at once; on port 0 the whole set is tried again where the
port is taken in one family; nothing left to bind is an error, never an empty list; a unix path never has a
looser mode than asked, and no living server loses its path. The kernel's refusals stay `OSError` and name the
address; a note (`BaseException.add_note`) says what helps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import stat
import time

from sdlisten.address import SUN_PATH_MAX, address_of_sockname
from sdlisten.errors import AddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Listen = Callable[[int, tuple[Any, ...]], socket.socket]
    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Target = tuple[int, tuple[Any, ...]]  # a family and its sockaddr, whose shape depends on the family

__all__ = ("DEFAULT_BACKLOG", "bind_sockets", "bind_unix_path", "bind_unix_socket", "bind_vsock")

DEFAULT_BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn (4096 by default)."""

_LAST_PORT = 65535
_UNPRIVILEGED_PORT = 1024
# Even with 9 of 10 ports taken in the other family, all of these fail once in 1,400,000,000 times.
_PORT_TRIES = 200
# We hold the lock for microseconds; a systemd-tmpfiles that cleans the directory may hold it longer.
_LOCK_SECONDS = 10.0


def bind_sockets(  # noqa: PLR0917 - Tornado's argument order is the contract
    port: int,
    address: str | None = None,
    family: int = socket.AF_UNSPEC,
    backlog: int = DEFAULT_BACKLOG,
    flags: int | None = None,
    reuse_port: bool = False,
    *,
    dual_stack: bool = False,
) -> list[socket.socket]:
    """Bind and listen on a TCP port, at every address that the arguments stand for.

    Follows getaddrinfo(3), tcp(7), ipv6(7). IPv6 sockets are v6-only; IPv4 comes first. Left out are a family
    that the system does not have, and ``::1`` of ``localhost`` where no interface has it.

    Args:
        port: 0 to 65535, an int; 0 means a free port, the same for all sockets of the call.
        address: An IP address (``fe80::1%eth0`` with a scope), a host name for all its addresses, or None or
            ``""`` for every interface.
        family: ``AF_INET`` or ``AF_INET6`` alone, or ``AF_UNSPEC`` for both.
        backlog: Connections that may wait to be accepted.
        flags: ``AI_*`` flags for getaddrinfo; ``AI_PASSIVE`` by default.
        reuse_port: Set SO_REUSEPORT. Not for restarts: a listener that closes takes its queue with it.
        dual_stack: Bind one ``[::]`` socket that takes IPv4 as well, as systemd does for
            ``ListenStream=8080``; where IPv6 is off, ``0.0.0.0``. Only for every interface.

    Returns:
        The sockets, owned by the caller; at least one.

    Raises:
        AddressError: The port is out of range, or the address cannot be a host name.
        TypeError: The port is not an int.
        ValueError: ``reuse_port`` on a platform without it; ``dual_stack`` with another address or family.
        OSError: The kernel or the resolver (`socket.gaierror`) refused, or nothing was left to bind.
    """
    if not isinstance(port, int):
        raise TypeError(f"port={port!r} is not an int from 0 to {_LAST_PORT}")
    if not 0 <= port <= _LAST_PORT:
        raise AddressError(f"port={port} is not a port: expected 0 to {_LAST_PORT}")
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("reuse_port=True, but this platform has no SO_REUSEPORT")
    listen = functools.partial(_listen_tcp, backlog, reuse_port, dual_stack)
    if not dual_stack:
        targets = _resolve(address or None, port, family, socket.AI_PASSIVE if flags is None else flags)
        return _bind_set(targets, address, port, listen)
    if address not in {None, "", "::"} or family not in {socket.AF_UNSPEC, socket.AF_INET6}:
        raise ValueError(f"dual_stack=True is for [::] alone, not for address={address!r}, family={family!r}")
    try:
        return _bind_set([(socket.AF_INET6, ("::", port, 0, 0))], address, port, listen)
    except OSError as error:
        if family == socket.AF_INET6 or error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
            raise
    return _bind_set([(socket.AF_INET, ("0.0.0.0", port))], address, port, listen)  # noqa: S104 - asked for


def bind_unix_socket(file: Path, mode: int = 0o600, backlog: int = DEFAULT_BACKLOG) -> socket.socket:
    """Bind and listen on a unix stream socket, as in unix(7).

    A socket that no process holds any more is replaced; a living one is an error; a file, a symbolic link or
    a directory is left as it is. Of two that start at the same instant exactly one wins. At no instant has
    the path a looser mode than asked, whatever the umask. Closing the socket does not remove the path.

    Args:
        file: A path of at most 107 bytes. With a leading NUL byte or ``@`` an abstract name (Linux): no file
            is made, and ``mode`` means nothing. A file with such a name is ``./@name``.
        mode: Permissions of the path, 0 to 0o777; who may write may connect.
        backlog: Connections that may wait to be accepted, as in listen(2).

    Returns:
        The socket, owned by the caller.

    Raises:
        AddressError: The path is empty, too long or has a NUL byte in it, or something else is there.
        ValueError: The mode is no mode.
        OSError: The kernel refused. EADDRINUSE: a server lives there; ENOENT: the directory does not exist;
            ETIMEDOUT: another process keeps the directory locked.
    """
    name = os.fsencode(file)
    if name[:1] not in {b"@", b"\0"}:
        return bind_unix_path(file, mode, backlog)[0]
    _check_length(name, len(name) - 1)
    return _listen_on(_new_socket(socket.AF_UNIX), b"\0" + name[1:], backlog)


def bind_unix_path(file: Path, mode: int, backlog: int) -> tuple[socket.socket, tuple[int, int]]:
    """Do what `bind_unix_socket` does with a path, and tell which file was made.

    Returns:
        The socket, owned by the caller, and (st_dev, st_ino) of the path. The pair means this file only while
        the socket is open: compare, unlink, and only then close.
    """
    encoded = os.fsencode(file)
    path = os.fsdecode(encoded)
    _check_length(encoded, len(encoded))
    if "\0" in path:  # the kernel would read up to there and bind another path
        raise AddressError(f"{path!r} cannot be a unix socket: a path has no NUL byte")
    if mode & ~0o777:
        raise ValueError(f"mode={mode!r} is not a mode: expected 0 to 0o777, such as 0o660")
    # Of two starters one must not unlink what the other has bound since it looked. A lock file would stay.
    with contextlib.ExitStack() as at_end:
        _make_way(path, locked=_lock(os.path.dirname(path) or ".", at_end))
        try:
            return _bind_path(path, mode, backlog)
        except OSError as error:
            raise _refusal(error, path) from None


def bind_vsock(cid: int, port: int, backlog: int = DEFAULT_BACKLOG) -> socket.socket:
    """Bind and listen on a VM socket, as in vsock(7), and return it, owned by the caller.

    0xFFFFFFFF means any cid of this machine, and any free port. OSError: as the kernel says.
    """
    family: int | None = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise OSError(errno.EAFNOSUPPORT, f"this platform has no VM sockets: vsock:{cid}:{port}")
    return _listen_on(_new_socket(family), (cid, port), backlog)


def _new_socket(family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
    # In the type and not set later: another thread's fork() may come in between.
    at_birth = getattr(socket, "SOCK_NONBLOCK", 0) | getattr(socket, "SOCK_CLOEXEC", 0)
    sock = socket.socket(family, kind | at_birth, proto)
    sock.setblocking(False)  # macOS has no SOCK_NONBLOCK
    return sock


def _listen_on(
    sock: socket.socket, sockaddr: tuple[Any, ...] | bytes, backlog: int, *options: tuple[int, int, int]
) -> socket.socket:
    """Take ownership of a socket, set its options, bind and listen; if anything fails, it is closed."""
    try:
        for level, name, value in options:
            sock.setsockopt(level, name, value)
        sock.bind(sockaddr)
        # EADDRINUSE may come here too: with SO_REUSEADDR two sockets share a port until one of them listens.
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        port = sockaddr[1] if isinstance(sockaddr, tuple) else None
        raise _refusal(error, str(address_of_sockname(sock.family, sockaddr, v6only=True)), port) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _refusal(error: OSError, where: str, port: int | None = None) -> OSError:
    """Return the kernel's error with the address in its text and, as a note, what can be done about it."""
    refusal = OSError(error.errno, error.strerror, where)
    if error.errno == errno.EADDRINUSE:
        unit = "systemctl start NAME.socket"
        refusal.add_note(f"{where} is in use; if a .socket unit holds it, start through the unit: {unit}")
    elif error.errno == errno.EACCES and port is not None and port < _UNPRIVILEGED_PORT:
        refusal.add_note("ports below 1024 need CAP_NET_BIND_SERVICE; a .socket unit can bind it for you.")
    return refusal


def _resolve(address: str | None, port: int, family: int, flags: int) -> list[Target]:
    """Return what to bind: each address once, IPv4 first, otherwise in the resolver's order."""
    numeric = _read_numeric(address, port, family) if address else None
    if numeric:
        return [numeric]
    try:
        found = socket.getaddrinfo(address, port, family, socket.SOCK_STREAM, socket.IPPROTO_TCP, flags)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"{error.strerror}: address={address!r}") from None
    except ValueError as error:  # UnicodeError of the idna codec
        raise AddressError(f"address={address!r} cannot be a host name: {error}") from error
    targets: list[Target] = sorted(((entry[0], entry[4]) for entry in found), key=lambda target: target[0])
    if address == "localhost":  # macOS adds fe80::1%lo0, and its firewall asks the user about it each time
        targets = [target for target in targets if not any(target[1][3:])]
    return list(dict.fromkeys(targets))


def _read_numeric(address: str, port: int, family: int) -> Target | None:
    if family in {socket.AF_UNSPEC, socket.AF_INET} and _is_numeric(socket.AF_INET, address):
        return socket.AF_INET, (address, port)
    host, percent, zone = address.partition("%")
    if family in {socket.AF_UNSPEC, socket.AF_INET6} and _is_numeric(socket.AF_INET6, host):
        return socket.AF_INET6, (host, port, 0, _scope(zone) if percent else 0)
    return None


def _is_numeric(family: int, text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte
        return bool(socket.inet_pton(family, text))
    return False


def _scope(zone: str) -> int:
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(zone)
    if zone.isascii() and zone.isdigit():  # a name first, then a number: as in getaddrinfo(3)
        return int(zone)
    raise OSError(errno.ENODEV, f"{os.strerror(errno.ENODEV)}: no network interface is called {zone!r}")


def _bind_set(targets: list[Target], address: str | None, port: int, listen: Listen) -> list[socket.socket]:
    for _ in range(_PORT_TRIES - 1):
        try:
            return _bind_once(targets, address, port, listen)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise
    return _bind_once(targets, address, port, listen)


def _bind_once(targets: list[Target], address: str | None, port: int, listen: Listen) -> list[socket.socket]:
    """Bind all or none; with port 0, all to the one that the kernel chose for the first."""
    sockets: list[socket.socket] = []
    left_out: tuple[int | None, str | None] = errno.EADDRNOTAVAIL, "the resolver knows no address"
    with contextlib.ExitStack() as on_failure:
        for family, (host, _, *rest) in targets:
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(on_failure.enter_context(listen(family, (host, chosen, *rest))))
            except OSError as error:
                # In many containers localhost is ::1 as well, and no interface has it.
                absent = error.errno == errno.EADDRNOTAVAIL and (address, host) == ("localhost", "::1")
                if not absent and error.errno != errno.EAFNOSUPPORT:
                    raise
                left_out = error.errno, error.strerror
        on_failure.pop_all()
    if not sockets:
        raise OSError(left_out[0], f"nothing left to bind: address={address!r}, port={port}: {left_out[1]}")
    return sockets


def _listen_tcp(
    backlog: int, reuse_port: bool, dual_stack: bool, family: int, sockaddr: tuple[Any, ...]
) -> socket.socket:
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]
    if reuse_port:
        options.append((socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))
    if family == socket.AF_INET6:
        if not socket.has_ipv6:  # such a Python cannot even name an IPv6 address (bpo-16208)
            raise OSError(errno.EAFNOSUPPORT, "this Python was built without IPv6")
        options.append((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual_stack)))
    # asyncio sets TCP_NODELAY on what it accepts if the listener's protocol says TCP, not if it says 0.
    return _listen_on(_new_socket(family, proto=socket.IPPROTO_TCP), sockaddr, backlog, *options)


def _check_length(name: bytes, length: int) -> None:
    text = os.fsdecode(name)
    if not length:  # unix(7), "autobind": the kernel would choose a name
        raise AddressError(f"{text!r} cannot be a unix socket: it is empty")
    if length > SUN_PATH_MAX:
        raise AddressError(f"{text!r} cannot be a unix socket: it has {length} bytes, {SUN_PATH_MAX} may be")


def _lock(directory: str, at_end: contextlib.ExitStack) -> bool:
    """Lock a directory until ``at_end``, and say whether that worked.

    It does not where the directory is not ours to read or the file system has no flock(2). Starters are then
    kept apart by bind(2) alone, so nothing may be unlinked.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return False
    except FileNotFoundError as error:
        error.add_note(f"make the directory {directory} first: RuntimeDirectory= in the unit, or mkdir")
        raise
    at_end.callback(os.close, descriptor)
    # With a limit: whoever can read a directory can lock it for ever, and a silent hang explains nothing.
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                text = f"another process has this directory locked for {_LOCK_SECONDS} s (see lslocks)"
                raise OSError(errno.ETIMEDOUT, text, directory) from None
            time.sleep(0.005)
        except OSError:  # ENOLCK, EOPNOTSUPP, ENOSYS; EBADF: NFS locks only what is open for writing
            return False
        else:
            # close() alone leaves the lock to a child that another thread may have forked meanwhile.
            at_end.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            return True


def _make_way(path: str, *, locked: bool) -> None:
    """Unlink a dead socket; refuse whatever else is there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        kinds = {"-": "a file", "d": "a directory", "l": "a symbolic link", "p": "a FIFO"}
        kind = kinds.get(stat.filemode(found.st_mode)[0], "something else")
        raise AddressError(f"{path!r} is {kind}, not a socket: remove it, or choose another path")
    in_use = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
    if not _is_dead(path):
        raise _refusal(in_use, path)
    if not locked:
        in_use.add_note(f"nobody holds {path}, but its directory cannot be locked: remove it by hand")
        raise in_use
    _unlink_same(path, found)


def _is_dead(path: str) -> bool:
    """Tell whether no process holds the socket at a path any more.

    Linux looks for the socket before it looks at its type (unix_find_bsd in net/unix/af_unix.c):
    ECONNREFUSED means that there is none, EPROTOTYPE one of another type. So a datagram socket asks without
    leaving a connection in a living server's queue, and sees a server that does not listen yet. gVisor
    refuses it at every stream listener (connectionedEndpoint.UnidirectionalConnect): hence the second one.
    Any other errno means alive: EAGAIN is a full queue, EACCES a server not meant for us.
    """
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with _new_socket(socket.AF_UNIX, kind) as probe:
            if probe.connect_ex(path) not in {errno.ECONNREFUSED, errno.ENOENT}:
                return False
    return True


def _bind_path(path: str, mode: int, backlog: int) -> tuple[socket.socket, tuple[int, int]]:
    with contextlib.ExitStack() as on_failure:
        sock = on_failure.enter_context(_new_socket(socket.AF_UNIX))
        # Linux gives the path the mode of the unbound socket, less the umask, which is the whole process's
        # and not ours to change. macOS: EINVAL; there nobody can connect before the listen() below.
        with contextlib.suppress(OSError):
            os.fchmod(sock.fileno(), mode)
        sock.bind(path)  # never a temporary name: getsockname() keeps for ever what was bound
        made = os.lstat(path)
        on_failure.callback(_unlink_same, path, made)  # before close(): an open socket keeps its inode number
        if stat.S_IMODE(made.st_mode) != mode:
            _chmod(path, made, mode)
        sock.listen(backlog)
        on_failure.pop_all()
    return sock, (made.st_dev, made.st_ino)


def _chmod(path: str, made: os.stat_result, mode: int) -> None:
    """Set the mode of the socket just bound, and never of what somebody may have put in its place."""
    if not hasattr(os, "O_PATH"):  # macOS
        os.chmod(path, mode, follow_symlinks=False)
        return
    # Where glibc is older than 2.32, follow_symlinks=False is a NotImplementedError; newer ones do this.
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not os.path.samestat(os.fstat(descriptor), made):
            raise FileExistsError(errno.EEXIST, "replaced by another file while it was being bound")
        os.chmod(f"/proc/self/fd/{descriptor}", mode)
    finally:
        os.close(descriptor)


def _unlink_same(path: str, found: os.stat_result) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), found):
            os.unlink(path)
