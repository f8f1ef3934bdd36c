"""Machines have the systemd they are named after, the library, a cgroup tree of their own, and come clean."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .container import eventually
from .images import RELEASES, wheel
from .machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

TRIXIE = RELEASES[1]

# For what does not depend on the version of systemd.
on_one_machine = pytest.mark.systemd(since=RELEASES[-1].systemd)

UNTIL_STOPPED = "[Service]\nExecStart=sleep infinity\n"


def test_boot(machine: Machine) -> None:
    """Each machine boots the systemd and has the Python of its release; no unit has failed."""
    assert machine.boot() == "running", machine.sh("systemctl --failed")
    assert machine.sh("cat /proc/1/comm") == "systemd"
    assert machine.python_version == machine.release.python
    if machine.release.suite == "sid":
        assert machine.version >= machine.release.systemd
    else:
        assert machine.version == machine.release.systemd


def test_library_is_the_wheel(machine: Machine) -> None:
    """On each machine ``import sdlisten`` gives this checkout's wheel, compiled, to every user."""
    where = machine.python("import sdlisten; print(sdlisten.__file__)")
    assert where == f"{machine.release.site}/sdlisten/__init__.py"
    assert machine.sh(f"cat {where}") == wheel()["sdlisten/__init__.py"].decode().rstrip("\n")
    assert machine.sh(f"ls {machine.release.site}/sdlisten/__pycache__/__init__.*.pyc")
    assert machine.sh("head -1 /usr/local/bin/sdlisten") == "#!/usr/bin/python3"
    code = "import sdlisten, systemd.daemon"
    machine.sh(f"systemd-run --quiet --wait --pipe --property=DynamicUser=yes python3 -c '{code}'")


def test_cgroup_tree_is_its_own(machine: Machine) -> None:
    """Seen from the host, PID 1 of a machine lives in its own container's cgroup, never in the host's."""
    seen = Path(f"/proc/{machine.pid}/cgroup").read_text()
    (unified,) = (line for line in seen.splitlines() if line.startswith("0::"))
    assert f"{machine.get_container_id()}/init.scope" in unified


def test_two_machines_are_separate(images: Callable[..., str], network: str) -> None:
    """Two machines of one release share no cgroup, and the host's tree gets no scope or slice of theirs."""
    before = _scopes_of_the_host()
    with (
        Machine(images(TRIXIE), TRIXIE, network=network) as one,
        Machine(images(TRIXIE), TRIXIE, network=network) as other,
    ):
        one.sh("mkdir /sys/fs/cgroup/only-here")
        assert other.sh("ls -d /sys/fs/cgroup/only-here", check=False) == ""
        ours = {one.get_container_id(), other.get_container_id()}
        new = _scopes_of_the_host() - before
        assert not {path for path in new if not ours.intersection(Path(path).parts)}


def _scopes_of_the_host() -> set[str]:
    names = {"init.scope", "system.slice", "user.slice"}
    return {path for path, _, _ in os.walk("/sys/fs/cgroup") if Path(path).name in names}


def test_addresses(machine: Machine) -> None:
    """The host reaches a machine's ports by IPv4 and by IPv6, and the machine has ::1."""
    machine.units(
        extra={
            "echo.socket": "[Socket]\nListenStream=7\nAccept=yes\n",
            "echo@.service": "[Service]\nExecStart=cat\nStandardInput=socket\n",
        }
    )
    machine.systemctl("start", "echo.socket")
    for ipv6 in (False, True):
        with machine.connect(7, ipv6=ipv6) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(64) == b"hello"
    machine.python("import socket; socket.create_server(('::1', 0), family=socket.AF_INET6).close()")


@on_one_machine
def test_put_writes_anywhere(machine: Machine) -> None:
    """Files arrive with their mode also below a tmpfs, whose own mode stays."""
    script = "/tmp/new/script"  # noqa: S108 -- in there
    machine.put({"/opt/text": "text", script: "#!/bin/sh\necho ran\n", "/run/bytes": b"\xff"})
    assert machine.sh("cat /opt/text; stat -c %a /opt/text") == "text644"
    assert machine.sh(script) == "ran"
    assert machine.sh("od -An -tx1 /run/bytes").split() == ["ff"]
    assert machine.sh("stat -c %a /tmp /run") == "1777\n755"


def test_cleanup_undoes_a_test(machine: Machine) -> None:
    """After a clean-up block no unit, file or user of it is left; what was there before, is."""
    files = machine.sh("find /etc /opt /run/systemd/system | sort")
    machine.units(extra={"before.service": UNTIL_STOPPED})
    machine.systemctl("start", "before.service")
    with machine.cleanup():
        machine.units(extra={"a.socket": "[Socket]\nListenStream=8001\n", "a@.service": UNTIL_STOPPED})
        machine.units(extra={"a.service": UNTIL_STOPPED, "fails.service": "[Service]\nExecStart=false\n"})
        machine.systemctl("start", "a.socket", "a@1.service", "a@2.service", "fails.service")
        machine.sh("systemd-run --unit=transient sleep infinity")
        machine.put({"/opt/file": ""})
        machine.add_user("alice")
        assert machine.systemctl("is-system-running", user="alice") == "running"
        machine.connect(8001).close()
        eventually(lambda: machine.show("a.service", "ActiveState"), "active".__eq__)
    units = ("a.socket", "a.service", "a@1.service", "a@2.service", "transient.service", "fails.service")
    states = machine.systemctl("is-active", *units, "before.service", check=False)
    assert states.split() == ["inactive"] * len(units) + ["active"]
    assert "file" not in machine.sh("ls /opt").split()
    assert machine.run("id alice").code == 1
    machine.sh("systemctl stop before.service; rm /etc/systemd/system/before.service")
    assert _without(machine.sh("find /etc /opt /run/systemd/system | sort"), "-") == _without(files, "-")


def _without(lines: str, ending: str) -> list[str]:
    """Drop the back-up files of useradd, /etc/passwd- and so on."""
    return [line for line in lines.splitlines() if not line.endswith(ending)]


@on_one_machine
def test_cleanup_reports_what_does_not_stop(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that ignores SIGTERM fails the test that left it behind, and is killed all the same."""
    monkeypatch.setattr("integration.machine.STOP_SECONDS", 1)
    stubborn = "[Service]\nExecStart=sh -c 'trap : TERM; while :; do sleep infinity; done'\nKillMode=mixed\n"
    block = machine.cleanup()
    block.__enter__()
    machine.units(extra={"stubborn.service": stubborn})
    machine.systemctl("start", "stubborn.service")
    with pytest.raises(AssertionError, match=r"(?s)does not stop within 1 s.*stubborn\.service"):
        block.__exit__(None, None, None)
    assert machine.systemctl("is-active", "stubborn.service", check=False) == "inactive"


@on_one_machine
def test_journal_begins_with_the_test(machine: Machine) -> None:
    """`journal` shows what a unit wrote in this test, not what its namesake wrote in an earlier one."""
    said = []
    for word in ("first", "second"):
        with machine.cleanup():
            machine.units(extra={"says.service": f"[Service]\nType=oneshot\nExecStart=echo {word}\n"})
            machine.systemctl("start", "says.service")
            said.append(machine.journal("says.service").splitlines())
    first, second = said
    assert "first" in first
    assert "second" in second
    assert "first" not in second


@on_one_machine
def test_commands_tell_what_happened(machine: Machine) -> None:
    """A failing command says what it wrote; one without end is killed at its limit, and says so too."""
    assert machine.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
    assert machine.sh("echo out; echo err >&2; exit 3", check=False) == "out"
    with pytest.raises(AssertionError, match=r"(?s)ended with 3.*stdout: out.*stderr: err"):
        machine.sh("echo out; echo err >&2; exit 3")
    with pytest.raises(TimeoutError, match=r"(?s)did not end within 0\.2 s.*begun"):
        machine.sh("echo begun; sleep infinity", timeout=0.2)
    with pytest.raises(AssertionError, match=r"last seen: 'inactive'"):
        eventually(lambda: machine.show("no.service", "ActiveState"), "active".__eq__, within=0.1)
