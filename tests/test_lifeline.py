"""A daemon notices that its supervisor has gone, and takes nothing else for its lifeline."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.spawn import spawn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdlisten.spawn import Child

SECONDS = 20.0

# Answers each line with the same line, until the client or the drain ends it. `extra` runs before.
DAEMON = """\
import os, sys
from sdlisten import serve
{extra}
async def echo(connection):
    reader, writer = connection.streams()
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
sys.exit(serve(echo).dropped)
"""

# Claims, and tells what there is of a lifeline: in this process, in the environment, and in a forked child.
LOOK = """\
import os
{extra}
from sdlisten import activation
activation.Activation.current()
fd = activation.lifeline()
print(fd, fd and os.get_inheritable(fd), "SDLISTEN_LIFELINE_FD" in os.environ, flush=True)
if not os.fork():
    print(activation.lifeline(), flush=True)
    os._exit(0)
os.wait()
"""


@contextlib.contextmanager
def running(code: str) -> Iterator[tuple[Child, int, str, int]]:
    """Run code with one listener and a lifeline; gives the child, its output, the address, the other end."""
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        out, its_out = os.pipe2(os.O_CLOEXEC)
        (listener,) = stack.enter_context(bind(parse_address("127.0.0.1:0")))
        try:
            child = spawn(
                [sys.executable, "-c", code],
                [(listener.fileno(), "echo")],
                stdout=its_out,
                stderr=its_out,
                lifeline=reader,
            )
        finally:
            os.close(reader)
            os.close(its_out)
            stack.callback(os.close, out)
            stack.callback(close, writer)
        stack.callback(child.close)
        try:
            yield child, out, listener.address, writer
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(SECONDS)


def close(fd: int) -> None:
    """Close, also if that has been done."""
    with contextlib.suppress(OSError):
        os.close(fd)


def everything(fd: int) -> str:
    """Read until nobody has the other end."""
    with open(fd, closefd=False) as file:
        return file.read()


@pytest.mark.parametrize("loop", ["", "serve = __import__('functools').partial(serve, loop_factory=uvloop)"])
def test_drains_when_the_supervisor_has_gone(loop: str) -> None:
    """The end of the lifeline is an order to stop: what is in progress is finished, the exit code is 0."""
    extra = loop.replace("uvloop", "__import__('uvloop').new_event_loop")
    with running(DAEMON.format(extra=extra)) as (child, out, address, lifeline):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=SECONDS) as client:
            client.sendall(b"one\ntw")
            assert client.recv(100) == b"one\n"
            os.close(lifeline)
            seen = b""
            while b"the supervisor has gone: stopping" not in seen:
                part = os.read(out, 4096)
                assert part, seen
                seen += part
            client.sendall(b"o\n")
            assert client.recv(100) == b"two\n"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        assert child.wait(SECONDS) == 0
        assert "finished=1 handed_over=0 closed_idle=0 dropped=0" in everything(out)


@pytest.mark.parametrize(
    ("extra", "seen"),
    [
        pytest.param("", "4 False False\nNone\n", id="as it should be"),
        pytest.param("os.environ['SDLISTEN_LIFELINE_FD'] = '5'", "None None False\nNone\n", id="elsewhere"),
        pytest.param("os.close(4)", "None None False\nNone\n", id="closed"),
        pytest.param("os.dup2(3, 4)", "None None False\nNone\n", id="no pipe"),
        pytest.param("os.environ['LISTEN_PID'] = '1'", "None None True\nNone\n", id="of somebody else"),
    ],
)
def test_what_counts(extra: str, seen: str) -> None:
    """It counts where the supervisor puts it, beside sockets for this process; it is close-on-exec then."""
    with running(LOOK.format(extra=extra)) as (child, out, _, _):
        assert child.wait(SECONDS) == 0
        assert everything(out) == seen


def test_child_of_a_daemon() -> None:
    """A program that a daemon starts after the claim finds neither the variable nor the descriptor."""
    code = "import os; print(os.environ.get('SDLISTEN_LIFELINE_FD'), sorted(os.listdir('/proc/self/fd')))"
    command = [sys.executable, "-I", "-S", "-c", code]
    run = f"__import__('subprocess').run({command!r}, close_fds=False, check=True)"
    with running(f"import sdlisten; sdlisten.Activation.current(); {run}") as (child, out, _, _):
        assert child.wait(SECONDS) == 0
        assert everything(out) == "None ['0', '1', '2', '3']\n"  # 3 lists the directory
