"""The image of `sdlisten run`: PID 1 in a container or below tini, not root, nothing writable but /tmp."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.load import LoadProcess

from .container import Plain, eventually
from .images import RELEASES, _build, _made

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from socket import socket

    import docker

DOCKERFILE = Path(__file__).parent / "images" / "hello" / "Dockerfile"
TRIXIE = RELEASES[1]
USER = 10001

# As tight as an engine can make it.
HARDENED = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}
SERVE = ("-l", "http=8080", "--workers", "2", "--", "python3", "-m", "sdlisten.hello")
WAIT = 30.0

PAGE = b"GET / HTTP/1.1\r\nHost: hello\r\n\r\n"

# A worker that leaves its grandchildren to whoever is PID 1, and tells how many of them still are there.
ORPHANS = """
import os, sys

def parent(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[1])

count = int(sys.argv[1])
hold, release = os.pipe()
told, tell = os.pipe()
for _ in range(count // 50):
    child = os.fork()
    if child == 0:
        for _ in range(50):
            if os.fork() == 0:
                os.close(release)
                os.write(tell, f"{os.getpid()} ".encode())
                os.read(hold, 1)
                os._exit(0)
        os._exit(0)
    os.waitpid(child, 0)
pids = []
text = ""
while text.count(" ") < count:
    text += os.read(told, 65536).decode()
pids = [int(pid) for pid in text.split()]
print(len(pids), "orphans of", *sorted({parent(pid) for pid in pids}), flush=True)
os.close(release)
left = pids
while left:
    left = [pid for pid in left if os.path.exists(f"/proc/{pid}")]
print("none left", flush=True)
"""


# hello, with so many MB more in each generation.
LARGE = """
import os, sys
from sdlisten.hello import main
sizes = os.environ["SIZES"].split()
kept = b"x" * (int(sizes[int(os.environ["SDLISTEN_GENERATION"]) - 1]) << 20)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient, images: Callable[..., str]) -> str:
    """Give the tag of the image, made from the Dockerfile that people copy."""
    dockerfile = DOCKERFILE.read_text().replace("BASE=python:3.14-slim", f"BASE={images(TRIXIE)}")
    assert images(TRIXIE) in dockerfile
    return _made(
        engine, f"sdlisten-hello:{TRIXIE.suite}", [dockerfile], lambda tag: _build(engine, tag, dockerfile)
    )


@pytest.fixture(params=[False, True], ids=["pid1", "tini"])
def run(image: str, network: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Plain]]:
    """Give a function that runs the image, as PID 1 and then under ``docker run --init``, until it serves."""
    with contextlib.ExitStack() as stack:

        def start(*command: str, serves: bool = True, **more: object) -> Plain:
            options = {**HARDENED, "init": request.param, **more}
            container = Plain(image, command, network=network, options=options)
            container.tmpfs["/tmp"] = ""  # noqa: S108 -- in there
            stack.enter_context(container)
            if serves:
                container.wait_for_log("sdlisten: generation 1 serves", within=WAIT)
            return container

        yield start


def status(container: Plain) -> dict[str, Any]:
    """Return what ``sdlisten ctl status --json`` says to the user of the image.

    Root without CAP_DAC_OVERRIDE could not even connect.
    """
    command = ["sdlisten", "ctl", "status", "--json"]
    found: dict[str, Any] = json.loads(container.sh(command, check=False, user=str(USER)))
    return found


def begin(container: Plain) -> socket:
    """Return a connection that a worker serves, with a request that is only half sent."""
    client = container.connect(8080)
    client.sendall(PAGE)
    assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
    client.sendall(PAGE[:10])
    return client


def finish(client: socket) -> bytes:
    """Send the rest, and read until the other side closes."""
    with client:
        client.sendall(PAGE[10:])
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_who_and_where(run: Callable[..., Plain], request: pytest.FixtureRequest) -> None:
    """It runs as the user of the image, with a root that nobody can write to, and serves."""
    container = run(*SERVE)
    assert "tini" in request.node.name or status(container)["pid"] == 1
    uids = container.sh("grep -h ^Uid: /proc/[0-9]*/status | sort -u", user=str(USER)).split()
    assert set(uids) == {"Uid:", str(USER)}
    assert "Read-only file system" in container.run("touch /file", user="root").output
    assert len({worker["pid"] for worker in status(container)["generations"][0]["workers"]}) == 2
    with begin(container) as client:
        assert client.fileno() >= 0


def test_docker_stop_drains(run: Callable[..., Plain]) -> None:
    """`docker stop` lets a request that was begun be answered, and the container ends with 0 in its 10 s."""
    container = run(*SERVE)
    client = begin(container)
    container.signal("SIGTERM")  # what docker stop sends first
    container.wait_for_log("draining: open=1", within=WAIT)
    answer = finish(client)
    # And what it does then: wait for 10 s, SIGKILL. That would be 137.
    container.get_wrapped_container().stop(timeout=10)
    assert b"HTTP/1.1 200 OK\r\n" in answer
    assert b"Connection: close\r\n" in answer
    assert container.wait() == 0
    written = container.logs()
    assert "finished=1 handed_over=0 closed_idle=0 dropped=0" in written
    assert written.endswith("sdlisten: stopped\n")


@pytest.mark.parametrize("command", [SERVE, ("-l", "http=8080", "--", "sleep", "infinity")])
def test_docker_stop_while_it_starts(run: Callable[..., Plain], command: tuple[str, ...]) -> None:
    """`docker stop` ends it at once also before anything is ready, PID 1 or not: the signal is not lost."""
    container = run(*command, serves=False)
    container.wait_for_log("sdlisten: generation 1 starts", within=WAIT)
    container.get_wrapped_container().stop(timeout=10)
    assert container.wait() == 0


def test_hangup_rolls(run: Callable[..., Plain], rounds: Callable[[int], int]) -> None:
    """`docker kill -s HUP` rolls, again and again, and of all kinds of requests none fails."""
    container = run(*SERVE)
    modes = {"short": 100, "slow": 0, "keep": 150}
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                LoadProcess(f"{container.ip}:8080", mode=mode, rate=rate, clients=12, quiet=True)
            )
            for mode, rate in modes.items()
        ]
        for load in loads:
            load.wait_started()
        for number in range(rounds(5)):
            container.signal("SIGHUP")
            container.wait_for_log(f"sdlisten: generation {number + 2} serves\n", within=WAIT)
        results = [load.stop() for load in loads]
    print(*results, sep="\n")  # noqa: T201 -- the figures, for whoever asks pytest for them
    assert not [str(result) for result in results if not result.clean]
    seen = status(container)
    assert (seen["rolls"], seen["refused"], seen["restarts"], seen["killed"]) == (rounds(5), 0, 0, 0)


@pytest.mark.parametrize("count", [1000])
def test_orphans_are_reaped(run: Callable[..., Plain], count: int) -> None:
    """A thousand grandchildren that a worker leaves behind come to PID 1, and none of them stays a zombie."""
    container = run("-l", "http=8080", "--", "python3", "-u", "-c", ORPHANS, str(count), serves=False)
    written = container.wait_for_log("none left\n", within=60)
    assert f"{count} orphans of 1\n" in written


def test_health(run: Callable[..., Plain]) -> None:
    """The engine's health check says healthy while it serves, and no longer from the order to stop on."""
    container = run("--stop-delay", "600", *SERVE)
    check = ["sdlisten", "ctl", "status"]
    assert container._inspected()["Config"]["Healthcheck"]["Test"] == ["CMD", *check]
    health = lambda: container._inspected()["State"]["Health"]["Status"]  # noqa: E731 -- a name for a reader
    eventually(health, "healthy".__eq__, within=WAIT, what="health")
    assert container.run(check, user=str(USER)).code == 0
    container.signal("SIGTERM")
    container.wait_for_log("generation 1 serves until the stop delay is over", within=WAIT)
    code, text = container.run(check, user=str(USER))
    assert code == 1
    assert text.startswith("stopping; generation 1 serves until the stop delay is over")
    with begin(container) as client:  # new clients are served on
        assert client.fileno() >= 0


@pytest.mark.parametrize("sizes", ["0 200 0", "60 60 0"], ids=["larger", "as large"])
def test_no_memory_for_two_generations(run: Callable[..., Plain], sizes: str) -> None:
    """Fault 43: a generation that does not fit beside the old one is killed; the old one serves on."""
    command = ["-l", "http=8080", "--", "env", f"SIZES={sizes}", "python3", "-c", LARGE]
    container = run(*command, mem_limit="112m", memswap_limit="112m")
    (old,) = status(container)["generations"][0]["workers"]
    with LoadProcess(f"{container.ip}:8080", mode="keep", rate=100, clients=8, quiet=True) as load:
        load.wait_started()
        container.signal("SIGHUP")
        container.wait_for_log(
            "the roll to generation 2 was refused: a worker was killed by signal 9", within=WAIT
        )
        seen = status(container)
        assert (seen["refused"], seen["restarts"], seen["generations"][0]["workers"][0]["pid"]) == (
            1,
            0,
            old["pid"],
        )
        container.signal("SIGHUP")
        container.wait_for_log("sdlisten: generation 3 serves\n", within=WAIT)
        result = load.stop()
    assert result.clean, result
    container.get_wrapped_container().stop(timeout=10)
    assert container.wait() == 0
