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
    def user(self) -> str:
        """Whose manager runs it."""
        return "alice" if self.of_a_user else "root"

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


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    """What of units/ is installed."""
    found: Pair = request.param
    return found


@pytest.fixture(scope="module")
def installed(machine: Machine, pair: Pair) -> Iterator[Machine]:
    """The machine on which it is installed."""
    with machine.cleanup():
        apps.install(machine)
        if pair.of_a_user:
            machine.add_user(pair.user)
        machine.units(*pair.files, user=pair.of_a_user)
        if pair.of_a_user:
            machine.systemctl("daemon-reload", user=pair.user)
        yield machine


def test_every_file_belongs_to_a_pair() -> None:
    """There is nothing in units/ that the other tests do not start."""
    found = {str(path.relative_to(UNITS)) for path in UNITS.rglob("*") if path.is_file()}

    quadlets = {name for path in UNITS.glob("*.container") for name in (path.name, f"{path.stem}.socket")}
    assert found - quadlets - {"README.md"} == {name for pair in PAIRS for name in pair.files}


def test_clean(installed: Machine, pair: Pair) -> None:
    """`systemd-analyze verify` knows no fault, but what is too new for it; `security` gives 2.5 or less."""
    directory = f"/etc/systemd/{'user' if pair.of_a_user else 'system'}"
    units = [f"{directory}/{unit}" for unit in (pair.socket, pair.service)]
    mode = ["--user"] if pair.of_a_user else []

    verify = installed.run(["systemd-analyze", "verify", *mode, *units], user=pair.user)

    assert verify.code == 0, verify.output
    if installed.release.systemd >= pair.since:
        assert verify.output == ""
    else:
        assert pair.drop_in in verify.output

    if not pair.of_a_user:
        analyze = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_LIMIT}"]
        security = installed.run([*analyze, pair.service])
        assert "Overall exposure level" in security.output
        assert security.code == 0, security.output.splitlines()[-1]


def test_answers(installed: Machine, pair: Pair) -> None:
    """The first client starts the service, and is answered by it, or by an instance of its own."""
    installed.systemctl("start", pair.socket, user=pair.user)
    show = ["show", "--value", "--property=Listen", pair.socket]
    addresses = re.findall(r"(.+) \(Stream\)", installed.systemctl(*show, user=pair.user))
    assert addresses

    pids = [apps.get_inside(installed, address, user=pair.user) for address in addresses * 2]

    if pair.per_connection:
        assert len(set(pids)) == len(pids)
    else:
        # The line of the hierarchy that systemd manages.
        cgroups = installed.sh(["grep", "-h", "^0::", *(f"/proc/{pid}/cgroup" for pid in pids)]).splitlines()
        assert [cgroup.rpartition("/")[2] for cgroup in cgroups] == [pair.service] * len(pids)
