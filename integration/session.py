"""Which containers and networks belong to which test session, and how those of dead sessions go away.

All that the tests make carries a label with the id of its session: host, pid and start time of the process.
So whether it lives can be seen without any file of its own: a later one removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from docker.errors import APIError
from docker.types import IPAMConfig, IPAMPool

if TYPE_CHECKING:
    import docker

__all__ = ("LABEL", "SESSION", "create_network", "is_alive", "remove_leftovers", "remove_own", "session_of")

LABEL = "sdlisten.session"


def session_of(pid: int) -> str:
    """Return the session id of the running process `pid`.

    Raises:
        FileNotFoundError: There is no such process.
    """
    # proc_pid_stat(5): field 3 follows the name in parentheses, which may hold anything; 22 is starttime.
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[22 - 3]
    return f"{socket.gethostname()}.{pid}.{started}"


SESSION = session_of(os.getpid())


def is_alive(session: str) -> bool:
    """Whether the process of that session runs; True for one of another host, which we cannot know."""
    host, pid, _ = session.rsplit(".", 2)
    if host != socket.gethostname():
        return True
    try:
        return session_of(int(pid)) == session
    except (FileNotFoundError, ProcessLookupError):
        return False


def create_network(client: docker.DockerClient) -> str:
    """Make a network of this session, with IPv6 if the kernel has it; returns its name."""
    ipv6 = Path("/proc/sys/net/ipv6").exists()
    # A unique local prefix (RFC 4193) out of the session's id: sessions at the same time must not overlap.
    digest = hashlib.sha256(SESSION.encode()).hexdigest()
    subnet = IPAMPool(subnet=f"fd{digest[:2]}:{digest[2:6]}:{digest[6:10]}::/64")
    network = client.networks.create(
        f"sdlisten-{digest[:12]}",
        driver="bridge",
        enable_ipv6=ipv6,
        ipam=IPAMConfig(pool_configs=[subnet] if ipv6 else []),
        labels={LABEL: SESSION},
    )
    return str(network.name)


def remove_own(client: docker.DockerClient) -> list[str]:
    """Remove every container and network of this session; returns their names."""
    return _remove(client, {SESSION})


def remove_leftovers(client: docker.DockerClient) -> list[str]:
    """Remove every container and network whose session is dead; returns their names."""
    containers = client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)
    networks = client.networks.list(filters={"label": LABEL})
    sessions = {container.labels[LABEL] for container in containers}
    sessions |= {network.attrs["Labels"][LABEL] for network in networks}
    return _remove(client, {session for session in sessions if not is_alive(session)})


def _remove(client: docker.DockerClient, sessions: set[str]) -> list[str]:
    removed = []
    for session in sorted(sessions):
        mine: dict[str, str | list[str] | bool] = {"label": f"{LABEL}={session}"}
        for container in client.containers.list(all=True, filters=mine, ignore_removed=True):
            with contextlib.suppress(APIError):  # somebody else is removing it at this moment
                container.remove(force=True, v=True)
                removed.append(str(container.name))
        for network in client.networks.list(filters=mine):
            with contextlib.suppress(APIError):
                network.remove()
                removed.append(str(network.name))
    return removed
