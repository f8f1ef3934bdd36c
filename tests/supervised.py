"""A supervisor under test: real processes, a program that a test can replace, and clients of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdlisten.supervisor import ctl
from sdlisten.testing import activate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdlisten.testing import Activated

SECONDS = 30.0  # far beyond what anything here takes; nothing waits for it to pass

# A small server: says READY=1, answers each connection with its pid and generation, ends on SIGTERM.
APP = """
import os, select, signal, socket, sys
listener = socket.socket(fileno=3)
blocking = os.get_blocking(3)
listener.setblocking(False)
def say(text, fds=()):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(sock, [text.encode()], fds)
wake, waker = socket.socketpair()
waker.setblocking(False)
signal.set_wakeup_fd(waker.fileno())
signal.signal(signal.SIGTERM, lambda *_: None)
#HOOK
say("READY=1\\nSTATUS=at your service")
#READY
while True:
    ready, _, _ = select.select([listener, wake], [], [])
    if wake in ready:
        break
    try:
        connection, _ = listener.accept()
    except OSError:
        continue
    with connection:
        connection.settimeout(10)
        if connection.recv(4096):
            body = f"{os.getpid()} {os.environ['SDLISTEN_GENERATION']} \\n".encode()
            connection.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
#STOP
"""


def app(hook: str = "", *, ready: str = "", stop: str = "") -> str:
    """Return the program, with something to do before READY=1, after it, and after SIGTERM."""
    return APP.replace("#HOOK", hook).replace("#READY", ready).replace("#STOP", stop)


class Running:
    """A supervisor of a program whose file a test can replace, as a deploy does."""

    def __init__(self, daemon: Activated, program: Path, control: str) -> None:
        self.daemon = daemon
        self.program = program
        self.control = control

    @property
    def address(self) -> tuple[str, int]:
        """Where the program listens."""
        host, _, port = self.word.partition(":")
        return host, int(port)

    @property
    def word(self) -> str:
        """The same as a word."""
        return self.daemon.listeners[0].address

    def ask(
        self, do: str, *, wait: bool = False, timeout: float | None = None, **more: object
    ) -> dict[str, Any]:
        """Ask it at its control socket."""
        return dict(ctl.ask(self.control, {"do": do, "wait": wait, **more}, timeout=timeout or SECONDS))

    def roll(self, command: Sequence[str] | None = None) -> dict[str, Any]:
        """Roll, and return the outcome."""
        return self.ask("roll", wait=True, command=command)

    def status(self) -> dict[str, Any]:
        """Return the facts of ``status``."""
        facts: dict[str, Any] = self.ask("status")["status"]
        return facts

    def pids(self, state: str | None = None) -> list[int]:
        """Return the workers of all generations, or of those in a state."""
        return [
            worker["pid"]
            for generation in self.status()["generations"]
            if state in {None, generation["state"]}
            for worker in generation["workers"]
        ]

    def deploy(self, text: str) -> None:
        """Replace the program."""
        self.program.write_text(text)

    def says(self, name: str, count: int = 1) -> None:
        """Wait until our own manager was told something so often."""
        receiver = self.daemon._receiver
        assert receiver
        deadline = time.monotonic() + SECONDS
        while sum(message.get(name) == "1" for message in self.daemon.messages) < count:
            if not select.select([receiver], [], [], max(0, deadline - time.monotonic()))[0]:
                pytest.fail(f"no {name}=1: {self.daemon._seen()}")

    def says_status(self, text: str) -> None:
        """Wait until our own manager was told a status."""
        receiver = self.daemon._receiver
        assert receiver
        deadline = time.monotonic() + SECONDS
        while not any(text in message.get("STATUS", "") for message in self.daemon.messages):
            if not select.select([receiver], [], [], max(0, deadline - time.monotonic()))[0]:
                pytest.fail(f"no STATUS={text}: {self.daemon._seen()}")

    def reads(self, text: str) -> None:
        """Wait until it has written something."""
        self.daemon.wait_output(text, SECONDS)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for the status until it is as wanted: there is no other sign of what is waited for."""
        deadline = time.monotonic() + SECONDS
        while not wanted(facts := self.status()):
            if time.monotonic() > deadline:
                pytest.fail(f"it stays {facts}")
            select.select([], [], [], 0.01)
        return facts

    def settled(self) -> dict[str, Any]:
        """Wait until one generation is left, and serves."""
        return self.until(lambda facts: facts["phase"] == "serving" and len(facts["generations"]) == 1)

    def get(self) -> tuple[int, int]:
        """Ask the program; returns pid and generation."""
        with socket.create_connection(self.address, timeout=SECONDS) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            pid, generation = b"".join(iter(lambda: connection.recv(4096), b"")).split()[-2:]
        return int(pid), int(generation)


@contextlib.contextmanager
def supervisors(directory: Path) -> Iterator[Callable[..., Running]]:
    """Give a function that starts a supervisor; what it started is gone afterwards.

    Args:
        directory: Where the program and the control socket are.
    """
    program = directory / "app.py"
    control = str(directory / "control")

    def start(
        *options: str,
        text: str | None = None,
        ready: bool = True,
        env: dict[str, str] | None = None,
        sockets: Sequence[Any] = ("http=127.0.0.1:0",),
        command: Sequence[str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> Running:
        program.write_text(app() if text is None else text)
        words = [*wrapper, sys.executable, "-m", "sdlisten", "run", "--control", control, *options, "--"]
        words += command or [sys.executable, "-I", "-S", str(program)]
        daemon = stack.enter_context(activate(words, sockets, env=env))
        if ready:
            daemon.wait_ready(SECONDS)
        return Running(daemon, program, control)

    with contextlib.ExitStack() as stack:
        yield start


def gone(pid: int) -> None:
    """Wait until a process, which is not our child, has ended and is no zombie either."""
    deadline = time.monotonic() + SECONDS
    while os.path.exists(f"/proc/{pid}"):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                select.select([pidfd], [], [], max(0, deadline - time.monotonic()))
            finally:
                os.close(pidfd)
        if time.monotonic() > deadline:
            pytest.fail(f"pid {pid} is still there: {Path(f'/proc/{pid}/stat').read_text()}")
        select.select([], [], [], 0.005)  # a zombie: its parent is about to reap it


def is_free(address: tuple[str, int]) -> bool:
    """Return whether nobody listens there."""
    try:
        socket.create_connection(address, timeout=SECONDS).close()
    except ConnectionRefusedError:
        return True
    return False


HELLO = [sys.executable, "-m", "sdlisten.hello"]


def ask(sock: socket.socket, text: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") -> bytes:
    """Send a request and read one answer."""
    sock.sendall(text)
    return answer(sock)


def answer(sock: socket.socket) -> bytes:
    """Read one answer with its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = sock.recv(65536)
        assert data, f"the end of file after {received!r}"
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += sock.recv(65536)
    assert head.startswith(b"HTTP/1.1 200"), head
    return head + b"\n" + body


def descriptors(pid: int) -> list[str]:
    """Return what a process has open, without the numbers that tell one socket from another."""
    names = os.listdir(f"/proc/{pid}/fd")
    return sorted(os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")[0] for name in names)


def children(pid: int) -> list[int]:
    """Return the children of a process, zombies too."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
