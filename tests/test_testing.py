"""sdlisten.testing: a daemon started as a manager does, observed, and ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from sdlisten.address import parse_address
from sdlisten.adopt_or_bind import bind
from sdlisten.errors import AddressError
from sdlisten.testing import Activated, activate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ["sdlisten.testing.pytest"]

PRELUDE = """
import os, signal, socket, sys
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
"""


def program(text: str) -> list[str]:
    """Return the command of a small daemon."""
    return [sys.executable, "-c", PRELUDE + text]


def test_program_finds_its_sockets() -> None:
    """Words are bound here, passed blocking from 3 on, with names, and stay open for the test."""
    sees = "print(os.environ['LISTEN_FDNAMES'], os.get_blocking(3), os.get_blocking(4), flush=True)"
    with activate(
        program(f"{sees}; say('READY=1'); signal.pause()"), ["http=127.0.0.1:0", "127.0.0.1:0"]
    ) as daemon:
        daemon.wait_ready()

        assert daemon.output == "http:unknown True True\n"
        assert [listener.name for listener in daemon.listeners] == ["http", ""]
        for listener in daemon.listeners:
            socket.create_connection(listener.sockname).close()  # type: ignore[arg-type]
        assert daemon.terminate() == -signal.SIGTERM

    assert [listener.fileno() for listener in daemon.listeners] == [-1, -1]


def test_sockets_of_the_caller(tmp_path: Path) -> None:
    """Listeners and (name, socket) pairs are passed too, and stay the caller's."""
    sees = "print(os.environ['LISTEN_FDNAMES'], os.fstat(3).st_ino, os.fstat(4).st_ino)"
    admin = bind(parse_address(str(tmp_path / "x")), name="admin")
    with admin, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        with activate(program(sees), [admin[0], ("dns", udp)], notify=False) as daemon:
            daemon.wait_output("\n")
            seen = daemon.output

        inodes = " ".join(str(os.fstat(one.fileno()).st_ino) for one in (admin[0], udp))
        assert f"admin:dns {inodes}\n" == seen
        assert daemon.listeners == ()


def test_messages() -> None:
    """What the program says is read in order, also what it said just before it ended."""
    with activate(program("say('STATUS=one'); say('READY=1\\nSTATUS=two')"), []) as daemon:
        daemon.wait_ready()

        assert daemon.messages == ({"STATUS": "one"}, {"READY": "1", "STATUS": "two"})


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program gets our environment and what was added, but nothing of our own manager's."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/of/the/tests")
    monkeypatch.setenv("SDLISTEN_REQUIRE", "1")
    sees = "print([os.environ.get(n) for n in ('NOTIFY_SOCKET', 'SDLISTEN_REQUIRE', 'ADDED', 'LISTEN_FDS')])"
    with activate(program(sees), [], env={"ADDED": "yes"}, notify=False) as daemon:
        daemon.wait_output("\n")

        assert daemon.output == "[None, None, 'yes', None]\n"


def test_never_ready() -> None:
    """A program that does not get ready is told apart by what it said and wrote."""
    with activate(program("print('busy', flush=True); say('STATUS=hm'); signal.pause()"), []) as daemon:
        daemon.wait_output("busy")
        with pytest.raises(TimeoutError, match=r"no READY=1 within 0.2 s; it said .* and wrote 'busy"):
            daemon.wait_ready(0.2)


def test_ended_before_ready() -> None:
    """A program that ends instead of getting ready does not cost the time-out."""
    with activate(program("sys.exit('no config')"), []) as daemon:
        with pytest.raises(ChildProcessError, match=r"it ended with 1 before READY=1; .*no config"):
            daemon.wait_ready()
        with pytest.raises(ChildProcessError, match="before it wrote 'hello'"):
            daemon.wait_output("hello")


def test_does_not_write() -> None:
    """Waiting for output has a deadline, and says what was written instead."""
    with activate(program("print('other', flush=True); signal.pause()"), [], notify=False) as daemon:
        daemon.wait_output("other")
        with pytest.raises(TimeoutError, match=r"did not write 'hello' within 0.1 s; .*other"):
            daemon.wait_output("hello", timeout=0.1)


def test_ends_by_itself() -> None:
    """The end of a program can be waited for, with a deadline that leaves it running."""
    ours, theirs = socket.socketpair()
    text = "say('READY=1'); os.read(3, 1); sys.exit(78)"
    with ours, theirs, activate(program(text), [("go", theirs)]) as daemon:
        daemon.wait_ready()
        with pytest.raises(TimeoutError, match=r"did not end within 0.1 s; it said \[{'READY': '1'}\]"):
            daemon.wait(0.1)
        assert daemon.returncode is None
        ours.send(b"!")

        assert daemon.wait() == daemon.returncode == 78
        assert daemon.wait() == daemon.terminate() == 78


def test_does_not_end() -> None:
    """A program that ignores SIGTERM is killed, and that is an error."""
    text = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('READY=1'); signal.pause()"
    with activate(program(text), []) as daemon:
        daemon.wait_ready()
        with pytest.raises(TimeoutError, match=r"did not end within 0.1 s after SIGTERM and was killed"):
            daemon.terminate(0.1)

        assert daemon.returncode == -signal.SIGKILL


def test_error_in_the_test_shows_what_the_program_did() -> None:
    """A failing test gets what the program said and wrote as a note."""
    daemon = activate(program("print('seen', flush=True); say('READY=1'); signal.pause()"), [])

    def fails() -> None:
        with daemon:
            daemon.wait_ready()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fails()

    assert "seen" in caught.value.__notes__[0]


def test_bad_arguments() -> None:
    """What cannot be bound or started leaves nothing behind."""
    with pytest.raises(AddressError):
        activate(["true"], ["127.0.0.1:0", "nonsense"])
    with pytest.raises(ValueError, match="command"), activate([], ["127.0.0.1:0"]):
        pass
    idle = activate(["true"], [])
    for call in (idle.wait_ready, idle.wait, idle.terminate, lambda: idle.wait_output("x")):
        with pytest.raises(ValueError, match="needs a started program"):
            call()
    assert (idle.pid, idle.output, idle.messages) == (0, "", ())


def test_fixture(activate: Callable[..., Activated]) -> None:
    """The fixture gives activate() already entered."""
    daemon = activate(program("say('READY=1'); signal.pause()"), ["127.0.0.1:0"])
    daemon.wait_ready()
    assert daemon.pid > 0
