"""Containers of the image behind haproxy, replaced one after the other: nothing is lost, nothing repeated."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from sdlisten.load import LoadProcess

from .container import Plain, eventually
from .images import ADD_PACKAGES, RELEASES, _build, _installed, _made, base
from .session import LABEL, SESSION
from .test_pid1 import HARDENED, USER, WAIT, image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import docker

__all__ = ("image",)  # a fixture

TRIXIE = RELEASES[1]

# Where the control sockets are: a volume that haproxy sees, too.
CONTROL = "/run/control"
ADMIN = "/tmp/admin.sock"  # noqa: S108 -- in there

INSTALL = """\
FROM {parent}
RUN export DEBIAN_FRONTEND=noninteractive && apt-get -qq -o Acquire::Check-Valid-Until=false update && \
    apt-get -qq install --yes --no-install-recommends haproxy >/dev/null && rm -rf /var/lib/apt/lists/*
"""

# Neither `retries` nor `option redispatch`: what a server loses, the client loses. The check is the image's
# own HEALTHCHECK; haproxy kills one that takes longer than `inter`, so it is the third failure that counts.
# Addresses are told at run time, for each new container has its own.
CONFIGURATION = f"""\
global
    stats socket {ADMIN} level admin
    external-check
    insecure-fork-wanted
    hard-stop-after 5s
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend clients
    bind :8000
    default_backend hello
backend hello
    balance roundrobin
    option external-check
    external-check path /usr/local/bin:/usr/bin:/bin
    external-check command /usr/local/bin/check
    default-server check inter 2s fall 3 rise 1
    server a 0.0.0.0:8080 disabled
    server b 0.0.0.0:8080 disabled
"""
CHECK = f"""\
#!/bin/sh
exec sdlisten ctl --control {CONTROL}/$HAPROXY_SERVER_NAME status >/dev/null 2>&1
"""
# Says a line to the admin socket, and prints the answer.
ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(sys.argv[2].encode() + b"\\n")
    print(b"".join(iter(lambda: sock.recv(65536), b"")).decode().strip())
"""


@pytest.fixture(scope="module")
def haproxy_image(engine: docker.DockerClient) -> str:
    """Give the tag of an image with Debian's haproxy and the library."""
    install = INSTALL.format(parent=base(engine, TRIXIE))
    parent = _made(engine, "sdlisten-haproxy:packages", [install], lambda tag: _build(engine, tag, install))
    dockerfile = ADD_PACKAGES.format(parent=parent, site=TRIXIE.site)
    files = {
        **_installed(TRIXIE),
        "root/etc/haproxy/haproxy.cfg": CONFIGURATION.encode(),
        "root/usr/local/bin/check": CHECK.encode(),
    }
    inputs = [dockerfile, *map(repr, sorted(files.items()))]
    return _made(engine, "sdlisten-haproxy:tests", inputs, lambda tag: _build(engine, tag, dockerfile, files))


@pytest.fixture
def control(engine: docker.DockerClient) -> Iterator[str]:
    """Give the name of a volume for control sockets, in memory, which the user of the image may write to."""
    volume = engine.volumes.create(
        driver="local",
        driver_opts={"type": "tmpfs", "device": "tmpfs", "o": f"uid={USER},mode=0700"},
        labels={LABEL: SESSION},
    )
    yield volume.name
    volume.remove()


class Balancer(Plain):
    """haproxy in a container."""

    def ask(self, line: str) -> str:
        """Give it an order."""
        return self.python(ASK, ADMIN, line, user=str(USER))

    def state(self, server: str) -> str:
        """Return what it thinks of a server: UP, DOWN, MAINT and the like."""
        lines = [line.split(",") for line in self.ask("show stat").splitlines()]
        (state,) = (line[17] for line in lines if line[:2] == ["hello", server])
        return state

    def add(self, server: str, ip: str) -> None:
        """Tell it where a server is now, and wait until its check finds it well."""
        self.ask(f"set server hello/{server} addr {ip} port 8080")
        self.ask(f"set server hello/{server} state ready")
        self.wait_for_state(server, "UP")

    def wait_for_state(self, server: str, wanted: str) -> None:
        """Wait until it thinks so of a server."""
        eventually(
            lambda: self.state(server),
            lambda state: state.startswith(wanted),
            within=WAIT,
            what=f"{server} {wanted}",
        )


@pytest.fixture
def balancer(haproxy_image: str, network: str, control: str) -> Iterator[Balancer]:
    """Give a haproxy that knows no servers yet."""
    command = ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"]
    container = Balancer(haproxy_image, command, network=network, options={"user": f"{USER}:{USER}"})
    with container.with_volume_mapping(control, CONTROL, "rw"):
        container.connect(8000, within=WAIT).close()
        yield container


@pytest.fixture
def run(image: str, network: str, control: str) -> Iterator[Callable[[str], Plain]]:
    """Give a function that runs the image as one of haproxy's servers."""
    with contextlib.ExitStack() as stack:

        def start(server: str) -> Plain:
            # More than anybody needs to look away: the deployment ends it.
            words = ("--stop-delay", "600", "--control", f"{CONTROL}/{server}", "-l", "http=8080")
            command = [*words, "--", "python3", "-m", "sdlisten.hello"]
            container = Plain(image, command, network=network, options=HARDENED)
            container.tmpfs["/tmp"] = ""  # noqa: S108 -- in there
            stack.enter_context(container.with_volume_mapping(control, CONTROL, "rw"))
            # haproxy takes a server that it is told of for well until its first check.
            container.wait_for_log("sdlisten: generation 1 serves", within=WAIT)
            return container

        yield start


def replace(balancer: Balancer, server: str, old: Plain, run: Callable[[str], Plain]) -> Plain:
    """Stop a container when haproxy has looked away, and start its successor."""
    old.signal("SIGTERM")
    ordered = time.monotonic()
    balancer.wait_for_state(server, "DOWN")
    # A second order ends the stop delay; within a second it would still be the first one.
    eventually(time.monotonic, lambda now: now > ordered + 1.5)
    old.signal("SIGTERM")
    assert old.wait() == 0
    assert "dropped=0" in old.logs()
    new = run(server)
    balancer.add(server, new.ip)
    return new


@pytest.mark.timeout(300)
def test_containers_are_replaced_one_by_one(
    balancer: Balancer, run: Callable[[str], Plain], rounds: Callable[[int], int]
) -> None:
    """With the image's health check, and a stop delay for it to be noticed in, no request fails."""
    servers = {server: run(server) for server in "ab"}
    for server, container in servers.items():
        balancer.add(server, container.ip)
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                LoadProcess(f"{balancer.ip}:8000", mode=mode, rate=rate, clients=12, quiet=True)
            )
            for mode, rate in {"short": 100, "slow": 0, "keep": 150}.items()
        ]
        for load in loads:
            load.wait_started()
        for _ in range(rounds(1)):
            for server, container in list(servers.items()):
                servers[server] = replace(balancer, server, container, run)
        results = [load.stop() for load in loads]
    print(*results, sep="\n")  # noqa: T201 -- the figures, for whoever asks pytest for them
    assert not [str(result) for result in results if not result.clean]
    lost = {
        line[1]: (line[13], line[14])
        for line in (line.split(",") for line in balancer.ask("show stat").splitlines())
        if line[:2] in (["hello", "a"], ["hello", "b"])
    }
    assert lost == {"a": ("0", "0"), "b": ("0", "0")}  # econ, eresp: haproxy agrees
