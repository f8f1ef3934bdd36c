"""python-systemd as the second judge. Every row of tests/vectors through both: test_conformance.py."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import pytest

from sdlisten.activation import Activation
from sdlisten.backend import require_agreement
from sdlisten.errors import ListenEnvironmentError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    Passing = Callable[..., None]
    Unchanged = Callable[[], AbstractContextManager[None]]


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


class Judge:
    """A python-systemd that says what it is told to, and marks descriptors as the real one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.says: dict[int, str] | Exception = {}
        self.asked = 0
        module = ModuleType("systemd.daemon")
        module.listen_fds_with_names = self._listen_fds_with_names  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "systemd", ModuleType("systemd"))
        monkeypatch.setitem(sys.modules, "systemd.daemon", module)

    def _listen_fds_with_names(self, unset_environment: bool = True) -> dict[int, str]:
        assert unset_environment is False
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        for fd in self.says:
            os.set_inheritable(fd, False)
        return self.says


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Give a python-systemd that can be told what to say."""
    monkeypatch.delenv("SDLISTEN_BACKEND", raising=False)
    return Judge(monkeypatch)


@pytest.mark.parametrize("wanted", ["", "auto", "libsystemd"])
def test_agreement(judge: Judge, monkeypatch: pytest.MonkeyPatch, tcp: socket.socket, wanted: str) -> None:
    """Where both say the same all is well, and close-on-exec is as before."""
    os.set_inheritable(tcp.fileno(), True)
    monkeypatch.setenv("SDLISTEN_BACKEND", wanted)
    judge.says = {tcp.fileno(): "web"}

    require_agreement({tcp.fileno(): "web"})

    assert judge.asked == 1
    assert os.get_inheritable(tcp.fileno()) is True


def test_builtin_does_not_ask(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDLISTEN_BACKEND=builtin: whatever python-systemd would say."""
    monkeypatch.setenv("SDLISTEN_BACKEND", "builtin")

    require_agreement({3: "web"})

    assert judge.asked == 0


@pytest.mark.parametrize("name", ["ä", "\udcff"])
def test_does_not_ask_for_names_that_are_not_ascii(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Such names crash python-systemd, or are decoded in another way than ours."""
    monkeypatch.setenv("SDLISTEN_BACKEND", "libsystemd")

    require_agreement({3: name})

    assert judge.asked == 0


REPORT = "SDLISTEN_BACKEND=builtin does without it; please report this."
BEFORE = "Other code in this process has called systemd.daemon.listen_fds() before; call sdlisten instead."


@pytest.mark.parametrize(
    ("says", "why"),
    [({}, BEFORE), ({3: "other"}, REPORT), (OSError(22, "Invalid argument"), REPORT)],
    ids=["nothing", "another name", "an error"],
)
def test_disagreement(
    judge: Judge,
    passing: Passing,
    tcp: socket.socket,
    unchanged: Unchanged,
    *,
    says: dict[int, str] | OSError,
    why: str,
) -> None:
    """What libsystemd sees otherwise is an error that quotes both; nothing is claimed then."""
    passing(tcp, names="web")
    judge.says = says

    with unchanged(), pytest.raises(ListenEnvironmentError) as caught:
        Activation.current()

    assert str(caught.value) == (
        f"libsystemd does not agree on what was passed: it says {says!r}, we found {{3: 'web'}}. {why}"
    )
    assert (caught.value.variable, caught.value.value) == ("LISTEN_FDS", "1")


def test_is_asked_only_if_something_was_passed(judge: Judge, passing: Passing) -> None:
    """If we find nothing, nobody else is asked."""
    passing()

    assert Activation.current().descriptors == ()
    assert judge.asked == 0


def test_is_not_asked_for_a_mapping(judge: Judge, passing: Passing, tcp: socket.socket) -> None:
    """It knows the process's own environment alone."""
    passing(tcp, names="web")
    environ = {**os.environ, "LISTEN_FDNAMES": "other"}

    assert Activation.from_environ(environ).descriptors[0].name == "other"
    assert judge.asked == 0


@pytest.mark.parametrize("wanted", ["systemd", "LIBSYSTEMD", " auto"])
def test_unknown_backends(
    passing: Passing, tcp: socket.socket, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """Another value of SDLISTEN_BACKEND is an error that lists those there are."""
    passing(tcp)
    monkeypatch.setenv("SDLISTEN_BACKEND", wanted)

    with unchanged(), pytest.raises(ListenEnvironmentError) as caught:
        Activation.current()

    assert str(caught.value) == f"SDLISTEN_BACKEND={wanted!r}: expected auto, libsystemd or builtin"
    assert (caught.value.variable, caught.value.value) == ("SDLISTEN_BACKEND", wanted)


@pytest.mark.parametrize("module", [None, ModuleType("systemd.daemon")], ids=["missing", "another package"])
def test_without_python_systemd(
    passing: Passing,
    tcp: socket.socket,
    unchanged: Unchanged,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType | None,
) -> None:
    """Without it our own answer stands, unless it was demanded: then the text says how to install it.

    The python-systemd of PyPI, which is another package, is as good as none.
    """
    passing(tcp, names="web")
    monkeypatch.setitem(sys.modules, "systemd", ModuleType("systemd"))
    monkeypatch.setitem(sys.modules, "systemd.daemon", module)
    monkeypatch.setenv("SDLISTEN_BACKEND", "libsystemd")

    with unchanged(), pytest.raises(ListenEnvironmentError) as caught:
        Activation.current()
    monkeypatch.delenv("SDLISTEN_BACKEND")
    found = Activation.current()

    assert str(caught.value) == (
        "SDLISTEN_BACKEND=libsystemd, but python-systemd is missing: pip install 'sdlisten[systemd]'"
    )
    assert (caught.value.variable, caught.value.value) == ("SDLISTEN_BACKEND", "libsystemd")
    assert [one.name for one in found.descriptors] == ["web"]


def test_the_real_one(passing: Passing, tcp: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """python-systemd agrees, does not unset anything before we do, and finds nothing after us."""
    try:
        daemon = importlib.import_module("systemd.daemon")
    except ImportError as error:
        missing(f"systemd-python is not installed: {error}")
    passing(tcp, tcp, names=["web", ""])
    monkeypatch.setenv("SDLISTEN_BACKEND", "libsystemd")

    found = Activation.current()

    assert [(one.fd, one.name) for one in found.descriptors] == [(3, "web"), (4, "")]
    assert [os.get_inheritable(fd) for fd in (3, 4)] == [False, False]
    assert daemon.listen_fds_with_names() == {}


def test_who_asked_libsystemd_before_us(passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
    """Other code called systemd.daemon.listen_fds(), which unsets only the C environment: we notice."""
    try:
        daemon = importlib.import_module("systemd.daemon")
    except ImportError as error:
        missing(f"systemd-python is not installed: {error}")
    passing(tcp, names="web")
    assert daemon.listen_fds(unset_environment=True) == [3]

    with unchanged(), pytest.raises(ListenEnvironmentError, match=r"it says \{\}, we .* Other code in this"):
        Activation.current()
