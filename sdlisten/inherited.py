"""One passed descriptor: its number, its FileDescriptorName, what it is, who took it."""

from __future__ import annotations

import os
import socket

from sdlisten.descriptor import Kind
from sdlisten.errors import DescriptorError
from sdlisten.listener import Listener, Origin, SharedSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdlisten.address import Address
    from sdlisten.descriptor import Descriptor

__all__ = ("InheritedFd", "join")

# What our Notifier puts into the fd store is called sdlisten.KIND.NAME; "stored" is systemd's name for what
# others put there without FDNAME=.
_STORED_PREFIX = "sdlisten."
_STORED_FD_PREFIX = "sdlisten.f."
_STORED_DEFAULT = "stored"

_JOINED = 10  # descriptors an error text lists


class InheritedFd:
    """One passed descriptor.

    Attributes:
        fd: Its number; it stays where the manager put it.
        name: Its FileDescriptorName, "unknown" without one; for what ``Notifier.store`` kept, the name there.
        kind: What the kernel says it is.
        type: SO_TYPE as an int; -1 if it is no socket.
        stored: Whether it comes from the manager's fd store and not from a ``.socket`` unit.
        stored_name: What the fd store calls it, if one of sdlisten's own names; else "".
        address: The listening address, or None if it has none that can be written as a word.
        taken_by: Who took it, in words; None while it can be taken.
    """

    __slots__ = ("_found", "address", "fd", "kind", "name", "stored", "stored_name", "taken_by", "type")

    def __init__(self, found: Descriptor, name: str) -> None:
        self._found = found
        self.fd = found.fd
        self.kind = found.kind
        self.type = found.type
        self.address: Address | None = found.address
        self.stored = name == _STORED_DEFAULT or name.startswith(_STORED_PREFIX)
        self.stored_name = name if name.startswith(_STORED_PREFIX) else ""
        self.name = name.removeprefix(_STORED_FD_PREFIX)
        self.taken_by: str | None = None

    def __str__(self) -> str:
        return f"fd {self.fd} {self.name!r} {self._found}"

    def __repr__(self) -> str:
        return f"<InheritedFd {self}{' stored' if self.stored else ''}>"

    @property
    def unnamed(self) -> bool:
        """Whether nobody named it: systemd then calls it after the unit, others "unknown" or nothing."""
        return self.name in {"", "unknown"} or self.name.endswith(".socket")

    def check_same(self) -> None:
        """Check that the number still means what was passed.

        Raises:
            DescriptorError: Somebody closed the descriptor, and perhaps opened another in its place.
        """
        try:
            status = os.fstat(self.fd)
        except OSError:
            now = "is closed"
        else:
            if (status.st_dev, status.st_ino) == self._found.identity:
                return
            now = "is another file"
        text = f"{self} {now} meanwhile: some code in this process closed a descriptor that it did not own"
        raise DescriptorError(text, fd=self.fd)

    def to_socket(self) -> socket.socket:
        """Wrap the descriptor in a socket that owns it; nothing changes in the kernel.

        A listener becomes a `SharedSocket`: the manager holds it too.
        """
        found = self._found
        blocking = os.get_blocking(self.fd)
        # The object does not learn O_NONBLOCK from the descriptor. SOCK_NONBLOCK tells it, and keeps its
        # constructor from setting the flag, which other holders share, after socket.setdefaulttimeout().
        kind = SharedSocket if found.kind is Kind.LISTENER else socket.socket
        sock = kind(found.family, found.type | socket.SOCK_NONBLOCK, found.proto, self.fd)
        if blocking:
            sock.setblocking(True)  # tells the object: the descriptor does block
        return sock

    def to_listener(self) -> Listener:
        """Wrap the descriptor in a Listener that owns it: non-blocking, close-on-exec."""
        origin = Origin.STORED if self.stored else Origin.ADOPTED
        return Listener(self.to_socket(), name=self.name, origin=origin)


def join(descriptors: Iterable[InheritedFd]) -> str:
    """Write descriptors into an error text, the first ten of them."""
    words = [str(inherited) for inherited in descriptors]
    more = len(words) - _JOINED
    return ", ".join(words[:_JOINED]) + (f" and {more} more" if more > 0 else "")
