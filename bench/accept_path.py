"""What accepting a connection costs, beside Tornado, a plain loop and C.

One process queues some connections and then times the handler alone, as an event loop would call it, with
CLOCK_THREAD_CPUTIME_ID, less what reading that clock takes. The variants take turns round by round, in random
order, because no machine is ever quiet; medians are compared, as ratios. The goals are those of the project.

    python bench/accept_path.py [--rounds FACTOR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tornado
from tornado.ioloop import IOLoop
from tornado.netutil import add_accept_handler as tornado_add_accept_handler

from sdlisten import Listener, Origin, add_accept_handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

QUEUES = {64: 60, 1: 900}  # connections that wait when the loop wakes up: rounds
FAMILIES = {"tcp": socket.AF_INET, "unix": socket.AF_UNIX}
# Goals: at most so many times what the other needs, by the number of connections that wait.
GOALS = {("tornado", 64): 0.75, ("tornado", 1): 0.50, ("C", 64): 2.0, ("C", 1): 1.0}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() leaves no TIME_WAIT, or the ports run out

cpu_time = functools.partial(time.clock_gettime_ns, time.CLOCK_THREAD_CPUTIME_ID)

Taken = list[tuple[socket.socket, Any]]


class Recorder:
    """An event loop that only remembers what it was told to call."""

    on_readable: Callable[[], object]

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Remember the callback."""
        del fd
        self.on_readable = callback

    def remove_reader(self, fd: int) -> None:
        """Forget nothing: nobody calls it afterwards."""

    def is_closed(self) -> bool:
        """Stay open."""
        return False


def listening(family: str) -> socket.socket:
    """Return a non-blocking listener with room for every queue here."""
    sock = socket.socket(FAMILIES[family])
    sock.bind(("127.0.0.1", 0) if family == "tcp" else "")  # "": the kernel chooses an abstract name
    sock.listen(256)
    sock.setblocking(False)
    return sock


def connect(sock: socket.socket, count: int) -> list[socket.socket]:
    """Queue some connections."""
    clients = []
    for _ in range(count):
        client = socket.socket(sock.family)
        if sock.family == socket.AF_INET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.connect(sock.getsockname())
        clients.append(client)
    return clients


class Variant:
    """One way to accept: a listener, and what its loop calls when it becomes readable."""

    def __init__(
        self,
        sock: socket.socket,
        on_readable: Callable[[], object],
        taken: Taken,
        remove: Callable[[], object] = lambda: None,
    ) -> None:
        self.sock = sock
        self.on_readable = on_readable
        self.taken = taken
        self._remove = remove

    def close(self) -> None:
        """Take the listener from its loop and close it."""
        self._remove()
        self.sock.close()

    def round(self, count: int) -> float:
        """Return the microseconds of one connection when so many wait."""
        clients = connect(self.sock, count)
        cpu_time()
        start = cpu_time()
        before = cpu_time()
        while len(self.taken) < count:
            self.on_readable()
        after = cpu_time()
        for client in clients:
            client.close()
        for connection, _ in self.taken:
            connection.close()
        self.taken.clear()
        return (after - before - (before - start)) / count / 1000


def sdlisten_variant(sock: socket.socket, origin: Origin) -> Variant:
    """Make sdlisten's handler of a listener that we bound, or that a manager shares with us."""
    taken: Taken = []
    recorder = Recorder()
    listener = Listener(sock, name="", origin=origin)
    remove = add_accept_handler(listener, lambda c, a: taken.append((c, a)), recorder, burst=64)
    return Variant(sock, recorder.on_readable, taken, remove)


def tornado_variant(sock: socket.socket) -> Variant:
    """Make Tornado's handler, with the setblocking() that it leaves to its users."""
    taken: Taken = []

    def callback(connection: socket.socket, address: object) -> None:
        connection.setblocking(False)
        taken.append((connection, address))

    remove = tornado_add_accept_handler(sock, callback)
    _, handler = IOLoop.current().handlers[sock.fileno()]  # type: ignore[attr-defined]
    return Variant(sock, lambda: handler(sock, IOLoop.READ), taken, remove)


def plain_variant(sock: socket.socket) -> Variant:
    """Make the loop that everybody writes."""
    taken: Taken = []

    def on_readable() -> None:
        while True:
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            taken.append((connection, address))

    return Variant(sock, on_readable, taken)


C_SOURCE = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#define CHECK(call) do { if ((call) < 0) { perror(#call); exit(1); } } while (0)

static long long cpu_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Reads how many connections to queue; writes the nanoseconds it took to accept them all. */
int main(int argc, char **argv) {
    struct sockaddr_storage address = {0};
    socklen_t length = sizeof address;
    int tcp = strcmp(argv[1], "tcp") == 0, listener, clients[256], taken[256], count;
    if (tcp) {
        struct sockaddr_in *in = (struct sockaddr_in *)&address;
        in->sin_family = AF_INET;
        in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else {
        address.ss_family = AF_UNIX;
        length = sizeof(sa_family_t); /* the kernel chooses an abstract name */
    }
    CHECK(listener = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0));
    CHECK(bind(listener, (struct sockaddr *)&address, length));
    CHECK(listen(listener, 256));
    length = sizeof address;
    CHECK(getsockname(listener, (struct sockaddr *)&address, &length));
    while (scanf("%d", &count) == 1) {
        struct linger reset = {1, 0};
        struct sockaddr_storage peer;
        for (int i = 0; i < count; i++) {
            CHECK(clients[i] = socket(address.ss_family, SOCK_STREAM, 0));
            if (tcp) CHECK(setsockopt(clients[i], SOL_SOCKET, SO_LINGER, &reset, sizeof reset));
            CHECK(connect(clients[i], (struct sockaddr *)&address, length));
        }
        int n = 0;
        cpu_time();
        long long start = cpu_time(), before = cpu_time();
        for (;;) {
            socklen_t size = sizeof peer;
            int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0 && errno == EAGAIN) break;
            CHECK(fd);
            taken[n++] = fd;
        }
        long long after = cpu_time();
        if (n != count) return 2;
        for (int i = 0; i < count; i++) { close(clients[i]); close(taken[i]); }
        printf("%lld\n", after - before - (before - start));
        fflush(stdout);
    }
    return 0;
}
"""


class CReference:
    """accept4() in C until it fails with EAGAIN: the floor, and a peer to compare with."""

    def __init__(self, program: str, family: str) -> None:
        self._child = subprocess.Popen(
            [program, family], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def round(self, count: int) -> float:
        """Return the microseconds of one connection when so many wait."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{count}\n")
        return int(self._child.stdout.readline()) / count / 1000

    def close(self) -> None:
        """End the program."""
        self._child.communicate()


def compile_c(directory: str) -> str | None:
    """Compile the reference; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source = Path(directory, "accept.c")
    source.write_text(C_SOURCE)
    program = str(source.with_suffix(""))
    subprocess.run([compiler, "-O2", "-o", program, str(source)], check=True)
    return program


@contextlib.contextmanager
def variants(family: str, program: str | None) -> Iterator[dict[str, Variant | CReference]]:
    """Make all the ways to accept, each with a listener of its own."""
    found: dict[str, Variant | CReference] = {
        "sdlisten": sdlisten_variant(listening(family), Origin.BOUND),
        "sdlisten, adopted": sdlisten_variant(listening(family), Origin.ADOPTED),
        "tornado": tornado_variant(listening(family)),
        "plain": plain_variant(listening(family)),
    }
    if program is not None:
        found["C"] = CReference(program, family)
    with contextlib.ExitStack() as stack:
        for way in found.values():
            stack.callback(way.close)
        yield found


def measure(ways: dict[str, Variant | CReference], count: int, rounds: int) -> dict[str, float]:
    """Return the median microseconds per connection of each."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    for _ in range(rounds):
        random.shuffle(order)
        for name, way in order:
            seen[name].append(way.round(count))
    return {name: statistics.median(values) for name, values in seen.items()}


def rows(family: str, count: int, medians: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """Write what was measured as lines of the table."""
    for name, value in medians.items():
        cells = [family, str(count), name, f"{value:.2f}"]
        for peer in ("tornado", "C"):
            ratio = value / medians[peer] if peer in medians else None
            goal = GOALS[peer, count] if name == "sdlisten" else None
            cells += ["-" if ratio is None else f"{ratio:.2f}", goal_cell(ratio, goal)]
        yield tuple(cells)


def goal_cell(ratio: float | None, goal: float | None) -> str:
    """Write a goal, and whether it was reached."""
    if ratio is None or goal is None:
        return ""
    return f"<= {goal:.2f} {'met' if ratio <= goal else 'MISSED'}"


def write(lines: Sequence[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = tuple("-" * width for width in widths)
    for line in (lines[0], rule, *lines[1:]):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")  # noqa: T201 - the table is the result


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=float, default=1.0, metavar="FACTOR", help="more rounds, or fewer")
    factor = parser.parse_args().rounds
    asyncio.set_event_loop(asyncio.new_event_loop())
    lines: list[tuple[str, ...]] = [
        ("socket", "queued", "variant", "us/connection", "/ tornado", "goal", "/ C", "goal")
    ]
    with tempfile.TemporaryDirectory() as directory:
        program = compile_c(directory)
        for family in FAMILIES:
            with variants(family, program) as ways:
                for count, rounds in QUEUES.items():
                    measure(ways, count, 3)  # warm up
                    medians = measure(ways, count, max(3, round(rounds * factor)))
                    lines += rows(family, count, medians)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"CPython {python}, Tornado {tornado.version} + setblocking(False), CPU time of the handler\n")  # noqa: T201
    write(lines)


if __name__ == "__main__":
    main()
