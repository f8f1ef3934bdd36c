"""Words as in ListenStream=: read, written, compared, and judged by systemd itself."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import subprocess
from typing import NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdlisten.address import (
    VMADDR_ANY,
    AbstractAddress,
    Address,
    HostAddress,
    InetAddress,
    PortAddress,
    UnixAddress,
    VsockAddress,
    address_of_sockname,
    covering,
    parse_address,
    parse_named_address,
)
from sdlisten.errors import AddressError

SECONDS = 20.0  # far beyond what anything here takes


def ip_text(family: int, packed: bytes) -> str:
    """Write an IP address as the kernel's tools do."""
    return socket.inet_ntop(family, packed)


def path_of(data: bytes) -> str:
    """Make the path that some bytes behind a slash are."""
    return "/" + data.decode("utf-8", "surrogateescape")


PORTS = st.integers(0, 65535)
NUMBERS = st.integers(0, VMADDR_ANY)
LABELS = st.text("abcxyzABC0189-_ä", min_size=1, max_size=12)
SCOPES = st.text(st.characters(codec="utf-8", exclude_characters="/[]:%", exclude_categories=("Z", "C")))
ADDRESSES: st.SearchStrategy[Address] = st.one_of(
    st.builds(PortAddress, PORTS),
    st.builds(
        InetAddress, st.binary(min_size=4, max_size=4).map(lambda b: ip_text(socket.AF_INET, b)), PORTS
    ),
    st.builds(
        InetAddress,
        st.binary(min_size=16, max_size=16).map(lambda b: ip_text(socket.AF_INET6, b)),
        PORTS,
        SCOPES.filter(lambda scope: scope != "0"),
    ),
    st.builds(UnixAddress, st.binary(min_size=1, max_size=106).filter(lambda b: b"\0" not in b).map(path_of)),
    st.builds(AbstractAddress, st.binary(min_size=1, max_size=106)),
    st.builds(VsockAddress, NUMBERS, NUMBERS),
    st.builds(
        HostAddress,
        st.lists(LABELS, min_size=1, max_size=4)
        .filter(lambda labels: not labels[-1].isdigit())
        .map(".".join),
        PORTS,
    ),
)


@given(ADDRESSES)
@example(InetAddress("::ffff:127.0.0.1", 80))
@example(VsockAddress(VMADDR_ANY, VMADDR_ANY))
def test_reads_what_it_writes(address: Address) -> None:
    """The word of an address is read as the same address, and has the same hash."""
    again = parse_address(str(address))

    assert again == address
    assert hash(again) == hash(address)
    assert str(again) == str(address)


@given(
    st.one_of(
        st.text(st.characters()),
        st.builds(
            "".join,
            st.lists(st.sampled_from(["/", "@", "[", "]", ":", "%", "vsock:", "::1", "80", "a", "\ud800"])),
        ),
    )
)
def test_refuses_only_with_its_own_error(word: str) -> None:
    """Any text is either an address, whose word is read as the same one, or an AddressError."""
    with contextlib.suppress(AddressError):
        address = parse_address(word)

        assert parse_address(str(address)) == address


ACCEPTED = {
    "8080": PortAddress(8080),
    "0": PortAddress(0),
    "65535": PortAddress(65535),
    "127.0.0.1:80": InetAddress("127.0.0.1", 80),
    "0.0.0.0:80": InetAddress("0.0.0.0", 80),  # noqa: S104 - read, not bound
    "[::1]:80": InetAddress("::1", 80),
    "[::]:80": InetAddress("::", 80),
    "[0:0:0:0:0:0:0:1]:80": InetAddress("::1", 80),
    "[FE80::1]:80%eth0": InetAddress("fe80::1", 80, "eth0"),
    "[fe80::1%eth0]:80": InetAddress("fe80::1", 80, "eth0"),
    "[fe80::1]:80%2": InetAddress("fe80::1", 80, "2"),
    "[::ffff:127.0.0.1]:80": InetAddress("::ffff:127.0.0.1", 80),
    "/run/x.sock": UnixAddress("/run/x.sock"),
    "/run/ä b=c:80": UnixAddress("/run/ä b=c:80"),
    "/run/\udcff": UnixAddress("/run/\udcff"),
    "/" + "a" * 106: UnixAddress("/" + "a" * 106),
    "@name": AbstractAddress(b"name"),
    "@a@b/c": AbstractAddress(b"a@b/c"),
    "@ä": AbstractAddress("ä".encode()),
    "@\udcff": AbstractAddress(b"\xff"),
    "@" + "a" * 106: AbstractAddress(b"a" * 106),
    "vsock:2:80": VsockAddress(2, 80),
    "vsock::80": VsockAddress(VMADDR_ANY, 80),
    "vsock:4294967295:1": VsockAddress(VMADDR_ANY, 1),
    "localhost:80": HostAddress("localhost", 80),
    "my-host_1.example.:80": HostAddress("my-host_1.example.", 80),
    "1.example:80": HostAddress("1.example", 80),
}


@pytest.mark.parametrize("word", ACCEPTED)
def test_accepts(word: str) -> None:
    """Each form of the grammar is read as what it means."""
    assert parse_address(word) == ACCEPTED[word]


def test_an_int_is_a_port() -> None:
    """A port may be given as an int, and only a port."""
    assert parse_address(8080) == PortAddress(8080)
    with pytest.raises(
        AddressError, match=r"^'65536' is not an address: the port '65536' is no number from 0 to"
    ):
        parse_address(65536)
    with pytest.raises(AddressError, match=r"^'-1' is not an address: "):
        parse_address(-1)


REFUSED = {
    "": "it has no port",
    "localhost": "it has no port",
    "run/x.sock": "it has no port",
    "+80": "it has no port",
    " 80": "it has no port",
    "80 ": "the port '80 ' is no number from 0 to 65535",
    "080": "the port '080' is no number",
    "8_0": "the port '8_0' is no number",
    "٨٠": "the port '٨٠' is no number",
    "²": "the port '²' is no number",
    "65536": "the port '65536' is no number",
    "9" * 5000: "is no number from 0 to 65535",
    "127.0.0.1": "the port '127.0.0.1' is no number",
    "127.0.0.1:": "the port '' is no number",
    "127.0.0.1:-1": "the port '-1' is no number",
    "127.0.0.1:http": "the port 'http' is no number",
    "127.0.0.256:80": "'127.0.0.256' is no IPv4 address",
    "127.1:80": "'127.1' is no IPv4 address",
    ":80": "'' is no host name",
    "*:80": "'*' is no host name",
    "a..b:80": "'a..b' is no host name",
    "a b:80": "'a b' is no host name",
    "::1:80": "an IPv6 address is written [::1]:80",
    "[::1]": "an IPv6 address is [ADDRESS]:PORT",
    "[::1": "an IPv6 address is [ADDRESS]:PORT",
    "[::1]80": "an IPv6 address is [ADDRESS]:PORT",
    "[::1]:": "the port '' is no number",
    "[::1]:70000": "the port '70000' is no number",
    "[127.0.0.1]:80": "'127.0.0.1' is no IPv6 address",
    "[localhost]:80": "'localhost' is no IPv6 address",
    "[::1\0]:80": "is no IPv6 address",
    "[fe80::1%a]:80%a": "a scope is [ADDRESS]:PORT%SCOPE, once",
    "[fe80::1]:80%a%b": "a scope is [ADDRESS]:PORT%SCOPE, once",
    "[fe80::1]:80%": "a scope is [ADDRESS]:PORT%SCOPE, once",
    "[fe80::1%]:80": "a scope is [ADDRESS]:PORT%SCOPE, once",
    "[fe80::1]:80%a/b": "'a/b' is no name or index of an interface",
    "[fe80::1]:80%a b": "'a b' is no name or index of an interface",
    "[fe80::1]:80%0": "'0' is no name or index of an interface",
    "/": "a path is more than a slash",
    "/a\0b": "a path has no NUL byte",
    "/" + "a" * 107: "it has 108 bytes, systemd allows 107",
    "/" + "ä" * 54: "it has 109 bytes, systemd allows 107",
    "/\ud800": "it has characters that no path can have",
    "@": "an abstract name has at least one byte behind the '@'",
    "@" + "a" * 107: "it has 108 bytes, systemd allows 107",
    "@\ud800": "it has characters that no path can have",
    "vsock:80": "a VM socket is vsock:CID:PORT",
    "vsock:x:80": "the CID 'x' is no number up to 4294967295",
    "vsock:4294967296:80": "the CID '4294967296' is no number",
    "vsock:2:": "the port '' is no number from 0 to 4294967295",
    "vsock:2:4294967296": "the port '4294967296' is no number",
}


@pytest.mark.parametrize("word", REFUSED, ids=[word[:20] for word in REFUSED])
def test_refuses(word: str) -> None:
    """What is no address is quoted, with the reason and what an address looks like."""
    with pytest.raises(AddressError) as caught:
        parse_address(word)

    text = str(caught.value)
    assert text.startswith(f"{word!r} is not an address: ")
    assert REFUSED[word] in text
    assert text.endswith(
        ". Expected one of 8080, 127.0.0.1:80, [::1]:80, [fe80::1]:80%eth0, "
        "/run/x.sock, @abstract, vsock:2:80, host:80"
    )


@pytest.mark.parametrize("thing", [None, b"8080", True, 80.0])
def test_refuses_what_is_no_text(thing: object) -> None:
    """Bytes, None and booleans are refused with a word for what is expected, not guessed at."""
    with pytest.raises(AddressError) as caught:
        parse_address(thing)  # type: ignore[arg-type]

    assert str(caught.value) == f"an address is a word such as '8080' or '/run/x.sock', not {thing!r}"


@pytest.mark.parametrize(
    ("word", "name", "address"),
    [
        ("8080", None, PortAddress(8080)),
        ("web=8080", "web", PortAddress(8080)),
        ("web site=[::1]:80", "web site", InetAddress("::1", 80)),
        ("web=/run/a=b", "web", UnixAddress("/run/a=b")),
        ("=8080", "", PortAddress(8080)),
        ("/run/a=b", None, UnixAddress("/run/a=b")),
        ("@a=b", None, AbstractAddress(b"a=b")),
        ("web=@a=b", "web", AbstractAddress(b"a=b")),
    ],
)
def test_reads_names(word: str, name: str | None, address: Address) -> None:
    """A name stands before the first "=", if what stands there cannot be part of an address."""
    assert parse_named_address(word) == (name, address)


@pytest.mark.parametrize("word", ["web=", "web=x", "=", "a:b=80"])
def test_a_name_does_not_replace_an_address(word: str) -> None:
    """The address behind the name has to be one."""
    with pytest.raises(AddressError):
        parse_named_address(word)


def test_compares_by_value_and_kind() -> None:
    """Addresses of different kinds are never equal, nor is an address equal to its word."""
    assert PortAddress(80) != InetAddress("::", 80)
    assert InetAddress("fe80::1", 80, "2") != InetAddress("fe80::1", 80)
    assert AbstractAddress(b"x") != UnixAddress("x")
    assert PortAddress(80) != "80"
    assert len({PortAddress(80), PortAddress(80), PortAddress(81)}) == 2
    assert repr(InetAddress("::1", 80)) == "<InetAddress [::1]:80>"


SOCKNAMES: list[tuple[int, object, bool, Address | None]] = [
    (socket.AF_INET, ("127.0.0.1", 80), False, InetAddress("127.0.0.1", 80)),
    (socket.AF_INET6, ("::", 80, 0, 0), False, PortAddress(80)),
    (socket.AF_INET6, ("::", 80, 0, 0), True, InetAddress("::", 80)),
    (socket.AF_INET6, ("::1", 80, 0, 0), False, InetAddress("::1", 80)),
    (socket.AF_INET6, ("fe80::1%eth0", 80, 0, 2), True, InetAddress("fe80::1", 80, "2")),
    (socket.AF_UNIX, "/run/x", False, UnixAddress("/run/x")),
    (socket.AF_UNIX, "relative", False, UnixAddress("relative")),
    (socket.AF_UNIX, "", False, None),
    (socket.AF_UNIX, b"\0name", False, AbstractAddress(b"name")),
    (socket.AF_UNIX, b"", False, None),
    (socket.AF_VSOCK, (2, 80), False, VsockAddress(2, 80)),
    (socket.AF_NETLINK, (17, 0), False, None),
    (socket.AF_PACKET, ("lo", 3, 0, 1, b""), False, None),
    (99, ("host", 3), False, None),
]


@pytest.mark.parametrize(
    ("family", "sockname", "v6only", "address"), SOCKNAMES, ids=[f"{row[1]}-{row[2]}" for row in SOCKNAMES]
)
def test_reads_socknames(family: int, sockname: object, *, v6only: bool, address: Address | None) -> None:
    """Each shape of getsockname() is read as what a unit would have to say; others have no word."""
    assert address_of_sockname(family, sockname, v6only=v6only) == address


DUAL, V6, V4 = PortAddress(80), InetAddress("::", 80), InetAddress("0.0.0.0", 80)  # noqa: S104 - compared, not bound
COVERING: list[tuple[str, Address, list[Address | None], list[int]]] = [
    ("dual-stack", DUAL, [None, DUAL, PortAddress(81)], [1]),
    ("the pair", DUAL, [V4, None, V6], [0, 2]),
    ("IPv4 alone, where IPv6 is off", DUAL, [PortAddress(81), V4], [1]),
    ("IPv6 alone is not the port", DUAL, [V6], []),
    ("a socket of one address is not the port", DUAL, [InetAddress("127.0.0.1", 80)], []),
    ("dual-stack wins over the pair", DUAL, [V4, DUAL], [1]),
    ("[::] is the dual-stack one", V6, [DUAL], [0]),
    ("[::] is the v6-only one, if there is one", V6, [DUAL, V6], [1]),
    ("[::] of another port", V6, [PortAddress(81)], []),
    ("0.0.0.0 is not the dual-stack one", V4, [DUAL], []),
    ("mapped, asked for", InetAddress("::ffff:127.0.0.1", 80), [InetAddress("127.0.0.1", 80)], [0]),
    ("mapped, passed", InetAddress("127.0.0.1", 80), [InetAddress("::ffff:127.0.0.1", 80)], [0]),
    ("mapped any", V4, [InetAddress("::ffff:0.0.0.0", 80)], [0]),
    ("not mapped, if it looks like it", InetAddress("::ffff:0:1", 80), [InetAddress("0.0.0.1", 80)], []),
    ("a scope is part of it", InetAddress("fe80::1", 80, "2"), [InetAddress("fe80::1", 80, "3")], []),
    ("the same scope", InetAddress("fe80::1", 80, "2"), [InetAddress("fe80::1", 80, "2")], [0]),
    ("SO_REUSEPORT: all of them", InetAddress("::1", 80), [InetAddress("::1", 80)] * 2, [0, 1]),
    ("unix", UnixAddress("/x"), [UnixAddress("/y"), UnixAddress("/x")], [1]),
    ("abstract is not a path", AbstractAddress(b"/x"), [UnixAddress("/x")], []),
    ("vsock", VsockAddress(2, 1), [VsockAddress(3, 1), VsockAddress(2, 1)], [1]),
    (
        "a host name covers nothing before it is resolved",
        HostAddress("::1", 80),
        [InetAddress("::1", 80)],
        [],
    ),
    ("nothing has a word", DUAL, [None], []),
    ("nothing", V6, [], []),
]


@pytest.mark.parametrize(
    ("wanted", "own", "indices"), [row[1:] for row in COVERING], ids=[row[0] for row in COVERING]
)
def test_finds_what_makes_up_an_address(
    wanted: Address, own: list[Address | None], indices: list[int]
) -> None:
    """Listeners are matched to an address as the kernel would connect them."""
    assert covering(wanted, own) == indices


# Nothing here can be bound, or nothing is disturbed by it: the judge binds what it understands.
SYSTEMDS = [
    "65535",
    "192.0.2.1:65535",
    "[2001:db8::1]:65535",
    "[fe80::1]:65535%1",
    "[::ffff:192.0.2.1]:80",
    "/dev/null/x.sock",
    "/dev/null/" + "a" * 97,
    "@sdlisten-test-judge",
    "@sdlisten test =:/@ä",
    "@" + "sdlisten-test-".ljust(106, "x"),
    "vsock:7:80",
    "vsock:7:0",
]
OURS_ALONE = ["localhost:80", "0", "192.0.2.1:0", "[2001:db8::1]:0", "[fe80::1%1]:65535"]
NEITHERS = [
    *(
        "/",
        "@",
        "080",
        "80 ",
        " 80",
        "192.0.2.1",
        "[192.0.2.1]:80",
        "::1:80",
        "[fe80::1]:80%",
        "[fe80::1]:80%0",
    ),
    *(
        "/dev/null/" + "a" * 98,
        "@" + "a" * 107,
        "vsock:80",
        "vsock:7:",
        "vsock:4294967296:80",
        "65536",
        "*:80",
    ),
]


def judge_understands(word: str) -> bool:
    """Ask systemd-socket-activate whether a word is an address; whether it can be bound does not matter."""
    program = shutil.which("systemd-socket-activate")
    if program is None:
        missing("systemd-socket-activate is not installed")
    environ = {"LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "info", "SYSTEMD_LOG_TARGET": "console"}
    command: list[str | bytes] = [program, "-l", os.fsencode(word), "true"]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environ) as judge,
        selectors.DefaultSelector() as selector,
    ):
        assert judge.stderr
        selector.register(judge.stderr, selectors.EVENT_READ)
        said = judge.stderr.readline() if selector.select(SECONDS) else b""
        judge.kill()
    if b"Failed to parse socket address" in said:
        return False
    assert b"Listening on" in said or b"Failed to listen on" in said, said
    return True


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


def test_systemd_reads_our_words() -> None:
    """What we take for systemd's grammar, systemd takes; what is ours alone, it refuses."""
    words = [*SYSTEMDS, *OURS_ALONE]

    assert [word for word in words if not judge_understands(word)] == OURS_ALONE
    for word in words:
        parse_address(word)


def test_systemd_reads_the_scope_that_we_write() -> None:
    """A scope inside the brackets, which systemd refuses, is written behind the port, where it wants it."""
    assert judge_understands(str(parse_address("[fe80::1%1]:65535")))


def test_we_refuse_what_systemd_refuses() -> None:
    """A word that systemd does not read, and that is not one of ours, is refused by both."""
    assert [word for word in NEITHERS if judge_understands(word)] == []
    for word in NEITHERS:
        with pytest.raises(AddressError):
            parse_address(word)
