"""Which passed listeners are meant: what a word leaves open is asked of the kernel."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from sdlisten.activation import Activation
from sdlisten.address import parse_address
from sdlisten.binding import bind_sockets
from sdlisten.errors import AddressError, ListenEnvironmentError
from sdlisten.matching import Wanted, _concrete, fitting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    Passing = Callable[..., Any]


def chosen(word: str | int | None, name: str | None = None, *, untouched: bool = True) -> list[int]:
    """Return the numbers of the passed descriptors that fit a request; leaves nothing taken."""
    found = fitting(Activation.current().descriptors, Wanted(word, name), untouched=untouched)
    return [one.fd for one in found]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Give back what the test was passed."""
    yield
    Activation.current().close_remaining()


def tcp_at(host: str, port: int = 0, *, v6only: bool = True) -> socket.socket:
    """Listen on an address; an IPv6 one is dual-stack only if asked for."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    sock.bind((host, port))
    sock.listen()
    return sock


def test_port_is_the_dual_stack_socket(passing: Passing) -> None:
    """A bare port and [::] both mean the dual-stack socket; 0.0.0.0 does not."""
    with tcp_at("::", v6only=False) as dual:
        port = dual.getsockname()[1]
        passing(dual)

    assert chosen(port, untouched=False) == [3]
    assert chosen(f"[::]:{port}", untouched=False) == [3]
    assert chosen(f"0.0.0.0:{port}", untouched=False) == []


def test_port_is_the_pair_of_families(passing: Passing) -> None:
    """A bare port is the pair of a v6-only and an IPv4 socket, or the latter alone; not the former alone."""
    # It tries again where the port that one family got is taken in the other.
    v4, v6 = sorted(bind_sockets(0), key=lambda sock: sock.family)
    with v4, v6:
        port = v6.getsockname()[1]
        passing(v4, v6)

    assert chosen(port, untouched=False) == [3, 4]
    assert chosen(f"[::]:{port}", untouched=False) == [4]
    assert chosen(f"0.0.0.0:{port}", untouched=False) == [3]


def test_v6_alone_is_not_the_port(passing: Passing) -> None:
    """A v6-only socket leaves out half of what a bare port means."""
    with tcp_at("::") as v6:
        port = v6.getsockname()[1]
        passing(v6)

    assert chosen(port, untouched=False) == []


def test_mapped_is_ipv4(passing: Passing) -> None:
    """An IPv4-mapped address is the IPv4 address, either way round."""
    with tcp_at("127.0.0.1") as v4, tcp_at("::ffff:127.0.0.1", v6only=False) as mapped:
        first, second = v4.getsockname()[1], mapped.getsockname()[1]
        passing(v4, mapped)

    assert chosen(f"[::ffff:127.0.0.1]:{first}", untouched=False) == [3]
    assert chosen(f"127.0.0.1:{second}", untouched=False) == [4]


def test_scope_is_compared_by_index(passing: Passing) -> None:
    """The name of an interface is its index; an interface that does not exist matches nothing."""
    passing()
    index = socket.if_nametoindex("lo")

    assert [f"[fe80::1]:80%{index}"] == [str(found) for found in _concrete(parse_address("[fe80::1]:80%lo"))]
    assert [str(found) for found in _concrete(parse_address("[fe80::1]:80%no0"))] == ["[fe80::1]:80%no0"]


def test_host_name_needs_all_its_addresses(passing: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name fits if every address it resolves to is listened on, and not if one is missing."""
    with tcp_at("127.0.0.1") as first, tcp_at("127.0.0.2", first.getsockname()[1]) as second:
        port = first.getsockname()[1]
        passing(first, second)
    answers = ["127.0.0.1", "127.0.0.2"]

    def resolve(_host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port)) for answer in answers]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    assert chosen(f"two.example:{port}", untouched=False) == [3, 4]
    answers.append("127.0.0.3")
    assert chosen(f"two.example:{port}", untouched=False) == []


def test_host_name_that_does_not_resolve(passing: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that does not resolve matches nothing, and is no error: other rules may still decide."""
    with tcp_at("127.0.0.1") as sock:
        passing(sock)

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    assert chosen("nowhere.example:80", untouched=False) == []
    assert chosen("nowhere.example:80", untouched=True) == [3]


def test_path_through_a_link(passing: Passing, tmp_path: Path) -> None:
    """A path is the same through a symbolic link to its directory (/var/run and /run)."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "run" / "x.sock"))
        sock.listen()
        passing(sock, names=["x.socket"])

    assert chosen(str(tmp_path / "link" / "x.sock"), untouched=False) == [3]
    assert chosen(str(tmp_path / "x.sock"), untouched=False) == []


def test_abstract_names_are_bytes(passing: Passing) -> None:
    """Abstract names compare as bytes, and are no paths."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0sdlisten/matching")
        sock.listen()
        passing(sock)

    assert chosen("@sdlisten/matching", untouched=False) == [3]
    assert chosen("/sdlisten/matching", untouched=False) == []


def test_one_group_of_two_at_one_address_is_open(passing: Passing) -> None:
    """Two named groups on one port (SO_REUSEPORT): it stays open which is meant, so neither is."""
    first = socket.create_server(("127.0.0.1", 0), reuse_port=True)
    port = first.getsockname()[1]
    with first, socket.create_server(("127.0.0.1", port), reuse_port=True) as second:
        passing(first, second, names=["blue", "green"])

    assert chosen(f"127.0.0.1:{port}", untouched=False) == []
    assert chosen(f"127.0.0.1:{port}", "green", untouched=False) == [4]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_two_paths_are_not_one_endpoint(passing: Passing, tmp_path: Path, kind: socket.SocketKind) -> None:
    """Of two unnamed unix sockets neither is the only one, be they of one type or of two."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX, kind) as second:
        for number, sock in enumerate((first, second)):
            sock.bind(str(tmp_path / f"{number}"))
            sock.listen()
        passing(first, second)

    assert chosen(None) == []
    assert chosen(str(tmp_path / "other")) == []
    assert chosen(str(tmp_path / "1")) == [4]


def test_words(passing: Passing) -> None:
    """A request writes itself as the call it came from, and refuses what cannot be one."""
    passing()

    assert str(Wanted(8080, "http")) == "listen('8080', name='http')"
    assert str(Wanted("8080", None)) == "listen('8080')"
    assert str(Wanted(None, "http")) == "listen(name='http')"
    assert str(Wanted(None, None)) == "listen()"
    with pytest.raises(AddressError):
        Wanted("no address", None)
    with pytest.raises(ListenEnvironmentError):
        Wanted(None, "a:b")
