"""Wrong units: the service fails with 78, binds nothing, and says in the journal what to do; that helps."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import pytest

from . import apps
from .machine import UNITS

if TYPE_CHECKING:
    from .machine import Machine

SOCKET, SERVICE = ((UNITS / f"hello.{suffix}").read_text() for suffix in ("socket", "service"))

# So that it could bind, if it wanted to.
MAY_BIND = "PrivateNetwork=no\nRestrictAddressFamilies=AF_INET AF_INET6"
HELLO = "/usr/bin/python3 -m sdlisten.hello"
OTHER_PORT = 9090


def drop_in(*lines: str) -> dict[str, str]:
    """Return a drop-in that makes these lines hold for hello.service."""
    text = "\n".join(["[Service]", MAY_BIND, *lines, ""])
    return {"hello.service.d/test.conf": text}


def start(machine: Machine) -> None:
    """Start hello.service, and wait until it has ended."""
    machine.systemctl("start", "--wait", "hello.service", check=False)


def listening(machine: Machine) -> set[int]:
    """Return the TCP ports on which somebody listens."""
    lines = machine.sh("ss -Hltn").splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}


def failed_as_configured(machine: Machine) -> str:
    """Check that hello.service has failed for what is written in its units; returns what it said."""
    state = machine.systemctl("show", "--property=ActiveState,Result,ExecMainStatus", "hello.service")
    assert set(state.splitlines()) == {"ActiveState=failed", "Result=exit-code", "ExecMainStatus=78"}
    journal = machine.journal("hello.service")
    assert "status=78/CONFIG" in journal
    (said,) = re.findall(r"(?m)^hello: (.*)$", journal)
    return str(said)


def follow(machine: Machine, said: str) -> None:
    """Do what an error text says, word for word."""
    found = re.search(r"Put (\S+) into the \.socket unit that has (\S+), then: (.+)\.$", said)
    assert found, said
    line, where, commands = found.groups()
    (path,) = machine.sh(["grep", "-rlx", where, "/etc/systemd/system"]).splitlines()
    machine.sh(["sed", "-i", f"/^FileDescriptorName=/d; s,^{where}$,&\\n{line},", path])
    machine.sh(commands)


@pytest.mark.parametrize(
    ("lines", "passed"),
    [
        pytest.param(
            "ListenStream=8080\nFileDescriptorName=wrong", "fd 3 'wrong' [::]:8080", id="wrong-name"
        ),
        pytest.param(
            "ListenStream=8080\nListenStream=/run/hello.sock",
            "fd 3 'hello.socket' [::]:8080, fd 4 'hello.socket' /run/hello.sock",
            id="no-name",
        ),
    ],
)
def test_name(machine: Machine, lines: str, passed: str) -> None:
    """Without the name asked for, the service fails and binds nothing; the mend, word for word, mends it."""
    text = SOCKET.replace("ListenStream=8080", lines, 1).replace("FileDescriptorName=http\n", "")
    asks = drop_in("ExecStart=", f"ExecStart={HELLO} -l http={OTHER_PORT}")
    machine.units("hello.service", extra={"hello.socket": text, **asks})

    start(machine)

    said = failed_as_configured(machine)
    assert said.startswith(
        f"no passed socket is named 'http'. Passed: {passed}. "
        f"Wanted: name 'http', else address {OTHER_PORT}. "
    )
    assert listening(machine) & {8080, OTHER_PORT} == {8080}  # systemd's

    follow(machine, said)
    apps.get(machine)


def test_without_its_sockets(machine: Machine) -> None:
    """Started without its socket unit it does not bind, and names the command that helps."""
    alone = SERVICE.replace("Requires=hello.socket\nAfter=hello.socket\n", "")
    machine.units("hello.socket", extra={"hello.service": alone, **drop_in()})

    start(machine)

    said = failed_as_configured(machine)
    assert said.startswith("no sockets were passed (LISTEN_FDS is not set). Start it through its unit: ")
    assert 8080 not in listening(machine)

    command = said.partition("through its unit: ")[2].partition(";")[0]
    assert command == "systemctl start hello.socket"
    machine.sh(command)
    apps.get(machine)


def test_nothing_required(machine: Machine) -> None:
    """Without SDLISTEN_REQUIRE=1 the same service, started without its sockets, binds."""
    alone = SERVICE.replace("Requires=hello.socket\nAfter=hello.socket\n", "")
    machine.units(extra={"hello.service": alone, **drop_in("Environment=SDLISTEN_REQUIRE=0")})

    machine.systemctl("start", "hello.service")

    assert "bound name=http address=8080" in machine.journal("hello.service")


def test_wrapper_without_exec(machine: Machine) -> None:
    """Behind a shell that does not exec, the error names both pids; with exec all is well."""
    wrapped = f"ExecStart=/bin/sh -c '{HELLO} -l http=8080; exit $?'"
    machine.units("hello.socket", "hello.service", extra=drop_in("ExecStart=", wrapped))

    start(machine)

    said = failed_as_configured(machine)
    shell = machine.show("hello.service", "ExecMainPID")
    found = re.search(
        r"LISTEN_FDS=1 is meant for pid (\d+), this is (\d+): a wrapper started us without exec", said
    )
    assert found, said
    assert found[1] == shell != found[2]

    machine.units(extra=drop_in("ExecStart=", wrapped.replace(HELLO, f"exec {HELLO}")))
    apps.get(machine)


def test_waiting_client(machine: Machine) -> None:
    """While a client waits for a service that cannot start, systemd tries once a second, no faster."""
    machine.units("hello.service", extra={"hello.socket": SOCKET.replace("Name=http", "Name=wrong")})
    machine.systemctl("start", "hello.socket")
    with machine.connect(8080):
        follow = "journalctl --follow --lines=0 --output=short-monotonic --unit=hello.service"
        ends = machine.sh(f"{follow} | grep --max-count=3 'Main process exited'").splitlines()

    times = [float(line.lstrip("[ ").partition("]")[0]) for line in ends]
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(times)), ends
