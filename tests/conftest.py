"""What tests share: the check that nothing leaked, sockets, descriptors as a manager passes them, loops."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import socket
from typing import TYPE_CHECKING

import pytest
import uvloop

from sdlisten import activation
from sdlisten.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    Run = Callable[[Coroutine[Any, Any, None]], None]

LISTEN_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES")


def state_of_process() -> dict[str, object]:
    """Return all that a failing call must leave alone: descriptors, their flags, the environment."""
    state: dict[str, object] = {}
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            link = os.readlink(f"/proc/self/fd/{fd}")
            flags = fcntl.fcntl(fd, fcntl.F_GETFD), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
            state[f"fd {fd}"] = (link, *flags)
    state["environ"] = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return state


def differences(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Return what two states have not in common."""
    names = before.keys() | after.keys()
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Compare descriptors, flags and environment before and after every test."""
    before = state_of_process()
    yield
    leaked = differences(before, state_of_process())
    if leaked:
        gc.collect()  # garbage in a cycle is no leak; to collect it after every test costs 40 ms each
        leaked = differences(before, state_of_process())
    assert not leaked, f"not as before the test: {leaked}"


@pytest.fixture
def unchanged() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Give a context manager that compares descriptors, flags and environment around a failing call."""

    @contextlib.contextmanager
    def compare() -> Iterator[None]:
        before = state_of_process()
        yield
        changed = differences(before, state_of_process())
        assert not changed, f"changed by a call that failed: {changed}"

    return compare


RESERVED = range(3, 67)


class Passing:
    """Pass descriptors to this very process, at 3 and up, as a manager does to a new one."""

    def __init__(self) -> None:
        self._placed = 0

    def __call__(
        self,
        *things: int | socket.socket,
        names: Sequence[str] | str | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        """Place duplicates of ``things`` at 3… (blocking state as it is, inheritable) and set LISTEN_*.

        Args:
            things: Descriptors or sockets; they stay the caller's.
            names: FileDescriptorNames, or the text of LISTEN_FDNAMES; None leaves it out.
            environ: Set instead of, or beside, what follows from the rest.
        """
        assert not self._placed, "one set of descriptors per test"
        self._placed = len(things)
        fds = [thing if isinstance(thing, int) else thing.fileno() for thing in things]
        assert len(fds) <= len(RESERVED)
        assert not set(fds) & set(RESERVED), "open it in the body of the test, or with out_of_the_way()"
        for target, source in enumerate(fds, 3):
            os.dup2(source, target, inheritable=True)
        for unused in RESERVED[len(fds) :]:
            os.close(unused)
        variables = {"LISTEN_FDS": str(len(fds)), "LISTEN_PID": str(os.getpid())} if fds else {}
        if names is not None:
            variables["LISTEN_FDNAMES"] = names if isinstance(names, str) else ":".join(names)
        os.environ.update({**variables, **(environ or {})})


@contextlib.contextmanager
def _reserved() -> Iterator[None]:
    """Move what is open at the low numbers out of the way, and hold them until they are used."""
    aside: dict[int, tuple[int, bool]] = {}
    holder = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, RESERVED.stop)
    for fd in RESERVED:
        with contextlib.suppress(OSError):  # not open
            inheritable = os.get_inheritable(fd)
            aside[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, RESERVED.stop), inheritable
        os.dup2(holder, fd, inheritable=False)
    os.close(holder)
    try:
        yield
    finally:
        gc.collect()  # a forgotten socket must close its number before the number is another's again
        for fd in RESERVED:
            if fd in aside:
                saved, inheritable = aside[fd]
                os.dup2(saved, fd, inheritable=inheritable)
                os.close(saved)
            else:
                with contextlib.suppress(OSError):  # closed by who took it
                    os.close(fd)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Reserve the low numbers around the body of a test that wants to be passed something.

    Not in the fixture: between set-up, body and tear-down pytest uses the numbers at which it keeps stdout.
    """
    if "passing" not in pyfuncitem.fixturenames:
        return (yield)
    with _reserved():
        return (yield)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch, _nothing_leaks: None) -> Iterator[Passing]:
    """Pass descriptors to this process; afterwards they are gone and nothing was ever claimed."""
    for variable in (*LISTEN_VARIABLES, "SDLISTEN_REQUIRE", "SDLISTEN_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(activation, "_process", None)
    environ = dict(os.environ)
    yield Passing()
    os.environ.clear()
    os.environ.update(environ)


def out_of_the_way(sock: socket.socket) -> socket.socket:
    """Move a socket of a fixture to a high number, where `passing` does not disturb it."""
    number = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, RESERVED.stop)
    sock.close()
    return socket.socket(fileno=number)


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    """Give a listening TCP socket on IPv4 with a backlog of its own (77), blocking as a manager passes it."""
    with out_of_the_way(socket.create_server(("127.0.0.1", 0), backlog=77)) as sock:
        yield sock


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[socket.socket]:
    """Give a listening unix socket with a backlog of its own (55), blocking as a manager passes it."""
    with out_of_the_way(socket.socket(socket.AF_UNIX)) as sock:
        sock.bind(str(tmp_path / "passed.sock"))
        sock.listen(55)
        yield sock


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    """Give a bound UDP socket."""
    with out_of_the_way(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.fixture
def rounds() -> Callable[[int], int]:
    """Scale a repeated proof: SDLISTEN_ROUNDS (1 if unset; or a fraction) times its number, at least 1."""
    factor = float(os.environ.get("SDLISTEN_ROUNDS", "1"))
    return lambda full: max(1, round(full * factor))


@pytest.fixture(scope="session", autouse=True)
def _libuv() -> None:
    """Let libuv open the pipe for signals that it keeps until the process ends."""
    uvloop.new_event_loop().close()


LOOP_SECONDS = 20.0


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Give a function that runs a coroutine to its end, on each kind of loop, with a deadline."""

    async def in_time(coroutine: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(LOOP_SECONDS):
            await coroutine

    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda coroutine: runner.run(in_time(coroutine))
    gc.collect()  # uvloop frees its handles late


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a manager's end."""
    with Receiver() as receiver:
        yield receiver
