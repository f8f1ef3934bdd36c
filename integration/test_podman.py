"""Podman passes its LISTEN_FDS on: systemd-socket-activate on the host starts a daemon in a container."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdlisten.testing import activate

from .container import eventually
from .engine import EngineUnavailableError, install
from .images import RELEASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import docker

    from sdlisten.testing import Activated

TRIXIE = RELEASES[1]
PACKAGES = {"podman": "podman", "crun": "crun", "systemd-socket-activate": "systemd"}

HELLO = ("python3", "-m", "sdlisten.hello")
# An entrypoint that starts the program as its child.
WRAPPER = ("sh", "-c", 'trap exit TERM; "$@" & wait $!', "sh")
EXEC = ("sdlisten", "exec", "--")

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
SECONDS = 30.0
EX_CONFIG = 78

# In a mount namespace of its own: what Podman mounts vanishes with it, and there it sees cgroups as a modern
# host has them, because crun refuses the mixture of v1 and v2 that others have.
ALONE = 'umount -R -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"'

# Limits that every host grants, and no cgroup: Podman's own wishes fail where root may not raise its limits.
CONFIGURATION = """\
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "crun"
tmp_dir = "{directory}/tmp"
"""
STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{directory}/storage"
runroot = "{directory}/run"
"""


def alone(*command: str) -> list[str]:
    """Return the words of a command that runs in a mount namespace of its own; see `ALONE`."""
    return ["unshare", "--mount", "sh", "-c", ALONE, "sh", *command]


def done(*command: str, environ: Mapping[str, str], stdin: Iterable[bytes] = ()) -> str:
    """Run a command to its end, and return what it wrote.

    Raises:
        AssertionError: Its exit code is not 0.
    """
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # then its exit code says more
            for piece in stdin:
                process.stdin.write(piece)
        output, _ = process.communicate()
    assert process.returncode == 0, f"{command} ended with {process.returncode}: {output.decode()}"
    return output.decode()


@pytest.fixture(scope="module")
def podman() -> Iterator[dict[str, str]]:
    """Install Podman if need be; give the variables that let it work in a directory that is removed."""
    if os.geteuid() != 0:
        pytest.skip("this is not root, who alone may make the mount namespace that Podman works in")
    try:
        install(PACKAGES, PACKAGES)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="sdlisten-podman-") as directory:
        texts = {
            "CONTAINERS_CONF": CONFIGURATION.format(directory=directory),
            "CONTAINERS_STORAGE_CONF": STORAGE.format(directory=directory),
        }
        for name, text in texts.items():
            Path(directory, name).write_text(text)
        variables = {name: f"{directory}/{name}" for name in texts}
        variables["XDG_RUNTIME_DIR"] = directory  # where crun has its state
        yield variables
        done(*alone("podman", "rm", "--all", "--force", "--time=0"), environ=os.environ | variables)
        # Podman's conmon cleans up behind a container and ends a moment later.
        command = ["pgrep", "--list-full", "--full", directory]
        eventually(
            lambda: subprocess.run(command, capture_output=True, text=True, check=False).stdout,
            "".__eq__,
            what="the end of all that Podman started",
        )


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient, images: Callable[..., str], podman: dict[str, str]) -> str:
    """Give the name that Podman has for the image with the library, once a container of it has run."""
    tag = images(TRIXIE)
    environ = os.environ | podman
    archive = engine.images.get(tag).save(named=tag)
    name = done(*alone("podman", "load", "--quiet"), environ=environ, stdin=archive).split()[-1]
    try:
        done(*alone("podman", "run", "--rm", "--network=none", name, "true"), environ=environ)
    except AssertionError as error:
        pytest.skip(f"Podman cannot run containers on this host: {error}")
    return name


@pytest.fixture
def started(image: str, podman: dict[str, str]) -> Iterator[Callable[..., Activated]]:
    """Run a container for the first client of any of ``sockets``, a mapping of names to addresses."""
    with contextlib.ExitStack() as stack:

        def start(*command: str, sockets: Mapping[str, str], options: Sequence[str] = ()) -> Activated:
            run = alone("podman", "run", "--rm", "--network=none", *options, image, *command)
            words = [
                "systemd-socket-activate",
                *(word for name in podman for word in ("-E", name)),
                *(word for address in sockets.values() for word in ("-l", address)),
                f"--fdname={':'.join(sockets)}",
                *run,
            ]
            daemon = stack.enter_context(activate(words, [], env=podman, notify=False))
            for address in sockets.values():
                daemon.wait_output(f"Listening on {address} as ", SECONDS)
            return daemon

        yield start


def free_address() -> str:
    """Return an address word with a port that is free: systemd-socket-activate refuses port 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def connect(address: str) -> socket.socket:
    """Connect from the host."""
    if address.startswith("/"):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SECONDS)
        client.connect(address)
        return client
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def answering_pid(address: str) -> int:
    """Return the pid, as the container numbers them, in the answer of `sdlisten.hello`."""
    with connect(address) as client:
        client.sendall(REQUEST)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1:2] == [b"200"], answer
    return int(body.split()[0])


def test_sockets_of_the_host(started: Callable[..., Activated], tmp_path: Path) -> None:
    """A daemon without any network serves the host's sockets as PID 1 of its container, under their names."""
    sockets = {"admin": f"{tmp_path}/admin.sock", "http": free_address()}
    daemon = started(*HELLO, "-l", "http=9", "-l", "admin=/nowhere", sockets=sockets)
    assert [answering_pid(address) for address in sockets.values()] == [1, 1]
    for name, address in sockets.items():
        daemon.wait_output(f"adopted name={name} address={address} ", SECONDS)
    assert daemon.terminate(SECONDS) == 0


@pytest.mark.parametrize("parent", [WRAPPER, ("tini", "--")], ids=["wrapper", "tini"])
def test_entrypoint_without_exec(started: Callable[..., Activated], parent: tuple[str, ...]) -> None:
    """Below an entrypoint the sockets are not the daemon's, unless by ``sdlisten exec``."""
    required = ["--env=SDLISTEN_REQUIRE=1"]
    sockets = {"http": free_address()}
    refused = started(*parent, *HELLO, "-l", "http=9", sockets=sockets, options=required)
    connect(sockets["http"]).close()
    assert refused.wait(SECONDS) == EX_CONFIG
    assert "LISTEN_FDS=1 is meant for pid 1, this is " in refused.output
    sockets = {"http": free_address()}
    daemon = started(*parent, *EXEC, *HELLO, "-l", "http=9", sockets=sockets, options=required)
    assert answering_pid(sockets["http"]) != 1
    daemon.wait_output(f"adopted name=http address={sockets['http']} ", SECONDS)
