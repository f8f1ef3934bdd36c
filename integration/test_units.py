"""Every file of units/: clean for systemd's own checks, and each pair starts with a client and answers it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from . import apps
from .machine import UNITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .machine import Machine

# systemd-analyze counts in tenths: this is 2.5.
EXPOSURE_LIMIT = 25


class Pair(NamedTuple):
    """A .socket unit and what it starts, perhaps with one drop-in, which may need a version of systemd."""

    socket: str
    service: str
    drop_in: str = ""
    since: int = 0

    def __str__(self) -> str:
        return self.drop_in or self.socket.removesuffix(".socket")

    @property
    def files(self) -> list[str]:
        """What is to be installed."""
        return [name for name in (self.socket, self.service, self.drop_in) if name]

    @property
    def of_a_user(self) -> bool:
        """Whether it is for user managers."""
        return self.socket.endswith("-user.socket")

    @property
    def per_connection(self) -> bool:
        """Whether systemd accepts, and starts an instance for each connection."""
        return "@" in self.service


def pairs() -> Iterator[Pair]:
    """Find what is in units/: each pair as it is, and with each of its drop-ins.

    A drop-in that does not work everywhere says so in a comment: "For systemd 253 and newer".
    """
    for path in sorted(UNITS.glob("*.socket")):
        if path.with_suffix(".container").exists():  # a quadlet: integration/test_quadlet.py
            continue
        accept = re.search(r"(?m)^Accept=yes$", path.read_text())
        pair = Pair(path.name, f"{path.stem}{'@' if accept else ''}.service")
        yield pair
        for unit in pair.files:
            for drop_in in sorted(UNITS.glob(f"{unit}.d/*.conf")):
                since = re.search(r"For systemd (\d+) and newer", drop_in.read_text())
                name = f"{unit}.d/{drop_in.name}"
                yield pair._replace(drop_in=name, since=int(since[1]) if since else 0)


PAIRS = list(pairs())
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


def test_every_file_belongs_to_a_pair() -> None:
    """There is nothing in units/ that the other tests do not start."""
    found = {str(path.relative_to(UNITS)) for path in UNITS.rglob("*") if path.is_file()}

    quadlets = {name for path in UNITS.glob("*.container") for name in (path.name, f"{path.stem}.socket")}
    assert found - quadlets - {"README.md"} == {name for pair in PAIRS for name in pair.files}


@each_pair
def test_verify(machine: Machine, pair: Pair) -> None:
    """`systemd-analyze verify` has nothing to say, unless the drop-in is for a newer systemd."""
    machine.units(*pair.files, user=pair.of_a_user)
    directory = f"/etc/systemd/{'user' if pair.of_a_user else 'system'}"
    mode = ["--user"] if pair.of_a_user else []
    units = [f"{directory}/{unit}" for unit in (pair.socket, pair.service)]

    done = machine.run(["systemd-analyze", "verify", *mode, *units], env={"XDG_RUNTIME_DIR": "/run"})

    assert done.code == 0, done.output
    if machine.release.systemd >= pair.since:
        assert done.output == ""
    else:
        assert pair.drop_in in done.output


@pytest.mark.systemd(since=257)
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.of_a_user], ids=str)
def test_exposure(machine: Machine, pair: Pair) -> None:
    """`systemd-analyze security` gives the service 2.5 or less."""
    machine.units(*pair.files)

    analyze = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_LIMIT}", pair.service]
    done = machine.run(analyze)

    assert "Overall exposure level" in done.output
    assert done.code == 0, done.output.splitlines()[-1]


@each_pair
def test_answers(machine: Machine, pair: Pair) -> None:
    """The first client starts the service, and is answered by its main process, a child of it, or its own."""
    user = "alice" if pair.of_a_user else "root"
    if pair.of_a_user:
        machine.add_user(user)
    apps.install(machine)
    machine.units(*pair.files, user=pair.of_a_user)
    if pair.of_a_user:
        machine.systemctl("daemon-reload", user=user)
    machine.systemctl("start", pair.socket, user=user)
    show = ["show", "--value", "--property=Listen", pair.socket]
    addresses = re.findall(r"(.+) \(Stream\)", machine.systemctl(*show, user=user))
    assert addresses

    pids = [apps.get_inside(machine, address, user=user) for address in addresses * 2]

    if pair.per_connection:
        assert len(set(pids)) == len(pids)
    else:
        main = machine.systemctl("show", "--value", "--property=MainPID", pair.service, user=user)
        if "supervised" in pair.drop_in:  # its workers answer
            main = machine.sh(f"cat /proc/{main}/task/{main}/children")
        assert {str(pid) for pid in pids} <= set(main.split())
