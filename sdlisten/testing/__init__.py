"""Start your daemon in a test as a manager does, and see what it says.

::

    with activate([sys.executable, "-m", "mydaemon"], ["http=127.0.0.1:0"]) as daemon:
        daemon.wait_ready()
        ...  # daemon.listeners[0].sockname is where it listens

The test holds the sockets, as systemd does: the daemon can be stopped and another one activated on them, and
connections wait in the queue meanwhile. Fixtures for pytest are in `sdlisten.testing.pytest`.
"""

from __future__ import annotations

import os
import select
import signal
import time

from sdlisten.address import parse_named_address
from sdlisten.adopt_or_bind import bind
from sdlisten.listener import Listener, Listeners
from sdlisten.receiver import Receiver
from sdlisten.spawn import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from sdlisten.spawn import Child

__all__ = ("Activated", "activate")

# A daemon under test must not report to the manager of the tests.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "SDLISTEN_REQUIRE")


def activate(
    command: Sequence[str | os.PathLike[str]],
    sockets: Iterable[str | Listener | tuple[str, socket.socket]],
    *,
    env: Mapping[str, str] | None = None,
    notify: bool = True,
) -> Activated:
    """Start a program with sockets passed by LISTEN_FDS, as systemd would.

    Args:
        command: The program and its arguments.
        sockets: In the order of the descriptors from 3 on: ``[NAME=]ADDRESS`` words, which are bound here
            (port 0 for a free one); `Listener` objects, and (name, socket) pairs of any kind, which stay
            the caller's.
        env: Variables to set in addition to those of this process.
        notify: Whether to listen on a NOTIFY_SOCKET for what the program has to say.

    Returns:
        A context manager; entering it starts the program, leaving it ends the program and closes what was
        bound.

    Raises:
        AddressError: A word is no address.
        OSError: An address cannot be bound.
    """
    return Activated(command, sockets, env=env, notify=notify)


class Activated:
    """A program under test.

    Attributes:
        listeners: What was bound for it, held open by the test; they work as addresses to connect to.
        pid: Its process.
        returncode: How it ended (``-n`` for signal n); None while it runs.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        sockets: Iterable[str | Listener | tuple[str, socket.socket]],
        *,
        env: Mapping[str, str] | None,
        notify: bool,
    ) -> None:
        self._command = command
        self._environ = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._environ.update(env or {})
        self._notify = notify
        self._receiver: Receiver | None = None
        self._messages: list[dict[str, str]] = []
        self._output = -1
        self._child: Child | None = None
        self._passed: list[tuple[int, str]] = []
        self.returncode: int | None = None
        self.listeners = Listeners()
        try:
            for thing in sockets:
                self._add(thing)
        except BaseException:
            self.listeners.close()
            raise

    def _add(self, thing: str | Listener | tuple[str, socket.socket]) -> None:
        if isinstance(thing, Listener):
            self._passed.append((thing.fileno(), thing.name))
        elif isinstance(thing, tuple):
            name, sock = thing
            self._passed.append((sock.fileno(), name))
        else:
            wanted, address = parse_named_address(thing)
            bound = bind(address, name=wanted)
            self.listeners = Listeners((*self.listeners, *bound))
            for listener in bound:
                os.set_blocking(listener.fileno(), True)  # as managers pass them
                self._passed.append((listener.fileno(), wanted or "unknown"))

    @property
    def pid(self) -> int:
        """Its process; 0 before it was started."""
        return self._child.pid if self._child else 0

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """What it said on NOTIFY_SOCKET so far: each message as its assignments."""
        while self._receiver is not None and (received := self._receiver.receive()) is not None:
            with received:
                self._messages.append(dict(received.assignments))
        return tuple(self._messages)

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr so far."""
        size = os.fstat(self._output).st_size if self._output >= 0 else 0
        return os.pread(self._output, size, 0).decode(errors="replace") if size else ""

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait until it says READY=1.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutError: It did not; the text has what it said and wrote.
            ChildProcessError: It ended before.
            ValueError: It was activated with ``notify=False``.
        """
        if self._receiver is None or self._child is None:
            text = "wait_ready() needs a started program and notify=True"
            raise ValueError(text)
        end = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self._receiver, select.POLLIN)
        poller.register(self._child, select.POLLIN)
        while not any(message.get("READY") == "1" for message in self.messages):
            left = end - time.monotonic()
            # What it said before it ended may still wait to be read.
            if self._child.wait(0) is not None and not select.select([self._receiver], [], [], 0)[0]:
                text = f"it ended with {self._child.returncode} before READY=1; {self._seen()}"
                raise ChildProcessError(text)
            if left <= 0:
                text = f"no READY=1 within {timeout} s; {self._seen()}"
                raise TimeoutError(text)
            poller.poll(left * 1000)

    def wait_output(self, text: str, timeout: float = 10.0) -> None:
        """Wait until it has written a text to stdout or stderr.

        Args:
            text: What to wait for.
            timeout: Seconds.

        Raises:
            TimeoutError: It did not; the text has what it said and wrote.
            ChildProcessError: It ended before.
            ValueError: It was not started.
        """
        if self._child is None:
            message = "wait_output() needs a started program"
            raise ValueError(message)
        end = time.monotonic() + timeout
        while text not in self.output:
            if self._child.wait(0) is not None and text not in self.output:
                message = f"it ended with {self._child.returncode} before it wrote {text!r}; {self._seen()}"
                raise ChildProcessError(message)
            if time.monotonic() > end:
                message = f"it did not write {text!r} within {timeout} s; {self._seen()}"
                raise TimeoutError(message)
            # A file tells nobody that it grew: look again soon, or at once if the program ends.
            select.select([self._child], [], [], 0.01)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait until it ends by itself, as a daemon does that refuses its configuration.

        Args:
            timeout: Seconds.

        Returns:
            Its exit code, or ``-n`` for signal n.

        Raises:
            TimeoutError: It did not, and runs on; the text has what it said and wrote.
            ValueError: It was not started.
        """
        if self._child is None:
            text = "wait() needs a started program"
            raise ValueError(text)
        code = self._child.wait(timeout)
        if code is None:
            text = f"it did not end within {timeout} s; {self._seen()}"
            raise TimeoutError(text)
        self.returncode = code
        return code

    def terminate(self, timeout: float = 10.0) -> int:
        """Send SIGTERM and wait for the end.

        Args:
            timeout: Seconds, after which it is killed.

        Returns:
            Its exit code, or ``-n`` for signal n.

        Raises:
            TimeoutError: It did not end and was killed; the text has what it said and wrote.
        """
        if self._child is None:
            text = "terminate() needs a started program"
            raise ValueError(text)
        self._child.send_signal(signal.SIGTERM)
        self.returncode = self._child.wait(timeout)
        if self.returncode is None:
            self._child.send_signal(signal.SIGKILL)
            self.returncode = self._child.wait()
            text = f"it did not end within {timeout} s after SIGTERM and was killed; {self._seen()}"
            raise TimeoutError(text)
        return self.returncode

    def _seen(self) -> str:
        return f"it said {list(self.messages)} and wrote {self.output!r}"

    def __enter__(self) -> Self:
        try:
            self._output = os.memfd_create("sdlisten-testing-output")
            if self._notify:
                self._receiver = Receiver()
                self._environ["NOTIFY_SOCKET"] = self._receiver.address
            out = self._output
            self._child = spawn(self._command, self._passed, environ=self._environ, stdout=out, stderr=out)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.returncode is None:
                self.terminate()
        finally:
            if error is not None:
                error.add_note(self._seen())
            self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
        if self._receiver is not None:
            self._receiver.close()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1
        self.listeners.close()
