"""``sdlisten demo``: the main job on real sockets, without systemd, root or a compiler.

Starts `sdlisten.hello` as a real child: activated by us with two named sockets, activated by
``systemd-socket-activate`` where that is installed, and bound by itself. Real requests go to each; what the
daemon says of its listeners, and what the sockets are like afterwards, is compared with what is promised. In
the end ``sdlisten run`` replaces it twenty times, while three kinds of clients count what that costs them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time

from sdlisten.address import InetAddress, parse_address
from sdlisten.descriptor import listen_queue
from sdlisten.load import LoadProcess
from sdlisten.supervisor import ctl
from sdlisten.testing import activate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdlisten.testing import Activated

__all__ = ("REQUESTS", "ROLLS", "run")

REQUESTS = 50
ROLLS = 20
_RATES = {"short": 100.0, "slow": 20.0, "keep": 100.0}  # requests per second, beside the work of the rolls
_START_TIMEOUT = 10.0  # seconds
_COLUMNS = ("path", "name", "address", "family", "non-blocking", "close-on-exec", "backlog", "answered")
_HELLO = (sys.executable, "-m", "sdlisten.hello")


class _PromiseBrokenError(Exception):
    """Something was not as promised; the text says what."""


def run() -> int:
    """Run the demo and print what it saw.

    Returns:
        0 if everything was as promised, 1 if not.
    """
    started = time.monotonic()
    rows: list[dict[str, str]] = []
    print(f"A daemon gets a TCP and a unix socket in each possible way; {REQUESTS} requests to each socket.")
    with tempfile.TemporaryDirectory(prefix="sdlisten-demo-") as directory:
        try:
            _say("activated: we pass two sockets by LISTEN_FDS, as systemd does")
            rows += _activated(directory)
            if shutil.which("systemd-socket-activate"):
                _say("activated: systemd-socket-activate passes them")
                rows += _by_systemd(directory)
            else:
                _say("systemd-socket-activate is not installed here: left out")
            _say("bound: nothing is passed, so it binds for itself")
            rows += _bound(directory)
            _say(f"supervised: sdlisten run rolls it {ROLLS} times, under three kinds of load at once")
            rolls = _supervised(directory)
        except (_PromiseBrokenError, OSError) as error:
            print(f"NOT as promised: {error}", *getattr(error, "__notes__", ()), sep="\n  ")
            return 1
    _print_table(rows)
    print(*rolls, "", sep="\n")
    print(f"All as promised, in {time.monotonic() - started:.1f} s.")
    return 0


def _supervised(directory: str) -> list[str]:
    """Roll generations under load; returns a line for each load, of what it counted."""
    control = f"{directory}/control"
    command = [sys.executable, "-m", "sdlisten", "run", "--control", control, "--", *_HELLO]
    with (
        activate(command, ["http=127.0.0.1:0"], env=_environment()) as supervisor,
        contextlib.ExitStack() as ends,
    ):
        supervisor.wait_ready(_START_TIMEOUT)
        address = supervisor.listeners[0].address
        loads = {
            mode: ends.enter_context(LoadProcess(address, mode=mode, clients=8, rate=rate, quiet=True))
            for mode, rate in _RATES.items()
        }
        for load in loads.values():
            load.wait_started()
        started = time.monotonic()
        for number in range(ROLLS):
            answer = ctl.ask(control, {"do": "roll", "wait": True}, timeout=_START_TIMEOUT)
            _check(answer["code"] == 0, f"roll {number}: {answer['text']}")
        seconds = time.monotonic() - started
        results = {mode: load.stop() for mode, load in loads.items()}
        _stop(supervisor)
    for result in results.values():
        _check(result.clean, str(result))
    lines = [f"{ROLLS} rolls in {seconds:.1f} s:"]
    for mode, result in results.items():
        lines.append(
            f"  {mode:<5}  {result.ok:>6,} requests answered, {result.failed} failed, "
            f"longest stall {result.stall * 1000:.0f} ms, by {len(result.pids)} processes"
        )
    return lines


def _activated(directory: str) -> list[dict[str, str]]:
    words = ["http=127.0.0.1:0", f"admin={directory}/activated.sock"]
    with activate(_HELLO, words, env=_environment(), notify=False) as daemon:
        listeners = daemon.listeners
        before = [listen_queue(listener.fileno()) for listener in listeners]
        rows = _ask(daemon, [listener.address for listener in listeners], "activated", origin="adopted")
        _stop(daemon)
        for listener, row, queue in zip(listeners, rows, before, strict=True):
            after = listen_queue(listener.fileno())
            _check(queue == after, f"the queue of {listener.address} was {queue} and is {after}")
            _check(
                row["backlog"] == str(queue[1] if queue else None), f"the daemon saw another backlog: {row}"
            )
            _connect(listener.address).close()  # clients wait in the queue, where the next daemon finds them
    return rows


def _by_systemd(directory: str) -> list[dict[str, str]]:
    addresses = [f"127.0.0.1:{_free_port()}", f"{directory}/systemd.sock"]
    words = [word for address in addresses for word in ("-l", address)]
    command = ["systemd-socket-activate", "-E", "PYTHONPATH", *words, "--fdname=http:admin", *_HELLO]
    with activate(command, [], env=_environment(), notify=False) as daemon:
        daemon.wait_output(f"Listening on {addresses[-1]}", _START_TIMEOUT)
        rows = _ask(daemon, addresses, "systemd", origin="adopted")
        _stop(daemon)
    return rows


def _bound(directory: str) -> list[dict[str, str]]:
    addresses = [f"127.0.0.1:{_free_port()}", f"{directory}/bound.sock"]
    command = [*_HELLO, "-l", f"http={addresses[0]}", "-l", f"admin={addresses[1]}"]
    with activate(command, [], env=_environment(), notify=False) as daemon:
        daemon.wait_output(f"address={addresses[-1]}", _START_TIMEOUT)
        rows = _ask(daemon, addresses, "bound", origin="bound")
        _stop(daemon)
        _check(not os.path.exists(addresses[1]), f"{addresses[1]} is still there: who bound it removes it")
    return rows


def _environment() -> dict[str, str]:
    # The daemon must be the one this demo belongs to, be it installed or a checkout.
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return {"PYTHONPATH": home}


def _ask(daemon: Activated, addresses: Sequence[str], path: str, *, origin: str) -> list[dict[str, str]]:
    """Send the requests, and return what the daemon says of its listeners, a row for each."""
    answered = {address: _requests(address, daemon.pid) for address in addresses}
    rows = []
    for address in addresses:
        daemon.wait_output(f"address={address} ", _START_TIMEOUT)
        line = next(line for line in daemon.output.splitlines() if f"address={address} " in line)
        first, *words = line.split()
        row = {
            "path": path,
            **dict(word.partition("=")[::2] for word in words),
            "answered": str(answered[address]),
        }
        _check(first == origin, f"{address} was {first}, not {origin}")
        _check(row["non-blocking"] == row["close-on-exec"] == "yes", f"{address}: {line}")
        rows.append(row)
    return rows


def _requests(address: str, pid: int) -> int:
    for number in range(REQUESTS):
        with _connect(address) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        body = answer.partition(b"\r\n\r\n")[2].decode()
        _check(body.split()[:1] == [str(pid)], f"request {number} to {address}, pid {pid}, got {answer!r}")
    return REQUESTS


def _connect(word: str) -> socket.socket:
    address = parse_address(word)
    if isinstance(address, InetAddress):
        return socket.create_connection((address.host, address.port), timeout=_START_TIMEOUT)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_START_TIMEOUT)
    connection.connect(word)
    return connection


def _stop(daemon: Activated) -> None:
    code = daemon.terminate()
    _check(code == 0, f"SIGTERM ended the daemon with {code} instead of 0; it wrote {daemon.output!r}")


def _free_port() -> int:
    # systemd-socket-activate refuses port 0.
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _check(promise: bool, otherwise: str) -> None:
    if not promise:
        raise _PromiseBrokenError(otherwise)


def _say(text: str) -> None:
    print(f"- {text} …", flush=True)


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    lines = [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *rows]
    widths = {column: max(len(line[column]) for line in lines) for column in _COLUMNS}
    print()
    for line in lines:
        print("  ".join(line[column].ljust(widths[column]) for column in _COLUMNS).rstrip())
    print()
