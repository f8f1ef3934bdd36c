"""All of tests/ on the newest Python and systemd, as a user without any privilege."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .container import Plain

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent

# What pytest reads; sdlisten itself is the wheel in the image.
CHECKOUT = ("tests", "conftest.py", "pyproject.toml")
SECONDS = 600.0

# Tests that cannot run in a container, and why. Nothing else may be left out: see SDLISTEN_NO_SKIP below.
DESELECTED: Mapping[str, str] = {
    "tests/test_supervisor.py::test_a_nice_start": "alice may not raise a priority again",
    "tests/test_supervisor.py::test_no_nice_start_without_a_way_back": "gives up what only root has",
    "tests/test_supervisor_parts.py::test_priorities_come_back": "as test_a_nice_start",
}

# What the engine takes away from a container, but not from a user of a machine: to make namespaces of one's
# own, to trace one's own children, and /proc/sys, which is writable for whoever owns a network namespace.
AS_ON_A_MACHINE = {
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "cap_add": ["SYS_ADMIN", "SYS_PTRACE"],  # for root in there; alice has none
}
SETUP = "useradd --create-home alice && chown -R alice /home/alice && mount -o remount,rw /proc/sys"
RUN = "cd /home/alice/checkout && exec python3 -m pytest -q --tb=short tests"


@pytest.mark.timeout(SECONDS)
def test_suite_on_the_newest_python(
    suite_image: str, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every test of tests/ passes on Python 3.14 beside systemd 262, and none is skipped."""
    # tini: orphans of the tests are to be reaped by someone.
    waits = Plain(suite_image, ["sleep", "infinity"], tini=True, network=network, options=AS_ON_A_MACHINE)
    with waits as container:
        container.put({f"/home/alice/checkout/{name}": ROOT / name for name in CHECKOUT})
        container.sh(SETUP)
        versions = container.sh("python3 --version; systemctl --version | sed q").splitlines()
        command = " ".join([RUN, *(f"--deselect={test}" for test in DESELECTED)])
        environ = {"SDLISTEN_NO_SKIP": "1", "PYTHONSAFEPATH": "1"}
        code, output = container.run(command, user="alice", env=environ, timeout=SECONDS)
    closing = output.rstrip().rpartition("\n")[2]
    with capsys.disabled():
        sys.stdout.write(f"\ntests/ with {', '.join(versions)}: {closing}\n")
    assert code == 0, output
    assert "skipped" not in closing, output
