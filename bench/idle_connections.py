"""What an idle connection costs a service, and what draining many of them costs.

A daemon on `sdlisten.serve` in a process of its own, and as many clients in this one, each of which has
asked once and is silent since. The daemon's memory is what the kernel accounts to it (Pss of smaps_rollup),
without its socket buffers. Then SIGTERM, with `idle_timeout=0`, so that nothing is waited for: the time to
the last close, as the daemon logs it. A second time with clients that ask once more in the drain, and are
told that it is the last.

    python bench/idle_connections.py [--connections N …] [--uvloop]
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdlisten.testing import activate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdlisten.testing import Activated

DAEMON = """
import resource, sys
from sdlisten import hello, serve
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
serve(hello.serve_http, idle_timeout=float(sys.argv[1]), drain_timeout=60.0, {factory})
usage = resource.getrusage(resource.RUSAGE_SELF)
print("cpu", usage.ru_utime + usage.ru_stime)
"""
UVLOOP = "loop_factory=__import__('uvloop').new_event_loop"
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
DRAINED = re.compile(r"drained in ([0-9.]+) s: (finished=.*)")


def main() -> None:
    """Print a row for each number of connections."""
    parser = argparse.ArgumentParser(description="Memory of idle connections, and the time to drain them.")
    parser.add_argument("--connections", type=int, nargs="+", default=[1000, 2500, 5000, 10_000], metavar="N")
    parser.add_argument("--uvloop", action="store_true", help="serve on uvloop")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    write("connections", "memory each", "drain, silent", "CPU each", "drain, asked again", "CPU each")
    write(*["---"] * 6)
    for number in arguments.connections:
        memory, seconds, cpu = measure(number, uvloop=arguments.uvloop, ask_again=False)
        _, again, cpu_again = measure(number, uvloop=arguments.uvloop, ask_again=True)
        each, each_again = cpu / number * 1e6, cpu_again / number * 1e6
        silent, asked = f"{seconds:.1f} s", f"{again:.1f} s"
        write(
            f"{number:,}",
            f"{memory / number:,.0f} B",
            silent,
            f"{each:.0f} µs",
            asked,
            f"{each_again:.0f} µs",
        )


def write(*cells: str) -> None:
    """Write a row."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def measure(number: int, *, uvloop: bool, ask_again: bool) -> tuple[int, float, float]:
    """Return the bytes that so many connections cost, the seconds to drain them, and its CPU seconds."""
    script = DAEMON.format(factory=UVLOOP if uvloop else "")
    command = [sys.executable, "-c", script, "60" if ask_again else "0"]
    with activate(command, ["http=127.0.0.1:0"]) as daemon:
        daemon.wait_ready()
        address = daemon.listeners[0].sockname
        ask([connect(address)])  # what is loaded with the first request belongs to nobody
        before = memory_of(daemon.pid)
        clients = [connect(address) for _ in range(number)]
        ask(clients)
        memory = memory_of(daemon.pid) - before
        cpu = cpu_of(daemon.pid)
        seconds = drain(daemon, clients if ask_again else [])
        spent = float(daemon.output.rpartition("cpu ")[2]) - cpu
        for client in clients:
            client.close()
    return memory, seconds, spent


def connect(address: object) -> socket.socket:
    """Connect."""
    client = socket.create_connection(address)  # type: ignore[arg-type]
    # Closed at the end without TIME_WAIT: the next row needs the ports.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return client


def ask(clients: Sequence[socket.socket]) -> None:
    """Ask on each and receive each answer."""
    for client in clients:
        client.sendall(REQUEST)
    for client in clients:
        if not client.recv(1000).startswith(b"HTTP/1.1 200 OK"):
            raise RuntimeError("no answer")


def drain(daemon: Activated, asking: Sequence[socket.socket]) -> float:
    """Stop the daemon; return how long it says that took."""
    os.kill(daemon.pid, signal.SIGTERM)
    if asking:
        daemon.wait_output("draining: open=")
        ask(asking)
    daemon.wait_output("cpu ", timeout=60)
    found = DRAINED.search(daemon.output)
    if found is None or "dropped=0" not in found[2]:
        raise RuntimeError(daemon.output)
    return float(found[1])


def memory_of(pid: int) -> int:
    """Return the memory of a process in bytes, shared pages in proportion."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in smaps_rollup")


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
