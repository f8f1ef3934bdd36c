"""Every row of vectors/listen_env.toml: our reader with either backend, and libsystemd's own answer.

libsystemd is asked through ctypes, in this very process and with the very descriptors that we see then, so
that the two cannot have been asked different things; python-systemd asks it for us where it is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

from sdlisten import errors
from sdlisten.activation import Activation
from sdlisten.environment import VARIABLES
from sdlisten.exec_shim import pidfdid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager, ExitStack

    Passing = Callable[..., None]
    Unchanged = Callable[[], AbstractContextManager[None]]

VECTORS = Path(__file__).parent / "vectors" / "listen_env.toml"
ROWS: list[dict[str, Any]] = tomllib.loads(VECTORS.read_text("utf-8"))["row"]
KEYS = {"id", "fact", "env", "fds", "libsystemd"}
OUTCOMES = {"expect", "absent", "error"}
SAME_SINCE = re.compile(r"same since (\d+): .")

every_row = pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


def listening(family: int, kind: int, address: object) -> socket.socket:
    """Make a listener."""
    sock = socket.socket(family, kind)
    sock.bind(address)  # type: ignore[arg-type]
    sock.listen()
    return sock


def connected(stack: ExitStack, _directory: str) -> socket.socket:
    """Make the accepted end of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stack.enter_context(socket.create_connection(listener.getsockname()))
        return listener.accept()[0]


def one_of_a_pair(stack: ExitStack, _directory: str) -> socket.socket:
    """Make an end of a socketpair."""
    ours, other = socket.socketpair()
    stack.enter_context(other)
    return ours


def one_of_a_pipe(stack: ExitStack, _directory: str) -> int:
    """Make the reading end of a pipe."""
    ours, other = os.pipe()
    stack.callback(os.close, other)
    return ours


def message_queue(_stack: ExitStack, _directory: str) -> int:
    """Open a POSIX message queue as systemd does, and remove its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"/sdlisten-conformance-{os.getpid()}".encode()
    fd: int = libc.mq_open(name, os.O_RDONLY | os.O_CREAT, 0o600, None)
    if fd < 0:
        missing(f"mq_open: {os.strerror(ctypes.get_errno())}")
    libc.mq_unlink(name)
    return fd


STREAM, SEQPACKET, DGRAM = socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM
THINGS: dict[str, Callable[[ExitStack, str], int | socket.socket]] = {
    "tcp": lambda _, __: listening(socket.AF_INET, STREAM, ("127.0.0.1", 0)),
    "unix": lambda _, directory: listening(socket.AF_UNIX, STREAM, f"{directory}/unix"),
    "seqpacket": lambda _, directory: listening(socket.AF_UNIX, SEQPACKET, f"{directory}/seqpacket"),
    "abstract": lambda _, __: listening(socket.AF_UNIX, STREAM, ""),
    "udp": lambda _, __: socket.socket(socket.AF_INET, DGRAM),
    "unix datagram": lambda _, __: socket.socket(socket.AF_UNIX, DGRAM),
    "stream": lambda _, __: socket.socket(socket.AF_INET, STREAM),
    "netlink": lambda _, __: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "connection": connected,
    "unix connection": one_of_a_pair,
    "pipe": one_of_a_pipe,
    "mq": message_queue,
    "device": lambda _, __: os.open("/dev/zero", os.O_RDONLY),
    "file": lambda _, __: os.open(__file__, os.O_RDONLY),
    "directory": lambda _, directory: os.open(directory, os.O_RDONLY),
    "memfd": lambda _, __: os.memfd_create("conformance"),
    "eventfd": lambda _, __: os.eventfd(0),
    "closed": lambda _, __: os.open("/dev/null", os.O_RDONLY),
}


def known_at_run_time() -> dict[str, str]:
    """Return what stands for the placeholders of the table."""
    own = pidfdid()
    return {
        "{pid}": str(os.getpid()),
        "{other_pid}": str(os.getppid()),
        "{hex_pid}": hex(os.getpid()),
        "{pidfdid}": str(own),
        "{other_pidfdid}": str((own or 0) + 1),
        "{a255}": "a" * 255,
        "{a256}": "a" * 256,
        "{ff}": "\udcff",
    }


def filled(text: str) -> str:
    """Fill in what is known only now."""
    for placeholder, value in known_at_run_time().items():
        text = text.replace(placeholder, value)
    return text


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Keep the collection of garbage after each row from going through all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pass_row(passing: Passing, tmp_path: Path) -> Callable[[dict[str, Any], ExitStack], None]:
    """Give a function that passes what a row says to this process."""

    def pass_it(row: dict[str, Any], stack: ExitStack) -> None:
        if "pidfdid}" in str(row) and pidfdid() is None:
            missing("pidfds have no inodes of their own here: Linux before 6.9")
        made = [THINGS[word](stack, f"{tmp_path}") for word in row["fds"]]
        passing(*made)
        for place, thing in enumerate(made, 3):
            os.close(thing if isinstance(thing, int) else thing.detach())
            if row["fds"][place - 3] == "closed":
                os.close(place)
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        os.environ.update({variable: filled(value) for variable, value in row["env"].items()})

    return pass_it


Found = dict[int, str]


def ask_libsystemd() -> Found | OSError:
    """Ask sd_listen_fds_with_names(3), which makes what it finds close-on-exec."""
    try:
        libsystemd = ctypes.CDLL("libsystemd.so.0")
    except OSError as error:
        missing(f"libsystemd is not installed: {error}")
    names = ctypes.POINTER(ctypes.c_char_p)()
    count = libsystemd.sd_listen_fds_with_names(0, ctypes.byref(names))
    if count < 0:
        return OSError(-count, os.strerror(-count))
    return {3 + index: os.fsdecode(cast("bytes", names[index])) for index in range(count)}


def knows_pidfdid() -> bool:
    """Whether the libsystemd of this machine is 259 or newer: the variable's name is in it."""
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    paths = {line.split()[-1] for line in maps if "/libsystemd.so" in line}
    return any(b"LISTEN_PIDFDID" in Path(path).read_bytes() for path in paths)


def verdict_of(row: dict[str, Any]) -> str:
    """Return whether this machine's libsystemd should say the same as we, less, or more."""
    word: str = row["libsystemd"]
    if SAME_SINCE.match(word):
        return "same" if knows_pidfdid() else "laxer"
    return word.partition(":")[0]


def without_kind(row: dict[str, Any]) -> Found:
    """Return what a row expects as libsystemd says it."""
    words = map(filled, row.get("expect", []))
    return {fd: word.rpartition(": ")[0] for fd, word in enumerate(words, 3)}


def test_the_table_is_in_order() -> None:
    """Each row has an id of its own, a fact, one outcome, a verdict on libsystemd; there are enough."""
    assert len(ROWS) >= 40
    assert len({row["id"] for row in ROWS}) == len({row["fact"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.keys() - {"raises"} - OUTCOMES == KEYS, row["id"]
        assert len(row.keys() & OUTCOMES) == 1, row["id"]
        assert set(row["fds"]) <= THINGS.keys(), row["id"]
        assert re.fullmatch(r"same|(laxer|stricter|same since \d+): .+", row["libsystemd"]), row["id"]
    assert {word for row in ROWS for word in row["fds"]} == THINGS.keys()


@every_row
def test_libsystemd(row: dict[str, Any], pass_row: Callable[[dict[str, Any], ExitStack], None]) -> None:
    """The judge says what the row claims that it says."""
    with contextlib.ExitStack() as stack:
        pass_row(row, stack)
        found = ask_libsystemd()

    verdict = verdict_of(row)
    if verdict == "same" and "error" in row:
        assert isinstance(found, OSError), found
    elif verdict == "same":
        assert found == without_kind(row)
    elif verdict == "laxer":
        assert not isinstance(found, OSError), found
        assert found != without_kind(row) or "error" in row
    else:
        assert isinstance(found, OSError), found
        assert "error" not in row


def assert_outcome(row: dict[str, Any], unchanged: Unchanged) -> None:
    """Read the row with our own reader and compare all that it promises."""
    if "error" in row:
        kind = getattr(errors, row.get("raises", "ListenEnvironmentError"))
        with unchanged(), pytest.raises(kind, match=re.escape(filled(row["error"]))) as caught:
            Activation.current()
        assert type(caught.value) is kind
        return
    blocking = [os.get_blocking(fd) for fd in range(3, 3 + len(row["fds"]))]
    found = Activation.current()

    expected = list(map(filled, row.get("expect", [])))
    assert [f"{one.name}: {one.kind.value}" for one in found.descriptors] == expected
    assert [one.fd for one in found.descriptors] == list(without_kind(row))
    assert found.absent == filled(row.get("absent", ""))
    assert [os.get_blocking(fd) for fd in range(3, 3 + len(row["fds"]))] == blocking
    assert not any(os.get_inheritable(one.fd) for one in found.descriptors)
    assert not [variable for variable in os.environ if variable.startswith("LISTEN_")]


def is_installed() -> bool:
    """Whether python-systemd can be imported."""
    try:
        return importlib.util.find_spec("systemd.daemon") is not None
    except ModuleNotFoundError:
        return False


BACKENDS = ["builtin", "libsystemd"] if is_installed() else ["builtin"]


def test_both_backends_are_here() -> None:
    """Every row goes through python-systemd as well, where it is installed."""
    if not is_installed():
        missing("systemd-python is not installed")
    assert BACKENDS == ["builtin", "libsystemd"]


@every_row
@pytest.mark.parametrize("backend", BACKENDS)
def test_reader(
    row: dict[str, Any],
    backend: str,
    pass_row: Callable[[dict[str, Any], ExitStack], None],
    unchanged: Unchanged,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our reader says what the row claims, alone and with python-systemd as the second judge."""
    monkeypatch.setenv("SDLISTEN_BACKEND", backend)
    with contextlib.ExitStack() as stack:
        pass_row(row, stack)
        assert_outcome(row, unchanged)
