"""What a daemon stores with systemd is there after a restart, a crash, and (since 254) a stop."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from . import apps
from .container import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .machine import Machine

PORT, EXTRA = 7400, 7401
MANY = 24

SOCKET = f"[Socket]\nListenStream={PORT}\nTriggerLimitIntervalSec=0\n"


def service(*words: str | int, program: str = "keeper", limit: int = 100, more: str = "") -> str:
    """Return keeper.service."""
    command = " ".join(apps.command(program, *(str(word) for word in words)))
    return f"""
        [Unit]
        StartLimitIntervalSec=0
        [Service]
        Type=notify
        ExecStart={command}
        NonBlocking=yes
        Restart=on-failure
        FileDescriptorStoreMax={limit}
        {more}
    """


@pytest.fixture
def keeper(machine: Machine) -> Callable[..., None]:
    """Give a function that installs keeper.service and starts it."""
    apps.install(machine)

    def start(text: str, *, activated: bool = True) -> None:
        machine.units(extra={"keeper.service": text, **({"keeper.socket": SOCKET} if activated else {})})
        machine.systemctl("start", *(["keeper.socket"] if activated else []), "keeper.service")

    return start


def told(connection: socket.socket) -> dict[str, Any]:
    """Read what the keeper tells a client, and close."""
    with connection:
        found: dict[str, Any] = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        return found


def ask(machine: Machine, port: int = PORT) -> dict[str, Any]:
    """Ask the keeper."""
    return told(machine.connect(port))


def number_stored(machine: Machine) -> int:
    """Return how many descriptors systemd keeps."""
    return int(machine.show("keeper.service", "NFileDescriptorStore"))


def check_kept(machine: Machine, first: dict[str, Any], starts: int, port: int = PORT) -> None:
    """Check that this is another start, which has all that the first one stored."""
    now = ask(machine, port)
    assert now["pid"] != first["pid"]
    assert now["starts"] == starts
    assert now["memfd"] == [f"of {first['pid']}"]
    assert now["origins"] == ["adopted", "stored"]


def test_restart_and_crash(machine: Machine, keeper: Callable[..., None]) -> None:
    """A memfd, a listener with its queue, and a state survive a restart and SIGKILL."""
    keeper(service(PORT, EXTRA))
    first = ask(machine)
    assert (first["starts"], first["memfd"], first["origins"]) == (0, [], ["adopted", "bound"])
    assert number_stored(machine) == 3

    machine.systemctl("restart", "keeper.service")
    check_kept(machine, first, 1)
    check_kept(machine, first, 1, EXTRA)

    machine.systemctl("kill", "--signal=KILL", "keeper.service")
    # Nobody but the store holds this listener now, and its clients wait.
    assert ask(machine, EXTRA)["pid"] != first["pid"]
    check_kept(machine, first, 2)
    assert number_stored(machine) == 3


@pytest.mark.systemd(since=257)
def test_stop_and_start(machine: Machine, keeper: Callable[..., None]) -> None:
    """With FileDescriptorStorePreserve=yes all is kept while the service is stopped; its clients wait."""
    keeper(service(PORT, EXTRA, more="FileDescriptorStorePreserve=yes"))
    first = ask(machine)

    machine.systemctl("stop", "keeper.service")
    assert number_stored(machine) == 3
    with contextlib.closing(machine.connect(EXTRA)) as waiting:
        machine.systemctl("start", "keeper.service")
        assert told(waiting)["starts"] == 1
    check_kept(machine, first, 1)


@pytest.mark.parametrize("limit", [0, 10])
def test_full_store(machine: Machine, keeper: Callable[..., None], limit: int) -> None:
    """A store that is too small says how many of 24 it keeps; the next start finds those, the first ones."""
    room = max(limit - 2, 0)  # beside a state and a memfd
    keeper(service(PORT, '""', MANY, limit=limit))
    first = ask(machine)

    assert first["kept"] == room
    assert first["error"].startswith(f"the manager keeps {room} of {MANY} descriptors")
    assert number_stored(machine) == limit

    machine.systemctl("restart", "keeper.service")
    assert sorted(ask(machine)["many"], key=int) == [str(number) for number in range(room)]


def test_daemon_that_binds_for_itself(machine: Machine, keeper: Callable[..., None]) -> None:
    """What comes from the store is not taken for passed sockets: without a .socket it binds at each start."""
    keeper(service(PORT), activated=False)
    for starts in range(3):
        if starts:
            machine.systemctl("restart", "keeper.service")
        now = ask(machine)
        assert (now["starts"], now["origins"]) == (starts, ["bound"])


def test_names_that_nobody_takes(machine: Machine, keeper: Callable[..., None]) -> None:
    """A version that does not know what an older one stored makes systemd forget it, when it is ready."""
    keeper(service(PORT, EXTRA, MANY))
    ask(machine)
    assert number_stored(machine) == 3 + MANY

    machine.units(extra={"keeper.service": service(program="worker")})
    machine.systemctl("restart", "keeper.service")

    eventually(lambda: number_stored(machine), (0).__eq__, what="an empty store")
    assert "nobody took 'sdlisten.s.starts'" in machine.journal("keeper.service")
