"""What a restart costs clients: sdlisten run beside nginx, gunicorn and uvicorn, each with its own master.

Every server is restarted in the same way, by SIGHUP to its master, under the same load on the same machine. A
restart is over when the workers of before are gone and one of the new ones has answered. Servers that have a
program in Python get some seconds of sleep for its import.

    python bench/restarts.py [--restarts N] [--server NAME]… [--mode MODE]… [--start-delay S]

Ten minutes. Counts can be relied on; times are those of a machine that load and server share, with whatever
else runs there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdlisten.load import LoadProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdlisten.load import Result

WORKERS = 2
CLIENTS = 24
REST = 0.2  # seconds between two restarts, with nothing going on but the load
LIMIT = 60.0  # seconds for one restart

APPS = Path(__file__).parent.parent / "integration" / "foreign"
MODES: dict[str, tuple[str, float | None]] = {  # mode and rate of the load
    "short": ("short", None),
    "slow": ("slow", None),
    "keep": ("keep", None),
    "keep-closed-loop": ("keep", 0.0),
}
# Kept for as long as a client likes: what ends a connection is to be the restart.
NGINX = """
daemon off;
worker_processes {workers};
pid {directory}/pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{ return 200 "$pid\\n"; }}
    }}
}}
"""
HEADINGS = (
    "server", "mode", "restarts", "requests", "failed", "closed idle", "Connection: close",
    "p50 ms", "p99 ms", "p99.9 ms", "max ms", "longest stall ms", "load's own lateness ms", "s a restart",
)  # fmt: skip
WIDTHS = (20, 16, 8, 9, 24, 11, 17, 7, 8, 8, 8, 16, 22, 11)


class Server(NamedTuple):
    """A server to restart.

    Attributes:
        command: Returns its words for a port, given a directory to write to.
        missing: What has to be installed first, or "".
    """

    command: Callable[[int, str], Sequence[str]]
    missing: str


def sdlisten(port: int, _directory: str, *options: str) -> Sequence[str]:
    """Return how to start ours."""
    run = [sys.executable, "-m", "sdlisten", "run", "-l", f"127.0.0.1:{port}", "--workers", str(WORKERS)]
    return [*run, *options, "--", sys.executable, "-m", "sdlisten.hello"]


def sdlisten_niced(port: int, directory: str) -> Sequence[str]:
    """Return how to start ours with workers that are nice until they are ready."""
    return sdlisten(port, directory, "--nice-start", "19")


def nginx(port: int, directory: str) -> Sequence[str]:
    """Return how to start nginx."""
    configuration = Path(directory, "nginx.conf")
    configuration.write_text(NGINX.format(workers=WORKERS, port=port, directory=directory))
    return [nginx_path() or "nginx", "-p", directory, "-e", "stderr", "-c", str(configuration)]


def gunicorn(port: int, _directory: str) -> Sequence[str]:
    """Return how to start gunicorn with threads."""
    options = ["--bind", f"127.0.0.1:{port}", "--workers", str(WORKERS), "--backlog", "4096"]
    threads = ["--worker-class", "gthread", "--threads", "4", "--keep-alive", "3600"]
    application = ["--no-control-socket", "--log-level", "warning", "--chdir", str(APPS), "wsgi:application"]
    return [sys.executable, "-m", "gunicorn", *options, *threads, *application]


def uvicorn(port: int, _directory: str) -> Sequence[str]:
    """Return how to start uvicorn with workers of its own."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", str(WORKERS), "--backlog", "4096"]
    kept = ["--timeout-keep-alive", "3600", "--lifespan", "off", "--no-access-log", "--log-level", "warning"]
    return [sys.executable, "-m", "uvicorn", *options, *kept, "--app-dir", str(APPS), "asgi:application"]


def nginx_path() -> str | None:
    """Find nginx, also where only root's PATH has it."""
    return shutil.which("nginx", path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin"]))


def servers() -> dict[str, Server]:
    """Return all there are, those that are not installed as well."""
    return {
        "sdlisten run": Server(sdlisten, ""),
        "sdlisten run, niced": Server(sdlisten_niced, ""),
        "nginx": Server(nginx, "" if nginx_path() else "nginx-light, of Debian"),
        "gunicorn gthread": Server(gunicorn, "" if find_spec("gunicorn") else "gunicorn"),
        "uvicorn --workers": Server(uvicorn, "" if find_spec("uvicorn") else "uvicorn"),
    }


class Master:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def workers(self) -> set[int]:
        """Return its child processes, without the helper that multiprocessing has."""
        pids: set[int] = set()
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            pids.update(map(int, (task / "children").read_text().split()))
        return {pid for pid in pids if b"resource_tracker" not in command_line(pid)}

    def answers(self) -> int:
        """Return the pid of the worker that answers; 0 if the request is lost, as some do lose it."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                _, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
        except (ConnectionRefusedError, ConnectionResetError):
            return 0
        return int(body.split()[0]) if body else 0

    def restart(self) -> float:
        """Restart it, wait until that is over, and return the seconds it took.

        Raises:
            TimeoutError: It does not come to an end.
            ChildProcessError: The master has ended.
        """
        before = self.workers()
        start = time.monotonic()
        self.process.send_signal(signal.SIGHUP)
        self._wait(lambda: not before & self.workers())
        self._wait(lambda: self.answers() in self.workers())
        return time.monotonic() - start

    def wait_started(self) -> None:
        """Wait until it answers and has all its workers."""
        self._wait(lambda: self.answers() > 0 and len(self.workers()) >= WORKERS)

    def _wait(self, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not over():
            if self.process.poll() is not None:
                raise ChildProcessError(f"the master ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not over within {LIMIT:g} s; workers {sorted(self.workers())}")
            time.sleep(0.01)


def command_line(pid: int) -> bytes:
    """Return the words of a process, nothing if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def running(server: Server, delay: float) -> Iterator[Master]:
    """Start a server; its end is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = os.environ | {"START_DELAY": str(delay), "HELLO_START_DELAY": str(delay)}
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            server.command(port, directory), env=environ, stdout=log, stderr=log, start_new_session=True
        )
        master = Master(process, port)
        try:
            master.wait_started()
            yield master
        except (OSError, TimeoutError):
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            process.terminate()
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(server: Server, mode: str, restarts: int, delay: float) -> tuple[Result, float]:
    """Restart a server under load; return what that counted, and the seconds of a restart."""
    kind, rate = MODES[mode]
    with (
        running(server, delay) as master,
        LoadProcess(f"127.0.0.1:{master.port}", mode=kind, rate=rate, clients=CLIENTS, quiet=True) as load,
    ):
        load.wait_started()
        seconds = 0.0
        for _ in range(restarts):
            time.sleep(REST)
            seconds += master.restart()
        return load.stop(), seconds / restarts


def cells(result: Result, seconds: float) -> tuple[str, ...]:
    """Write what was counted as cells of the table, from the fourth on."""
    kinds = [f"{kind.replace('_', ' ')} {count}" for kind, count in result.failures.items() if count]
    times = (result.p50, result.p99, result.p999, result.max, result.stall, result.lag)
    return (
        f"{result.requests:,}",
        f"{result.failed}: {', '.join(kinds)}" if kinds else "0",
        f"{result.closed_idle:,}",
        f"{result.close_announced:,}",
        *(f"{1000 * each:.2f}" if each < 0.01 else f"{1000 * each:.0f}" for each in times),
        f"{seconds:.2f}",
    )


def write(line: Sequence[str]) -> None:
    """Print a line of a Markdown table at once: the next takes a while."""
    padded = (cell.ljust(width) for cell, width in zip(line, WIDTHS, strict=True))
    sys.stdout.write(f"| {' | '.join(padded)} |\n")
    sys.stdout.flush()


def main() -> int:
    """Measure and print the table; returns 1 if ours has lost a request."""
    known = servers()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restarts", type=int, default=20, metavar="N", help="for each line (20)")
    parser.add_argument("--server", action="append", choices=known, help="only this one; may be repeated")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one; may be repeated")
    parser.add_argument("--start-delay", type=float, default=0.3, metavar="S", help="of an import (0.3)")
    arguments = parser.parse_args()
    lost = 0
    write(HEADINGS)
    write(["-" * width for width in WIDTHS])
    for mode in arguments.mode or MODES:
        for name in arguments.server or known:
            server = known[name]
            if server.missing:
                sys.stderr.write(f"{name} is left out; it needs {server.missing}\n")
                continue
            result, seconds = measure(server, mode, arguments.restarts, arguments.start_delay)
            write((name, mode, str(arguments.restarts), *cells(result, seconds)))
            if name.startswith("sdlisten"):
                lost += result.failed
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
