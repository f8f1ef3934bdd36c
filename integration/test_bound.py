"""The bound path: a daemon in a container without systemd, and that clients cannot tell the difference."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .container import Container, IPv6, Plain
    from .machine import Machine

HELLO = ("python3", "-m", "sdlisten.hello")
# What makes a program PID 1 of a container with sockets; it becomes the program when somebody connects.
ACTIVATE = ("systemd-socket-activate", "-l", "8080", "--fdname=http")
# An entrypoint that starts the program as its child.
WRAPPER = ("sh", "-c", '"$@"; exit $?', "sh")
EXEC = ("sdlisten", "exec", "--")

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
WAIT = 10.0
EX_CONFIG = 78
# As sent by docker stop if it is not told otherwise.
STOP_SECONDS = 10

with_ipv6 = pytest.mark.skipif(
    not Path("/proc/sys/net/ipv6").exists(), reason="the kernel of this host has no IPv6"
)


def exchange(client: socket.socket, request: bytes = REQUEST) -> bytes:
    """Send a request, say that there will be no more, and read to the end."""
    with client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def stop(container: Plain) -> int:
    """Do what ``docker stop`` does, and return the exit code: 137 if it took SIGKILL."""
    container.get_wrapped_container().stop(timeout=STOP_SECONDS)
    return container.wait()


@pytest.mark.parametrize("tini", [False, True], ids=["pid1", "tini"])
@pytest.mark.parametrize(
    ("ipv6", "address"),
    [pytest.param("on", "8080", marks=with_ipv6), ("off", "8080"), ("absent", "0.0.0.0:8080")],
)
def test_bound_in_a_container(plain: Callable[..., Plain], tini: bool, ipv6: IPv6, address: str) -> None:
    """``-l 8080`` answers on every family that there is, and ``docker stop`` ends it with 0 in good time."""
    container = plain(*HELLO, "-l", "8080", tini=tini, ipv6=ipv6)
    assert f"bound name=- address={address} " in container.wait_for_log("backlog=")
    answers = [exchange(container.connect(8080, ipv6=False))]
    if ipv6 == "on":
        answers.append(exchange(container.connect(8080, ipv6=True)))
    pids = {answer.partition(b"\r\n\r\n")[2].split()[0] for answer in answers}
    assert len(pids) == 1
    assert (pids == {b"1"}) is not tini
    assert stop(container) == 0


def test_stop_does_not_wait_for_a_silent_client(plain: Callable[..., Plain]) -> None:
    """A client that has connected and says nothing does not hold up ``docker stop``."""
    container = plain(*HELLO, "-l", "8080")
    container.wait_for_log("backlog=")
    with container.connect(8080) as silent:
        assert exchange(container.connect(8080)), "accepted in order: so the silent one is, too"
        assert stop(container) == 0
        assert silent.recv(1) == b""


class View(NamedTuple):
    """All that clients can find out about a daemon, without what differs from one process to the next."""

    answers: list[bytes]
    connections: list[tuple[object, ...]]
    listeners: list[list[str]]


def connection_of(client: socket.socket) -> tuple[object, ...]:
    """Return what the kernel tells a client about the other side."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    # The options that both sides have agreed on, and the window scales (struct tcp_info of linux/tcp.h).
    agreed = tuple(info[5:7])
    largest = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    return client.family, client.getpeername()[1], agreed, largest


def without_pid(answer: bytes) -> bytes:
    """Put a word for the pid, and for the length that follows from it, which has to be right."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert not body or b"Content-Length: %d\r\n" % len(body) in head
    answer = answer.replace(b"Content-Length: %d" % len(body), b"Content-Length: N")
    return re.sub(rb"\d+(?= says)", b"PID", answer)


def view_of(container: Container) -> View:
    """Be several clients, one after the other and at once, over both families."""
    answers, connections = [], []
    for ipv6 in (False, True):
        with container.connect(8080, ipv6=ipv6, within=WAIT) as first:
            connections.append(connection_of(first))
            answers.append(exchange(first))
        answers.append(exchange(container.connect(8080, ipv6=ipv6), b""))
        at_once = [container.connect(8080, ipv6=ipv6) for _ in range(20)]
        answers += [exchange(client) for client in reversed(at_once)]
    pids = {answer.partition(b"\r\n\r\n")[2].split()[0] for answer in answers if answer}
    assert len(pids) == 1, "one daemon answers them all"
    # Send-Q, which is the backlog, address and port, and whether it is for IPv6 only.
    lines = [line.split() for line in container.sh("ss -Hltne sport = :8080").splitlines()]
    listeners = [[line[2], line[3], *(word for word in line if word.startswith("v6only"))] for line in lines]
    return View([without_pid(answer) for answer in answers], connections, listeners)


@with_ipv6
def test_client_sees_no_difference_to_systemd(plain: Callable[..., Plain], machine: Machine) -> None:
    """To its clients a daemon that systemd has activated and one that has bound for itself are the same."""
    bound = plain(*HELLO, "-l", "http=8080", release=machine.release)
    machine.units("hello.socket", "hello.service")
    machine.systemctl("start", "hello.socket")
    seen = view_of(bound)
    assert view_of(machine) == seen
    assert seen.listeners == [["4096", "*:8080", "v6only:0"]]
    assert "adopted name=http " in machine.journal("hello.service")
    assert "bound name=http " in bound.logs()


@with_ipv6
@pytest.mark.parametrize(
    "command",
    [HELLO, (*WRAPPER, *EXEC, *HELLO), ("tini", "--", *EXEC, *HELLO)],
    ids=["pid1", "wrapper", "tini"],
)
def test_client_sees_no_difference_in_a_container(
    plain: Callable[..., Plain], command: tuple[str, ...]
) -> None:
    """Nor can they tell one that got its socket in a container, as PID 1 or through ``sdlisten exec``."""
    bound = plain(*HELLO, "-l", "http=8080")
    activated = plain(*ACTIVATE, *command, "-l", "http=8080")
    assert view_of(activated) == view_of(bound)
    assert "adopted name=http " in activated.logs()
    if command[:3] != WRAPPER[:3]:  # a shell that waits for its child passes no signal on
        assert stop(activated) == stop(bound) == 0


@pytest.mark.parametrize("command", [(*WRAPPER, *HELLO), ("tini", "--", *HELLO)], ids=["wrapper", "tini"])
def test_sockets_are_for_pid_1(plain: Callable[..., Plain], command: tuple[str, ...]) -> None:
    """Below PID 1 and without ``sdlisten exec`` the daemon says whose sockets they are, and does not bind."""
    container = plain(*ACTIVATE, "-E", "SDLISTEN_REQUIRE=1", *command, "-l", "http=8080")
    container.connect(8080, within=WAIT).close()
    assert "LISTEN_FDS=1 is meant for pid 1, this is " in container.wait_for_log("a wrapper started us")
    assert container.wait() == EX_CONFIG
