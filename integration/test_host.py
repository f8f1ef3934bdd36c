"""The host's own systemd-socket-activate as the manager: no container, no root, no unit files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.testing import activate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdlisten.testing import Activated

HELLO = (sys.executable, "-m", "sdlisten.hello")
PROBE = (sys.executable, str(Path(__file__).parent / "apps" / "probe.py"))
# A program that knows listeners only.
LISTEN = """
import sys, sdlisten
try:
    sdlisten.listen("9")
except sdlisten.ActivationError as error:
    print(error, flush=True)
    sys.exit(78)
"""
# A wrapper that does not exec: the program is its child, and LISTEN_PID its own pid.
WRAPPER = ("sh", "-c", '"$@"; exit $?', "sh")

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
SECONDS = 10.0
EX_CONFIG = 78


def has_ipv6() -> bool:
    """Whether this host has ::1; the kernel may know IPv6 and have it turned off."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")


@pytest.fixture
def started() -> Iterator[Callable[..., Activated]]:
    """Start systemd-socket-activate with these words; it listens on ``addresses`` when this returns.

    It becomes the program by exec when somebody connects, so its pid is the program's.
    """
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("systemd-socket-activate is not installed (Debian: apt install systemd)")
    with contextlib.ExitStack() as stack:

        def start(*words: str, addresses: tuple[str, ...]) -> Activated:
            listening = [word for address in addresses for word in ("-l", address)]
            # It hands on PATH, HOME and little else.
            command = ["systemd-socket-activate", "-E", "PYTHONPATH", *listening, *words]
            path = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
            daemon = stack.enter_context(activate(command, [], env=path, notify=False))
            daemon.wait_output(f"Listening on {as_logged(addresses[-1])} as ", SECONDS)
            return daemon

        yield start


def free_port() -> int:
    """Return a port that is free in both families: systemd-socket-activate refuses port 0."""
    any_, family = ("::", socket.AF_INET6) if has_ipv6() else ("", socket.AF_INET)
    with socket.create_server((any_, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as probe:
        return int(probe.getsockname()[1])


def as_logged(address: str) -> str:
    """Return how systemd-socket-activate writes an address."""
    return f"[::]:{address}" if address.isdigit() else address


def connect(address: str) -> socket.socket:
    """Connect to an address word."""
    if address.startswith(("/", "@")):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SECONDS)
        client.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        return client
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout=SECONDS)


def send_datagram(address: str) -> None:
    """Send something to an IPv4 address word."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"wake up", (host, int(port)))


def exchange(client: socket.socket, request: bytes = REQUEST) -> bytes:
    """Send a request, read the answer to its end, and close."""
    with client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def pid_in(answer: bytes) -> int:
    """Return the pid that an answer of `sdlisten.hello` names."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1:2] == [b"200"], answer
    return int(body.split()[0])


def described(daemon: Activated) -> list[list[str]]:
    """Return origin, name, address and flags of each listener, as hello writes them down."""
    lines = [line.split() for line in daemon.output.splitlines() if line.startswith(("adopted ", "bound "))]
    wanted = ("name", "address", "non-blocking", "close-on-exec")
    facts = [(line[0], dict(word.partition("=")[::2] for word in line)) for line in lines]
    return [[origin, *(words[each] for each in wanted)] for origin, words in facts]


def told(address: str) -> dict[str, Any]:
    """Return what apps/probe.py tells whoever connects."""
    report: dict[str, Any] = json.loads(exchange(connect(address), b""))
    return report


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:{port}",
        pytest.param("[::1]:{port}", marks=needs_ipv6),
        pytest.param("{port}", marks=needs_ipv6),
        "/{tmp}/hello.sock",
        "@sdlisten-{port}",
    ],
    ids=["ipv4", "ipv6", "port", "unix", "abstract"],
)
def test_first_connection_starts_it(started: Callable[..., Activated], tmp_path: Path, address: str) -> None:
    """Whatever kind of socket, the client that makes the daemon start is answered by it."""
    address = address.format(port=free_port(), tmp=str(tmp_path).strip("/"))
    daemon = started(*HELLO, "-l", address, addresses=(address,))
    assert pid_in(exchange(connect(address))) == daemon.pid
    assert described(daemon) == [["adopted", "unknown", address, "yes", "yes"]]
    assert daemon.terminate() == 0


@pytest.mark.parametrize("named", [True, False], ids=["names", "no-names"])
def test_several_sockets(started: Callable[..., Activated], tmp_path: Path, named: bool) -> None:
    """Several sockets are told apart by name, else by address, never by order; each is answered on."""
    http, web, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", f"{tmp_path}/admin.sock"
    asked = (f"admin={admin}", f"http={http}", f"web={web}")
    daemon = started(
        *(["--fdname=web:admin:http"] if named else []),
        *HELLO,
        *(word for address in asked for word in ("-l", address)),
        addresses=(web, admin, http),
    )
    waiting = [connect(address) for address in (http, admin, web)]
    for client in waiting:
        assert pid_in(exchange(client)) == daemon.pid
    names = {"admin": admin, "http": http, "web": web}
    expected = [[name if named else "unknown", names[name]] for name in names]
    assert [line[1:3] for line in described(daemon)] == expected
    assert {line[0] for line in described(daemon)} == {"adopted"}
    assert daemon.terminate() == 0


def test_name_goes_before_address(started: Callable[..., Activated]) -> None:
    """A socket with the wanted name is adopted wherever it listens; hello's own address stays unbound."""
    passed, asked = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    daemon = started("--fdname=http", *HELLO, "-l", f"http={asked}", addresses=(passed,))
    assert pid_in(exchange(connect(passed))) == daemon.pid
    with pytest.raises(ConnectionRefusedError):
        connect(asked)


def test_environment(started: Callable[..., Activated]) -> None:
    """``-E`` variables arrive; the four of the protocol are gone after the claim, for children as well."""
    address = f"127.0.0.1:{free_port()}"
    daemon = started(
        "-E", "SDLISTEN_REQUIRE=1", "--fdname=http", *PROBE, "-l", "http=9", addresses=(address,)
    )
    report = told(address)
    assert report["pid"] == daemon.pid
    assert [listener["origin"] for listener in report["listeners"]] == ["adopted"]
    assert report["variables"] == report["inherited variables"] == []
    (passed,) = report["passed"]
    assert (passed["fd"], passed["name"], passed["inheritable"]) == (3, "http", False)


def test_datagram_beside_listeners(started: Callable[..., Activated], tmp_path: Path) -> None:
    """A datagram socket before the listeners is no listener: it is left to whoever asks for it."""
    datagram, stream, unix = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", f"{tmp_path}/unix"
    # -d is for all sockets of one systemd-socket-activate, but a second one passes on what it was passed.
    second = ["systemd-socket-activate", "-E", "PYTHONPATH", "-l", stream, "-l", unix]
    names = "--fdname=dns:http:http"
    daemon = started("-d", *second, names, *PROBE, "-l", "http=9", addresses=(datagram,))
    send_datagram(datagram)
    daemon.wait_output(f"Listening on {unix} as ", SECONDS)
    report = told(stream)
    found = [(listener["name"], listener["address"]) for listener in report["listeners"]]
    assert found == [("http", stream), ("http", unix)]
    assert [(left["fd"], left["name"], left["kind"]) for left in report["left"]] == [
        (3, "dns", "datagram socket")
    ]


def test_nothing_but_a_datagram_socket(started: Callable[..., Activated]) -> None:
    """Passed a datagram socket alone, a daemon that wants a listener says so, and binds nothing beside it."""
    passed, asked = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    daemon = started("-d", "--fdname=dns", *HELLO, "-l", f"http={asked}", addresses=(passed,))
    send_datagram(passed)
    daemon.wait_output("Put FileDescriptorName=http into", SECONDS)
    assert "no passed socket is named 'http'. Passed: fd 3 'dns' datagram socket." in daemon.output
    assert daemon.wait() == EX_CONFIG


def test_accept(started: Callable[..., Activated]) -> None:
    """With ``--accept`` each client has a process of its own, which is passed that connection."""
    address = f"127.0.0.1:{free_port()}"
    # Unlike PID 1, it gives the connection no name of its own accord.
    daemon = started("--accept", "--fdname=connection", *PROBE, "-l", "9", addresses=(address,))
    reports = [told(address), told(address)]
    assert len({daemon.pid, *(report["pid"] for report in reports)}) == 3
    for report in reports:
        assert [found["kind"] for found in report["passed"]] == ["connection"]


def test_accept_for_a_program_that_listens(started: Callable[..., Activated]) -> None:
    """``listen()`` under ``--accept`` says what it was passed and what to use instead."""
    address = f"127.0.0.1:{free_port()}"
    daemon = started("--accept", sys.executable, "-c", LISTEN, addresses=(address,))
    assert exchange(connect(address), b"") == b""
    daemon.wait_output(f"died with code {EX_CONFIG}", SECONDS)
    assert "is one accepted connection: its .socket unit says Accept=yes" in daemon.output
    assert "Use serve(), which takes both" in daemon.output


def test_wrong_name(started: Callable[..., Activated]) -> None:
    """If no passed socket has the wanted name, it ends with 78, says what was passed, and binds nothing."""
    passed, asked = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    daemon = started("--fdname=web", *HELLO, "-l", f"http={asked}", addresses=(passed,))
    with connect(passed):
        daemon.wait_output("systemctl restart ", SECONDS)
    assert f"no passed socket is named 'http'. Passed: fd 3 'web' {passed}." in daemon.output
    assert "bound " not in daemon.output
    assert daemon.wait() == EX_CONFIG


def test_required_and_not_passed() -> None:
    """Under SDLISTEN_REQUIRE=1 a daemon that was started by hand ends with 78 and says how to start it."""
    with activate([*HELLO, "-l", "http=127.0.0.1:0"], [], env={"SDLISTEN_REQUIRE": "1"}) as daemon:
        daemon.wait_output("COMMAND.", SECONDS)
        assert "systemctl start http.socket" in daemon.output
        assert "systemd-socket-activate -l 127.0.0.1:0 --fdname=http COMMAND." in daemon.output
        assert daemon.wait() == EX_CONFIG


def test_wrapper_without_exec(started: Callable[..., Activated]) -> None:
    """Started as a child by a wrapper, it learns that the sockets were meant for the wrapper's pid."""
    address = f"127.0.0.1:{free_port()}"
    daemon = started("-E", "SDLISTEN_REQUIRE=1", *WRAPPER, *HELLO, "-l", address, addresses=(address,))
    with connect(address):
        daemon.wait_output("a wrapper started us without exec", SECONDS)
    assert f"LISTEN_FDS=1 is meant for pid {daemon.pid}, this is " in daemon.output
    assert daemon.wait() == EX_CONFIG


def test_exec_behind_a_wrapper(started: Callable[..., Activated]) -> None:
    """``sdlisten exec`` behind such a wrapper makes the sockets the program's."""
    address = f"127.0.0.1:{free_port()}"
    exec_ = (sys.executable, "-m", "sdlisten", "exec", "--")
    daemon = started(*WRAPPER, *exec_, *HELLO, "-l", address, addresses=(address,))
    pid = pid_in(exchange(connect(address)))
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0
    assert pid != daemon.pid
    assert described(daemon) == [["adopted", "unknown", address, "yes", "yes"]]
