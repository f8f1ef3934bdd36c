"""One passed descriptor: names, words for error texts, and wrapping without touching what others share."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from sdlisten.descriptor import Kind, describe
from sdlisten.errors import DescriptorError
from sdlisten.inherited import InheritedFd, join
from sdlisten.listener import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator


def inherited(thing: socket.socket, name: str = "web") -> InheritedFd:
    """Look at a socket as if it had been passed."""
    return InheritedFd(describe(thing.fileno()), name)


@pytest.mark.parametrize(
    ("given", "name", "stored"),
    [
        ("web", "web", False),
        ("unknown", "unknown", False),
        ("sdlisten", "sdlisten", False),
        ("stored", "stored", True),
        ("sdlisten.f.web", "web", True),
        ("sdlisten.f.", "", True),
        ("sdlisten.f.sdlisten.f.x", "sdlisten.f.x", True),
        ("sdlisten.c.0", "sdlisten.c.0", True),
        ("sdlisten.s.state", "sdlisten.s.state", True),
        ("sdlisten.", "sdlisten.", True),
    ],
)
def test_stored_names(tcp: socket.socket, given: str, name: str, *, stored: bool) -> None:
    """What comes from the fd store is told by its name; what store(name=...) kept has that name again."""
    found = inherited(tcp, given)

    assert (found.name, found.stored) == (name, stored)
    assert found.stored_name == (given if given.startswith("sdlisten.") else "")


@pytest.mark.parametrize(
    ("name", "unnamed"),
    [("", True), ("unknown", True), ("hello.socket", True), ("web", False), ("socket", False)],
)
def test_unnamed(tcp: socket.socket, name: str, *, unnamed: bool) -> None:
    """Nobody named it if it is called nothing, "unknown", or after its unit."""
    assert inherited(tcp, name).unnamed is unnamed


def test_says_what_it_is(tcp: socket.socket, udp: socket.socket) -> None:
    """Number, name and address stand in error texts; without an address, the kind."""
    port = tcp.getsockname()[1]

    assert str(inherited(tcp)) == f"fd {tcp.fileno()} 'web' 127.0.0.1:{port}"
    assert repr(inherited(tcp)) == f"<InheritedFd fd {tcp.fileno()} 'web' 127.0.0.1:{port}>"
    assert repr(inherited(tcp, "stored")).endswith(f"'stored' 127.0.0.1:{port} stored>")
    assert str(inherited(udp)) == f"fd {udp.fileno()} 'web' datagram socket"
    assert inherited(udp).address is None


def test_knows_kind_and_type(tcp: socket.socket, udp: socket.socket) -> None:
    """Kind and SO_TYPE are at hand; nobody has taken it yet."""
    with open(os.devnull, "rb") as file:
        device = InheritedFd(describe(file.fileno()), "")

    assert (inherited(tcp).kind, inherited(tcp).type) == (Kind.LISTENER, socket.SOCK_STREAM)
    assert (inherited(udp).kind, inherited(udp).type) == (Kind.DATAGRAM, socket.SOCK_DGRAM)
    assert (device.kind, device.type) == (Kind.DEVICE, -1)
    assert device.taken_by is None


def test_join_lists_ten(tcp: socket.socket) -> None:
    """An error text stays readable when hundreds were passed."""
    one = inherited(tcp)

    assert join([]) == ""
    assert join([one] * 10) == ", ".join([str(one)] * 10)
    assert join([one] * 13) == ", ".join([str(one)] * 10) + " and 3 more"


def test_check_same(tcp: socket.socket, udp: socket.socket) -> None:
    """The number has to mean what was passed: another file there, or none, is an error that says so."""
    sock = tcp.dup()
    found = inherited(sock)
    found.check_same()

    os.dup2(udp.fileno(), sock.fileno(), inheritable=False)
    with pytest.raises(DescriptorError) as caught:
        found.check_same()
    assert str(caught.value) == (
        f"fd {found.fd} 'web' 127.0.0.1:{tcp.getsockname()[1]} is another file meanwhile: "
        f"some code in this process closed a descriptor that it did not own"
    )
    assert caught.value.fd == found.fd

    sock.close()
    with pytest.raises(DescriptorError, match=r" is closed meanwhile: some code in this process closed"):
        found.check_same()


@pytest.fixture(params=[None, 5.0], ids=["no default timeout", "default timeout"])
def _default_timeout(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with and without socket.setdefaulttimeout(), which makes new socket objects non-blocking."""
    socket.setdefaulttimeout(request.param)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("_default_timeout")
@pytest.mark.parametrize("blocking", [True, False])
def test_wrapping_leaves_the_flag(tcp: socket.socket, *, blocking: bool) -> None:
    """O_NONBLOCK, which all holders share, stays; the object knows it, also beside a default timeout."""
    os.set_blocking(tcp.fileno(), blocking)
    taken = inherited(tcp).to_socket()

    assert os.get_blocking(tcp.fileno()) is blocking
    assert taken.gettimeout() == (None if blocking else 0.0)
    assert (taken.family, taken.type, taken.proto) == (tcp.family, tcp.type, socket.IPPROTO_TCP)
    assert taken.fileno() == tcp.detach()
    taken.close()


@pytest.mark.parametrize(("name", "origin"), [("web", Origin.ADOPTED), ("sdlisten.f.web", Origin.STORED)])
def test_becomes_a_listener(tcp: socket.socket, name: str, origin: Origin) -> None:
    """A listener owns the descriptor, at its number, under its name, and says where it came from."""
    found = inherited(tcp, name)
    fd = tcp.detach()

    with found.to_listener() as listener:
        assert (listener.fileno(), listener.name, listener.origin) == (fd, "web", origin)
        assert os.get_blocking(fd) is False
