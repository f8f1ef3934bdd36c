"""The load as a program, and as a child process of a test."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sdlisten.load.engine import RATES, Load
from sdlisten.load.result import Result

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("LoadProcess", "add_arguments", "main", "run")

# What the child says to LoadProcess: its signal handlers are in place; as many good answers as clients.
_RUNNING, _STARTED = b"rs"
_START_LIMIT = 30.0


class LoadProcess:
    """A load in a process of its own, running from construction until `stop`: no GIL shared with the server.

    Its progress goes to stderr, a line a second, unless it is to be quiet. It ends by itself when the process
    that started it is gone. As a context manager it kills what is still running. The other arguments are
    those of `Load`.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(
        self,
        address: str | int,
        *,
        mode: str = "short",
        clients: int = 24,
        rate: float | None = None,
        timeout: float = 10.0,
        delay: float = 0.2,
        quiet: bool = False,
    ) -> None:
        self._timeout = timeout + delay
        self._said = b""
        self._pipe, report_fd = os.pipe()
        words = [f"--mode={mode}", f"--clients={clients}", f"--timeout={timeout}", f"--delay={delay}"]
        words += [] if rate is None else [f"--rate={rate}"]
        command = [sys.executable, "-m", "sdlisten.load", *words, "--json", f"--report-fd={report_fd}"]
        try:
            self._process = subprocess.Popen(
                [*command, "--", str(address)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if quiet else None,
                pass_fds=[report_fd],
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(report_fd)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def wait_started(self, timeout: float = _START_LIMIT) -> None:
        """Wait until there are as many good answers as clients.

        Raises:
            TimeoutError: There are not in so many seconds; the load was stopped, the text is what it counted.
            RuntimeError: The process has ended.
        """
        if not self._wait_for(_STARTED, timeout):
            raise TimeoutError(f"too few good answers within {timeout:g} s:\n{self.stop()}")

    def stop(self) -> Result:
        """End the load after the requests in flight, and return what it counted.

        Raises:
            TimeoutError: It does not end; it was killed.
            RuntimeError: It has ended without a result, which it says on stderr.
        """
        limit = self._timeout + _START_LIMIT
        try:
            if not self._wait_for(_RUNNING, _START_LIMIT):
                raise TimeoutError(f"the load (pid {self.pid}) did not begin within {_START_LIMIT:g} s")
            self._process.terminate()
            output, _ = self._process.communicate(timeout=limit)
            return Result.from_json(output)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the load (pid {self.pid}) did not end within {limit:g} s") from None
        except ValueError:
            raise self._ended() from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End the load at once, without a result. Harmless when it has ended."""
        with self._process:  # closes its stdout, waits
            self._process.kill()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _wait_for(self, word: int, timeout: float) -> bool:
        """Return whether the child said it in time."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        deadline = time.monotonic() + timeout
        while word not in self._said:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                return False
            said = os.read(self._pipe, 16)
            if not said:
                self._process.wait()
                raise self._ended()
            self._said += said
        return True

    def _ended(self) -> RuntimeError:
        return RuntimeError(
            f"the load (pid {self.pid}) ended with code {self._process.returncode}, without a result"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sdlisten load`` to a parser; `run` takes what it parsed."""
    rates = ", ".join(f"{mode} {rate:g}" for mode, rate in RATES.items())
    parser.add_argument(
        "address", metavar="ADDRESS", help="8080, 127.0.0.1:80, [::1]:80, /path, @abstract, host:80"
    )
    parser.add_argument(
        "--mode", choices=RATES, default="short", help="new connections, late senders, keep-alive"
    )
    parser.add_argument("--clients", type=int, default=24, metavar="N", help="at most so many at once (24)")
    parser.add_argument("--rate", type=float, metavar="R", help=f"requests/s together, 0: no pause ({rates})")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long; else until SIGINT or SIGTERM")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="of one request (10)")
    parser.add_argument(
        "--delay", type=float, default=0.2, metavar="S", help="slow: connect, wait, send (0.2)"
    )
    parser.add_argument("--json", action="store_true", help="the result as one line of JSON")
    parser.add_argument("--report-fd", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the load until its seconds are over or SIGINT or SIGTERM comes (twice: without the last answers).

    The result goes to stdout, a line of progress to stderr each second.

    Returns:
        0 if there were answers and nothing failed, 1 if not, 2 if an argument is wrong.
    """
    try:
        load = Load(
            args.address,
            mode=args.mode,
            clients=args.clients,
            rate=args.rate,
            timeout=args.timeout,
            delay=args.delay,
        )
    except (OSError, ValueError) as error:
        sys.stderr.write(f"sdlisten load: {error}\n")
        return 2
    parent = os.getppid()

    def progress(result: Result) -> None:
        sys.stderr.write(_progress_line(result))
        if args.report_fd is not None and os.getppid() != parent:
            load.stop()

    def report(word: int) -> None:
        if args.report_fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(args.report_fd, bytes([word]))

    handlers = {
        number: signal.signal(number, lambda *_: load.stop()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    _set_timer_slack("1")
    try:
        report(_RUNNING)
        result = load.run(args.seconds, progress=progress, started=lambda: report(_STARTED))
    finally:
        _set_timer_slack("0")
        for number, handler in handlers.items():
            signal.signal(number, handler)
    sys.stdout.write(f"{result.to_json() if args.json else result}\n")
    return 0 if result.clean else 1


def main(words: Sequence[str] | None = None) -> int:
    """Read the arguments, run the load, return the exit code; see `run`."""
    parser = argparse.ArgumentParser(prog="sdlisten load", description="Count what a restart loses.")
    add_arguments(parser)
    return run(parser.parse_args(words))


def _progress_line(result: Result) -> str:
    kinds = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in result.failures.items() if count)
    return (
        f"{result.seconds:4.0f} s: {result.ok:,} ok, {result.failed:,} failed ({kinds or 'none'}), "
        f"p50 {result.p50 * 1e3:.2f} ms, longest stall {result.stall * 1e3:.0f} ms, {len(result.pids)} pids\n"
    )


def _set_timer_slack(nanoseconds: str) -> None:
    # The kernel may end a sleep 50 µs late to save wake-ups (proc(5), timerslack_ns), which would be half of
    # the latency of a good server. 0 restores the default. Not on other systems, nor where /proc is hidden.
    with contextlib.suppress(OSError):
        Path("/proc/self/timerslack_ns").write_text(nanoseconds, encoding="ascii")
