"""The machinery that the other tests stand on: images, machines, plain containers, and what they leave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from docker.errors import NotFound

from .container import Plain, eventually
from .engine import answers, status
from .images import RELEASES, image, wheel
from .machine import Machine
from .session import LABEL, is_alive, remove_leftovers, session_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import docker

ROOT = Path(__file__).resolve().parent.parent
TRIXIE = RELEASES[1]

# For what does not depend on the version of systemd.
on_one_machine = pytest.mark.systemd(since=RELEASES[-1].systemd)

UNTIL_STOPPED = "[Service]\nExecStart=sleep infinity\n"

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

# A run of pytest with a container of its own, which then waits to be ended.
WAITING_TEST = """\
import signal

def test_waits(plain):
    print("started", plain("sleep", "infinity").get_container_id(), flush=True)
    signal.pause()
"""


def test_engine_answers(engine: docker.DockerClient) -> None:
    """An engine answers, and its status tells whether it is ours."""
    answered, sentence = status()
    assert engine.ping()
    assert answers()
    assert answered
    assert sentence.startswith(("our engine answers", "an engine answers that is not ours"))


def test_image_is_made_once(engine: docker.DockerClient, images: Callable[..., str]) -> None:
    """The second call for an image finds what the first one made, and neither builds nor tags anything."""
    tag = images(TRIXIE)
    made = engine.images.get(tag)
    assert image(TRIXIE) == tag
    found = engine.images.get(tag)
    assert (found.id, found.attrs["Metadata"]) == (made.id, made.attrs["Metadata"])


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
    assert machine.python(IPV6_PROBE) == "bound"


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
    assert machine.sh("ls /opt") == ""
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


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_interrupted_run_leaves_nothing(
    engine: docker.DockerClient, tmp_path: Path, ending: signal.Signals
) -> None:
    """A run that is interrupted removes its containers; after one that was killed, the next run does."""
    (tmp_path / "test_waiting.py").write_text(WAITING_TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "integration.conftest",
        "-c",
        os.devnull,
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        seen = []
        for line in run.stdout:
            seen.append(line)
            if "started" in line:
                break
        else:
            pytest.fail(f"the run ended before it had a container:\n{''.join(seen)}")
        session = session_of(run.pid)
        mine: dict[str, str | list[str] | bool] = {"label": f"{LABEL}={session}"}
        assert len(engine.containers.list(filters=mine)) == 1
        assert is_alive(session)
        run.send_signal(ending)
        run.stdout.read()
    assert not is_alive(session)
    if ending == signal.SIGKILL:
        assert len(remove_leftovers(engine)) == 2, "a container and a network"
    assert not engine.containers.list(all=True, filters=mine)
    assert not engine.networks.list(filters=mine)


def test_session_of_another_host_is_not_judged() -> None:
    """A session of another host on the same engine counts as alive: its process cannot be seen from here."""
    assert is_alive("elsewhere.1.1")
    assert is_alive(session_of(os.getpid()))
    assert not is_alive(f"{socket.gethostname()}.{os.getpid()}.1")
