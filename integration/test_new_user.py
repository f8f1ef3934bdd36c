"""What a new user does first: clone, ``make demo``. Here on a bare Debian, and PyPI does not answer."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from .container import Plain
from .images import RELEASES, ROOT, _build, _made, base

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

TRIXIE = RELEASES[1]
CLONE = "/home/alice/sdlisten"
SECONDS = 100.0

DOCKERFILE = """\
FROM {base}
RUN apt-get -qq -o Acquire::Check-Valid-Until=false update && \\
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends make python3-venv && \\
    rm -rf /var/lib/apt/lists/* && useradd --create-home alice
"""


@pytest.fixture(scope="module")
def bare(engine: docker.DockerClient) -> str:
    """Give the tag of an image of Debian with make and Python's venv, without the library."""
    dockerfile = DOCKERFILE.format(base=base(engine, TRIXIE))
    return _made(
        engine, "sdlisten-new-user:trixie", [dockerfile], lambda tag: _build(engine, tag, dockerfile)
    )


@pytest.fixture(scope="module")
def archive() -> bytes:
    """Give a tar archive of what a clone has: the last commit."""
    # Whoever runs the tests need not be who cloned it; git distrusts such a checkout.
    command = ["git", "-c", f"safe.directory={ROOT}", "archive", f"--prefix={CLONE[1:]}/", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("git is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this is no clone: {error.stderr.decode()}")


@pytest.fixture
def desk(bare: str, archive: bytes) -> Iterator[Plain]:
    """Give a container without network in which alice has just cloned the project."""
    with Plain(bare, ["sleep", "infinity"], tini=True, network="none") as container:
        assert container.get_wrapped_container().put_archive("/", archive)
        container.sh(f"chown -R alice {CLONE}")
        yield container


@pytest.mark.parametrize(
    ("user", "before", "reason"),
    [
        ("alice", "", "pip install failed: "),
        ("root", "", "pip install failed: "),
        ("alice", "dpkg --purge python3-venv python3.13-venv", "apt install python3-venv"),
        ("alice", f"chown -R root {CLONE}", "Permission denied"),
    ],
    ids=["user", "root", "no-venv", "read-only"],
)
def test_demo(desk: Plain, user: str, before: str, reason: str) -> None:
    """``make demo`` says why it cannot install anything, runs from the checkout, and shows every path."""
    desk.sh(before)
    code, output = desk.run(f"make -C {CLONE} demo", user=user, timeout=SECONDS)
    assert code == 0, output
    (said,) = (line for line in output.splitlines() if "Running the demo from the checkout instead." in line)
    assert reason in said
    paths = [line.split()[0] for line in output.splitlines() if " backlog " in line or " 4096 " in line]
    assert paths == ["path", *["activated"] * 2, *["systemd"] * 2, *["bound"] * 2], output
    assert "All as promised, in " in output
