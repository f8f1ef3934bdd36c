"""Plain containers: what PID 1 is, which IPv6 it sees, what waiting for it tells, and that it goes away."""

from __future__ import annotations

import http.client
import time
from typing import TYPE_CHECKING

import pytest
from docker.errors import NotFound

from .container import Plain
from .images import RELEASES

if TYPE_CHECKING:
    from collections.abc import Callable

    import docker

TRIXIE = RELEASES[1]

# Tells its pid, and ends with code 7 on SIGTERM.
UNTIL_SIGTERM = """\
import os, signal, sys
import sdlisten
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("pid", os.getpid(), flush=True)
signal.pause()
"""

# Says what becomes of a socket at ::1.
IPV6_PROBE = """\
import errno, socket
try:
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
    print("bound", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""


def test_output_of_a_quick_command(plain: Callable[..., Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command has written is complete also where it ended before the engine's answer was looked at."""
    container = plain("sleep", "60")
    begin = http.client.HTTPResponse.begin

    def begin_late(response: http.client.HTTPResponse) -> None:
        time.sleep(0.3)
        begin(response)

    monkeypatch.setattr(http.client.HTTPResponse, "begin", begin_late)
    assert container.run("echo first; echo second >&2; exit 3") == (3, "first\nsecond\n")
    assert container.sh(["seq", "9999"]) == "\n".join(map(str, range(1, 10000)))


@pytest.mark.parametrize("tini", [False, True], ids=["pid1", "tini"])
def test_plain_container(plain: Callable[..., Plain], tini: bool) -> None:
    """The program runs as PID 1, or below tini, which passes signals on; both end with its code."""
    container = plain("python3", "-c", UNTIL_SIGTERM, tini=tini)
    written = container.wait_for_log("pid")
    assert ("pid 1\n" in written) is not tini
    container.signal("SIGTERM")
    assert container.wait() == 7


@pytest.mark.parametrize(
    ("ipv6", "outcome"), [("on", "bound"), ("off", "EADDRNOTAVAIL"), ("absent", "EAFNOSUPPORT")]
)
def test_plain_container_with_and_without_ipv6(plain: Callable[..., Plain], ipv6: str, outcome: str) -> None:
    """IPv6 in a plain container is on, without any address, or unknown to its kernel."""
    container = plain("python3", "-c", IPV6_PROBE, ipv6=ipv6)
    container.wait()
    assert container.logs() == f"{outcome}\n"
    assert bool(container.ip6) is False


def test_waiting_has_an_end(plain: Callable[..., Plain]) -> None:
    """Whoever waits in vain, for an end, a line or a port, learns how the container is and what it wrote."""
    container = plain("sh", "-c", "echo other; sleep infinity")
    with pytest.raises(AssertionError, match=r"(?s)did not end within 0\.2 s.*is running.*other"):
        container.wait(within=0.2)
    with pytest.raises(AssertionError, match=r"(?s)'line' was not written within 0\.2 s.*is running.*other"):
        container.wait_for_log("line", within=0.2)
    with pytest.raises(ConnectionRefusedError) as refused:
        container.connect(1, within=0.2)
    assert "nobody listens on port 1 within 0.2 s" in refused.value.__notes__[0]


def test_waiting_for_a_log_ends_with_the_program(plain: Callable[..., Plain]) -> None:
    """Whoever waits for a line of a program that has ended learns its exit code and what it wrote."""
    container = plain("sh", "-c", "echo other; exit 5")
    with pytest.raises(AssertionError, match=r"(?s)'line' was not written.*exited with code 5.*other"):
        container.wait_for_log("line")


def test_container_is_removed(engine: docker.DockerClient, images: Callable[..., str]) -> None:
    """A container is gone when its ``with`` block ends."""
    with Plain(images(TRIXIE), ["sleep", "infinity"]) as container:
        name = container.get_container_id()
        assert engine.containers.get(name).status == "running"
    with pytest.raises(NotFound):
        engine.containers.get(name)
