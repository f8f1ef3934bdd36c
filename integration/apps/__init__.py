"""Small programs for the machines: daemons that tell what they see, and clients that ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from integration.machine import Machine

__all__ = ("ask", "command", "facts", "get", "get_inside", "install", "pid_of", "restart")

DIRECTORY = "/opt/apps"


def install(machine: Machine) -> None:
    """Put all programs into a machine; `Machine.cleanup` removes them."""
    here = Path(__file__)
    machine.put({f"{DIRECTORY}/{path.name}": path for path in here.parent.glob("*.py") if path != here})


def command(program: str, *words: str) -> list[str]:
    """Return the command that runs one of them in a machine."""
    return ["/usr/bin/python3", f"{DIRECTORY}/{program}.py", *words]


def ask(machine: Machine, *words: str) -> Mapping[str, Any]:
    """Connect to all these addresses of a machine, and return what its daemons say: see ask.py, probe.py.

    What is no JSON, an error for one, comes back as it is.
    """
    answers = json.loads(machine.sh(command("ask", *words), timeout=60))
    return {word: _read(answer) for word, answer in answers.items()}


def get(machine: Machine, port: int = 8080) -> int:
    """Send a request from the host to a hello daemon, and return the pid that answers.

    Raises:
        OSError: As `Container.connect`.
        AssertionError: It is no good answer; says which.
    """
    with machine.connect(port) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return pid_of(b"".join(iter(lambda: sock.recv(65536), b"")))


def get_inside(machine: Machine, address: str, *, user: str = "root") -> int:
    """Send a request from inside the machine to a hello daemon, and return the pid that answers.

    Raises:
        AssertionError: It is no good answer; says which, or the error.
    """
    answers = json.loads(machine.sh(command("ask", "--http", address), user=user, timeout=60))
    return pid_of(answers[address].encode())


def pid_of(answer: bytes) -> int:
    """Return the pid in an answer of a hello daemon.

    Raises:
        AssertionError: It is no good answer; says which.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    first = body.partition(b" ")[0]
    assert b" 200 " in head, answer
    assert first.isdigit(), answer
    return int(first)


def restart(machine: Machine, rounds: int, *addresses: str) -> Mapping[str, Any]:
    """Restart hello.service so often, and return what restarts.py says."""
    seen: Mapping[str, Any] = json.loads(
        machine.sh(command("restarts", str(rounds), *addresses), timeout=30 + 3 * rounds)
    )
    return seen


def facts(machine: Machine, *addresses: str) -> Mapping[str, Any]:
    """Return what must not change of listening sockets, found by their addresses in ss: see restarts.py."""
    (found,) = restart(machine, 0, *addresses)["facts"]
    assert set(found) == set(addresses), found
    seen: Mapping[str, Any] = found
    return seen


def _read(answer: str) -> Any:  # noqa: ANN401 -- JSON
    try:
        return json.loads(answer)
    except ValueError:
        return answer
