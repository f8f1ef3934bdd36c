"""The quadlet that people copy: systemd keeps the socket, Podman hands it in, and a reload rolls in there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdlisten.load import LoadProcess

from .container import eventually
from .images import RELEASES, _build, _made, base
from .machine import UNITS, Machine
from .session import LABEL, SESSION
from .test_pid1 import image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import docker

__all__ = ("image",)  # a fixture

TRIXIE = RELEASES[1]
UNIT = "hello-podman.service"

INSTALL = """\
FROM {parent}
RUN export DEBIAN_FRONTEND=noninteractive && apt-get -qq -o Acquire::Check-Valid-Until=false update && \
    apt-get -qq install --yes --no-install-recommends podman crun netavark >/dev/null && \
    rm -rf /var/lib/apt/lists/*
"""
# Podman in a container: what a container may not do, it must not want. On a host none of it is needed.
NESTED = {"cap_add": ["NET_ADMIN", "SYS_PTRACE"]}
CONFIGURATION = """\
[containers]
default_sysctls = []
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""
NO_CGROUPS = "[Container]\nPodmanArgs=--cgroups=disabled\n"


@pytest.fixture
def nested(engine: docker.DockerClient, network: str) -> Iterator[Machine]:
    """Give a machine with systemd 257 and Podman, whose storage is a volume: overlays do not stack."""
    install = INSTALL.format(parent=base(engine, TRIXIE))
    tag = _made(engine, "sdlisten-podman:trixie", [install], lambda tag: _build(engine, tag, install))
    volume = engine.volumes.create(labels={LABEL: SESSION})
    try:
        machine = Machine(tag, TRIXIE, network=network, options=NESTED)
        with machine.with_volume_mapping(volume.name, "/var/lib/containers", "rw"):
            yield machine
    finally:
        volume.remove()


@pytest.mark.timeout(300)
def test_quadlet(
    nested: Machine, engine: docker.DockerClient, image: str, rounds: Callable[[int], int]
) -> None:
    """The first client starts the container; a reload rolls without a loss, and a stop ends it clean."""
    nested.put({"/etc/containers/containers.conf": CONFIGURATION})
    archive = b"".join(engine.images.get(image).save(named=image))
    nested.put({"/var/tmp/image.tar": archive})  # noqa: S108 -- in there
    nested.sh(
        f"podman load --quiet --input /var/tmp/image.tar && podman tag {image} hello:latest", timeout=120
    )
    nested.put(
        {
            "/etc/containers/systemd/hello-podman.container": UNITS / "hello-podman.container",
            "/etc/containers/systemd/hello-podman.container.d/nested.conf": NO_CGROUPS,
        }
    )
    nested.units("hello-podman.socket")
    nested.systemctl("start", "hello-podman.socket")
    try:
        with LoadProcess(f"{nested.ip}:8082", mode="keep", clients=8, rate=100, quiet=True) as clients:
            clients.wait_started()
            # It answers a moment before its READY=1 has come through Podman.
            eventually(lambda: nested.show(UNIT, "ActiveState"), "active".__eq__)
            for _ in range(rounds(2)):
                nested.systemctl("reload", UNIT, timeout=60)
            result = clients.stop()
    except BaseException:
        print(nested.journal(UNIT), nested.run(["systemctl", "cat", UNIT]).output)  # noqa: T201 -- what it said
        raise
    print(result)  # noqa: T201 -- the figures, for whoever asks pytest for them
    assert result.clean, result
    nested.systemctl("stop", "hello-podman.socket", UNIT)
    eventually(lambda: nested.show(UNIT, "ActiveState"), "inactive".__eq__)
    written = nested.journal(UNIT)
    assert f"sdlisten: generation {rounds(2) + 1} serves" in written
    assert "sdlisten: stopped" in written
    assert nested.show(UNIT, "Result") == "success"
