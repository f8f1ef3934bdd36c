"""Restarts under load: a daemon is stopped, the next one starts on the same sockets, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.load import LoadProcess
from sdlisten.testing import activate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdlisten.load import Result

HELLO = """
import sys
from sdlisten import hello, serve
sys.exit(serve(hello.serve_http, {options}) and 0)
"""
UVLOOP = "loop_factory=__import__('uvloop').new_event_loop"
COUNTS = re.compile(r"drained in [0-9.]+ s: finished=(\d+) handed_over=(\d+) closed_idle=(\d+) dropped=(\d+)")


class Drained(NamedTuple):
    """What all drains together counted."""

    finished: int
    handed_over: int
    closed_idle: int
    dropped: int


def restart(word: str, rounds: int, *, options: str = "", **load_options: object) -> tuple[Result, Drained]:
    """Put a load on an address, and restart the daemon there so often.

    Returns:
        What the load counted, and what the daemons did.
    """
    command = [sys.executable, "-c", HELLO.format(options=options)]
    counts: list[tuple[int, ...]] = []
    with bind(parse_address(word)) as listeners, contextlib.ExitStack() as stack:
        (listener,) = listeners
        os.set_blocking(listener.fileno(), True)  # as managers pass them
        load = None
        for _ in range(rounds):
            with activate(command, [listener]) as daemon:
                daemon.wait_ready()
                if load is None:
                    load = stack.enter_context(LoadProcess(listener.address, **load_options))  # type: ignore[arg-type]
                    load.wait_started()
                ask(listener.sockname)  # served: so is everybody who came before us
                assert daemon.terminate() == 0, daemon.output
                found = COUNTS.search(daemon.output)
                assert found, daemon.output
                counts.append(tuple(map(int, found.groups())))
        with activate(command, [listener]) as daemon:
            assert load is not None
            result = load.stop()
            assert daemon.terminate() == 0
    return result, Drained(*map(sum, zip(*counts, strict=True)))


def ask(address: object) -> None:
    """Make one request."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as client:
        client.settimeout(20)
        client.connect(address)  # type: ignore[arg-type]
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["tcp", "unix"])
@pytest.mark.parametrize("mode", ["short", "slow"])
def test_no_new_connection_is_lost(
    rounds: Callable[[int], int], tmp_path: Path, mode: str, family: str
) -> None:
    """Who connects and asks, at once or after a while, is answered across every restart."""
    number = rounds(4)
    word = "127.0.0.1:0" if family == "tcp" else str(tmp_path / "restart.sock")

    result, drained = restart(word, number, mode=mode)

    assert result.clean, result
    assert len(result.pids) == number + 1
    assert drained.dropped == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", ["", UVLOOP], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("rate", [None, 0], ids=["paced", "no-pause"])
def test_kept_connections_are_told(rounds: Callable[[int], int], rate: float | None, options: str) -> None:
    """No request on a kept connection fails; each gets Connection: close, or ends where the log counts it."""
    number = rounds(4)

    result, drained = restart("127.0.0.1:0", number, mode="keep", rate=rate, options=options)

    assert result.clean, result
    assert len(result.pids) == number + 1
    assert drained.dropped == 0
    assert result.closed_idle <= drained.closed_idle
    assert result.close_announced > 0
    # A connection that was replaced had ended in one of these two ways.
    assert result.opened <= 24 + result.close_announced + result.closed_idle
