"""The same without root: `systemd --user`, and units/hello-user.*."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from . import apps

if TYPE_CHECKING:
    from .machine import Machine

ALICE = "alice"


@pytest.fixture
def alice(machine: Machine) -> Machine:
    """A machine on which Alice has hello-user.socket, not started yet."""
    apps.install(machine)
    machine.add_user(ALICE)
    machine.units("hello-user.socket", "hello-user.service", user=True)
    machine.systemctl("daemon-reload", user=ALICE)
    return machine


def path_of(alice: Machine) -> str:
    """Return the path of the socket."""
    return f"/run/user/{alice.sh(f'id -u {ALICE}')}/hello.sock"


def test_restart(alice: Machine) -> None:
    """A user's service starts, restarts, stops, and starts with a client; the socket stays as it is."""
    alice.systemctl("start", "hello-user.socket", user=ALICE)
    path = path_of(alice)
    before = apps.facts(alice, path)
    assert before[path]["mode"] == "0o140600"

    pids = []
    for order in ("start", "restart", "restart", "stop"):
        alice.systemctl(order, "hello-user.service", user=ALICE)
        pids.append(apps.get_inside(alice, path, user=ALICE))

    assert len(set(pids)) == len(pids)
    assert alice.sh(["ps", "-o", "user=", str(pids[-1])]) == ALICE
    assert apps.facts(alice, path) == before


def test_command_in_an_error(alice: Machine) -> None:
    """The command that an error proposes is for Alice's own manager, and helps."""
    service = "~/.config/systemd/user/hello-user.service"
    alone = f"sed '/^Requires=/d; /^After=/d' /etc/systemd/user/hello-user.service >{service}"
    alice.sh(f"mkdir -p ~/.config/systemd/user; {alone}; systemctl --user daemon-reload", user=ALICE)
    alice.systemctl("start", "--wait", "hello-user.service", check=False, user=ALICE)

    journal = alice.journal("_SYSTEMD_USER_UNIT=hello-user.service")
    found = re.search(r"^hello: no sockets were passed .* through its unit: (.+?);", journal, re.MULTILINE)
    assert found, journal
    assert found[1] == "systemctl --user start hello-user.socket"
    alice.sh(found[1], user=ALICE)
    assert apps.get_inside(alice, path_of(alice), user=ALICE)
