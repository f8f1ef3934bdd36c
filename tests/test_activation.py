"""Claim once, take once: nobody adopts twice, nothing leaks, and what failed has changed nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import sdlisten
from sdlisten import activation
from sdlisten.activation import Activation, close_untaken_stored, listen_fds, process_activation
from sdlisten.adopt_or_bind import Adopt, listen
from sdlisten.environment import VARIABLES
from sdlisten.errors import (
    AlreadyTakenError,
    DescriptorError,
    ListenEnvironmentError,
    NameNotFoundError,
    SdlistenError,
)
from sdlisten.exec_shim import pidfdid
from sdlisten.listener import Origin
from sdlisten.state import write_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Passing = Callable[..., None]
    Rounds = Callable[[int], int]
    Unchanged = Callable[[], AbstractContextManager[None]]

SECONDS = 20.0  # far beyond what anything here takes


# Shows every variable and every descriptor.
LOOK = """
import contextlib, os
print(dict(os.environ))
for fd in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError): print(os.readlink(f"/proc/self/fd/{fd}"))
"""


def where(sock: socket.socket) -> str:
    """Return the word of an IPv4 socket's address."""
    host, port = sock.getsockname()
    return f"{host}:{port}"


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Keep the collection of garbage after each test from going through all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def c_environment() -> dict[str, str | None]:
    """Return the variables as C code sees them, which os.environ may not."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    values = {name: libc.getenv(name.encode()) for name in VARIABLES}
    return {name: value.decode() for name, value in values.items() if value is not None}


def in_child(action: Callable[[], object]) -> Any:  # noqa: ANN401 - whatever JSON has
    """Return what a function returns in a forked child; for an error of ours, its type and text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            try:
                answer = action()
            except SdlistenError as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return json.loads(answer or b'"the child has died"')


class TestClaim:
    """Activation.current()."""

    def test_happens_once(self, passing: Passing, tcp: socket.socket) -> None:
        """The first call claims; later ones return the same object, whatever the environment says by then."""
        passing(tcp, names="web")

        found = Activation.current()
        os.environ.update({"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())})

        assert Activation.current() is found
        assert [str(one) for one in found.descriptors] == [f"fd 3 'web' {where(tcp)}"]
        assert found.remaining == found.descriptors
        assert found.absent == ""

    def test_leaves_nothing_to_children(self, passing: Passing, tcp: socket.socket) -> None:
        """The variables are gone from os.environ and from C, the descriptors are close-on-exec."""
        libc = ctypes.CDLL(None)
        passing(tcp, tcp, names="web:admin", environ={"NOTIFY_SOCKET": "@somewhere"})
        libc.setenv(b"LISTEN_PIDFDID", str(pidfdid() or 0).encode(), 1)  # behind the back of os.environ

        Activation.current()

        assert not os.environ.keys() & set(VARIABLES)
        assert c_environment() == {}
        assert os.environ["NOTIFY_SOCKET"] == "@somewhere"
        assert [os.get_inheritable(fd) for fd in (3, 4)] == [False, False]

    def test_a_child_with_our_environment_finds_nothing(self, passing: Passing, tcp: socket.socket) -> None:
        """A program started with env=dict(os.environ) has no variable and no descriptor of ours."""
        passing(tcp, names="web")
        with Activation.current().take_listeners("web") as (listener,):
            inode = os.fstat(listener.fileno()).st_ino
            command = [sys.executable, "-I", "-S", "-c", LOOK]
            done = subprocess.run(
                command, env=dict(os.environ), close_fds=False, capture_output=True, text=True, check=True
            )

        assert "'LISTEN_" not in done.stdout
        assert "pipe:" in done.stdout
        assert f"socket:[{inode}]" not in done.stdout

    @pytest.mark.parametrize("blocking", [True, False])
    def test_leaves_the_shared_flag(self, passing: Passing, tcp: socket.socket, *, blocking: bool) -> None:
        """O_NONBLOCK is shared with the manager, and not touched before somebody takes the descriptor."""
        tcp.setblocking(blocking)
        passing(tcp)

        Activation.current()

        assert os.get_blocking(3) is blocking

    def test_nothing_was_passed(self, passing: Passing) -> None:
        """Without the variables there is nothing, and the reason can be read."""
        passing()

        found = Activation.current()

        assert (found.descriptors, found.remaining, found.forked) == ((), (), False)
        assert found.absent == "LISTEN_FDS is not set"
        assert listen_fds() == ()

    def test_a_foreign_pid(self, passing: Passing, tcp: socket.socket) -> None:
        """What is meant for another process is left alone, and its variables do not reach our children."""
        passing(tcp, environ={"LISTEN_PID": str(os.getppid())})

        found = Activation.current()

        assert found.descriptors == ()
        assert "a wrapper started us without exec" in found.absent
        assert os.get_inheritable(3) is True
        assert c_environment() == {}

    def test_a_late_claim_changes_nothing(self, passing: Passing, tcp: socket.socket) -> None:
        """A thread that binds (NEVER) claims at last; what another has taken meanwhile stays taken."""
        passing(tcp, names="web")
        looked = process_activation()

        with Activation.current().take_listeners("web"):
            looked.claim()

            assert process_activation() is not looked
            assert Activation.current().remaining == ()
            with pytest.raises(AlreadyTakenError):
                Activation.current().take_fds("web")

    @pytest.mark.parametrize("right", [True, False])
    def test_pidfdid(self, passing: Passing, tcp: socket.socket, *, right: bool) -> None:
        """LISTEN_PIDFDID of another process that had our pid before: nothing was passed to us."""
        own = pidfdid()
        passing(tcp, environ={"LISTEN_PIDFDID": str((own or 0) + (not right))})

        found = Activation.current()

        assert len(found.descriptors) == (1 if right or own is None else 0)
        assert ("another process with our pid" in found.absent) is not (right or own is None)

    def test_somebody_was_faster(self, passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
        """Importing twisted.internet.endpoints deletes LISTEN_PID and LISTEN_FDS: an error, and no bind."""
        passing(tcp, names="web")
        del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"]

        for call in (Activation.current, listen_fds, lambda: listen("127.0.0.1:0")):
            with unchanged(), pytest.raises(ListenEnvironmentError, match="Call sdlisten before that code"):
                call()

    def test_a_claim_that_fails_can_be_repaired(self, passing: Passing, tcp: socket.socket) -> None:
        """A failed claim is not remembered: with the environment repaired the next one works."""
        passing(tcp, environ={"LISTEN_FDS": "x"})
        with pytest.raises(ListenEnvironmentError):
            Activation.current()

        os.environ["LISTEN_FDS"] = "1"

        assert len(Activation.current().descriptors) == 1


class TestFromEnviron:
    """Activation.from_environ(): a mapping of your own."""

    def test_neither_changes_nor_remembers(self, passing: Passing, tcp: socket.socket) -> None:
        """The mapping stays as it is, and so does the environment of the process and what it passed."""
        passing(tcp, names="web")
        environ = MappingProxyType({**os.environ, "LISTEN_FDNAMES": "mine"})
        before = dict(os.environ)

        found = Activation.from_environ(environ)

        assert [one.name for one in found.descriptors] == ["mine"]
        assert os.get_inheritable(3) is False
        assert os.environ == before
        assert [one.name for one in Activation.current().descriptors] == ["web"]

    def test_for_another_pid(self, passing: Passing, tcp: socket.socket) -> None:
        """The variables may be meant for any pid that the caller names, and LISTEN_PIDFDID is its affair."""
        passing(tcp)
        environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_PIDFDID": "1"}

        assert len(Activation.from_environ(environ, pid=1).descriptors) == 1
        assert Activation.from_environ(environ).descriptors == ()

    def test_errors(self, passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
        """A mapping is read as strictly as the environment."""
        passing(tcp)

        for environ, text in (
            ({"LISTEN_PID": "x"}, "LISTEN_PID='x'"),
            ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}, "but fd 4 is not open"),
        ):
            with unchanged(), pytest.raises(SdlistenError, match=re.escape(text)):
                Activation.from_environ(environ)

    def test_takes_once_as_well(self, passing: Passing, tcp: socket.socket) -> None:
        """What one such object has given away it does not give again."""
        passing(tcp, names="web")
        found = Activation.from_environ(dict(os.environ))

        with found.take_listeners("web"), pytest.raises(AlreadyTakenError):
            found.take_fds("web")


class TestTake:
    """Taking by name, once."""

    def test_listeners(self, passing: Passing, tcp: socket.socket, unix: socket.socket) -> None:
        """All listeners of a name, at their numbers, non-blocking and close-on-exec; others stay."""
        passing(tcp, unix, tcp, names="web:admin:web")
        found = Activation.current()

        with found.take_listeners("web") as listeners:
            assert [listener.fileno() for listener in listeners] == [3, 5]
            assert {listener.name for listener in listeners} == {"web"}
            assert {listener.origin for listener in listeners} == {Origin.ADOPTED}
            assert [os.get_blocking(fd) for fd in (3, 4, 5)] == [False, True, False]
            assert not os.get_inheritable(3)
            assert listeners[0].backlog == 77
            assert [one.fd for one in found.remaining] == [4]

    def test_listeners_beside_others_of_the_name(
        self, passing: Passing, tcp: socket.socket, udp: socket.socket
    ) -> None:
        """A unit may pass a datagram socket under the same name; it stays for others."""
        passing(udp, tcp, names="dns:dns")
        found = Activation.current()

        with found.take_listeners("dns") as (listener,):
            assert listener.fileno() == 4
        assert [one.fd for one in found.remaining] == [3]

    def test_sockets(self, passing: Passing, tcp: socket.socket, udp: socket.socket) -> None:
        """Sockets of any kind come as they are: blocking or not, close-on-exec, owned by the caller."""
        udp.setblocking(False)
        passing(tcp, udp, names="web:web")

        stream, datagram = Activation.current().take_sockets("web")

        with stream, datagram:
            assert (stream.fileno(), stream.gettimeout(), os.get_blocking(3)) == (3, None, True)
            assert (datagram.fileno(), datagram.gettimeout(), os.get_blocking(4)) == (4, 0.0, False)
            assert (stream.proto, datagram.type) == (socket.IPPROTO_TCP, socket.SOCK_DGRAM)
            assert [os.get_inheritable(fd) for fd in (3, 4)] == [False, False]

    def test_fds(self, passing: Passing, tcp: socket.socket) -> None:
        """Anything can be taken as a number, which the caller owns."""
        with open(os.devnull, "rb") as file:
            passing(tcp, file.fileno(), names="web:web")

        assert Activation.current().take_fds("web") == (3, 4)
        assert Activation.current().remaining == ()

    def test_stored(self, passing: Passing, tcp: socket.socket, unix: socket.socket) -> None:
        """What store(name="web") kept comes back as "web", as its own, STORED; other stored names stay."""
        passing(tcp, tcp, unix, tcp, names="sdlisten.f.web:stored:sdlisten.c.0:web")
        found = Activation.current()

        assert [(one.name, one.stored) for one in found.descriptors] == [
            ("web", True),
            ("stored", True),
            ("sdlisten.c.0", True),
            ("web", False),
        ]
        with found.take_listeners("web") as listeners:
            assert [(listener.fileno(), listener.origin) for listener in listeners] == [
                (3, Origin.STORED),
                (6, Origin.ADOPTED),
            ]
        assert found.take_fds("sdlisten.c.0") == (5,)

    def test_state(self, passing: Passing, tcp: socket.socket) -> None:
        """take_state() gives the latest bytes of a name, once, or None; the other descriptors stay."""
        fds = [write_state(data, version=2) for data in (b"old", b"new")]
        with contextlib.ExitStack() as stack:
            for fd in fds:
                stack.callback(os.close, fd)
            passing(tcp, *fds, names="web:sdlisten.s.count:sdlisten.s.count")
        found = Activation.current()

        state = found.take_state("count")
        assert state is not None
        assert (state.data, state.version) == (b"new", 2)
        assert found.take_state("other") is None
        assert [one.name for one in found.remaining] == ["web"]
        with pytest.raises(AlreadyTakenError, match=r"was taken before, by take_state\('count'\)"):
            found.take_state("count")

    def test_untaken_stored(self, passing: Passing, tcp: socket.socket) -> None:
        """What nobody took of sdlisten's stored names is closed and named once; all else stays open."""
        assert close_untaken_stored() == ()
        names = "sdlisten.f.a:sdlisten.c.0:sdlisten.c.0:web:stored:sdlisten.s.b"
        passing(tcp, tcp, tcp, tcp, tcp, tcp, names=names)
        assert close_untaken_stored() == ()  # nobody has claimed them
        Activation.current().take_fds("a")

        assert in_child(close_untaken_stored) == []
        assert close_untaken_stored() == ("sdlisten.c.0", "sdlisten.s.b")
        assert close_untaken_stored() == ()
        assert [one.name for one in Activation.current().remaining] == ["web", "stored"]
        for fd, is_open in {3: True, 4: False, 5: False, 6: True, 7: True, 8: False}.items():
            assert os.path.exists(f"/proc/self/fd/{fd}") is is_open

    def test_untaken_stored_of_a_name_in_use(self, passing: Passing, tcp: socket.socket) -> None:
        """A name of which somebody took or closed one is not removed: that would remove all of them."""
        passing(tcp, tcp, tcp, names="sdlisten.f.a:sdlisten.f.a:sdlisten.f.b")
        found = Activation.current()
        listeners = found.adopt(found.remaining[:1], by="a test")
        os.close(5)

        assert close_untaken_stored() == ()
        assert [os.path.exists(f"/proc/self/fd/{fd}") for fd in (3, 4, 5)] == [True, False, False]
        listeners.close()

    def test_all_the_rest(self, passing: Passing, tcp: socket.socket, udp: socket.socket) -> None:
        """listen_fds() takes what is left, of any kind; a second call finds nothing left."""
        passing(tcp, udp, names="web:dns")
        with Activation.current().take_listeners("web"):
            rest = listen_fds()

            assert [(one.fd, one.name, one.kind.value, one.stored) for one in rest] == [
                (4, "dns", "datagram socket", False)
            ]
            assert listen_fds() == ()

    def test_close_remaining(self, passing: Passing, tcp: socket.socket, udp: socket.socket) -> None:
        """What nobody wants is closed; what was taken and what the manager holds is not."""
        passing(tcp, udp, tcp, names="web:dns:old")
        with Activation.current().take_listeners("web") as (listener,):
            Activation.current().close_remaining()
            Activation.current().close_remaining()

            for fd in (4, 5):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
            assert listener.backlog == 77


TAKERS: dict[str, Callable[[], object]] = {
    "take_listeners('web')": lambda: Activation.current().take_listeners("web"),
    "take_sockets('web')": lambda: Activation.current().take_sockets("web"),
    "take_fds('web')": lambda: Activation.current().take_fds("web"),
    "listen(name='web')": lambda: listen(name="web"),
    "listen('127.0.0.1:0', name='web')": lambda: listen("127.0.0.1:0", name="web"),
}


FIRST: dict[str, Callable[[], object]] = {
    "take_fds('web')": lambda: Activation.current().take_fds("web"),
    "listen_fds()": listen_fds,
    "close_remaining()": lambda: Activation.current().close_remaining(),
}


class TestRefusals:
    """What cannot be taken is refused as a whole, and nothing has changed then."""

    @pytest.mark.parametrize("second", TAKERS)
    @pytest.mark.parametrize("first", FIRST)
    def test_taken_before(
        self, passing: Passing, tcp: socket.socket, unchanged: Unchanged, *, first: str, second: str
    ) -> None:
        """The second taker is told who was first."""
        passing(tcp, names="web")
        FIRST[first]()

        with unchanged(), pytest.raises(AlreadyTakenError) as caught:
            TAKERS[second]()

        expected = f"fd 3 'web' {where(tcp)} was taken before, by {first}; {second} comes second"
        assert str(caught.value) == expected

    def test_all_or_nothing(
        self, passing: Passing, tcp: socket.socket, unix: socket.socket, unchanged: Unchanged
    ) -> None:
        """If one of several was taken, the others stay to be taken."""
        passing(tcp, unix, names="web:web")
        found = Activation.current()
        with found.adopt(found.descriptors[1:], by="somebody"):
            with unchanged(), pytest.raises(AlreadyTakenError, match=r"^fd 4 .* by somebody; take_fds"):
                found.take_fds("web")

            assert [one.fd for one in found.remaining] == [3]

    def test_no_such_name(self, passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
        """The text lists what was passed and says where the name has to be written."""
        passing(tcp, names="web")
        found = Activation.current()

        for take in (found.take_listeners, found.take_sockets, found.take_fds):
            with unchanged(), pytest.raises(NameNotFoundError) as caught:
                take("admin")
            assert str(caught.value) == (
                f"no passed descriptor is named 'admin'. Passed: fd 3 'web' {where(tcp)}. "
                f"Put FileDescriptorName=admin into the .socket unit."
            )

    def test_no_such_name_because_nothing_was_passed(self, passing: Passing) -> None:
        """If nothing was passed, the text says why."""
        passing()

        with pytest.raises(NameNotFoundError, match=r"Passed: nothing \(LISTEN_FDS is not set\)\. Put"):
            Activation.current().take_fds("web")

    def test_no_listener(self, passing: Passing, udp: socket.socket, unchanged: Unchanged) -> None:
        """If nothing of the name listens, the text says what there is and how to take it."""
        passing(udp, udp, names="dns:dns")
        found = Activation.current()

        with unchanged(), pytest.raises(DescriptorError) as caught:
            found.take_listeners("dns")

        assert str(caught.value) == (
            "fd 3 'dns' datagram socket, fd 4 'dns' datagram socket does not listen; "
            "take_sockets() and take_fds() take anything"
        )
        assert caught.value.fd == 3
        assert len(found.remaining) == 2

    def test_no_socket(self, passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
        """If something of the name is no socket, take_sockets() takes nothing."""
        with open(os.devnull, "rb") as file:
            passing(tcp, file.fileno(), names="web:web")
        found = Activation.current()

        with unchanged(), pytest.raises(DescriptorError) as caught:
            found.take_sockets("web")

        assert str(caught.value) == (
            "fd 4 'web' device is no socket; take_fds('web') takes the bare descriptor"
        )
        assert caught.value.fd == 4
        assert len(found.remaining) == 2

    @pytest.mark.parametrize("by", ["take_listeners", "take_sockets", "take_fds", "listen_fds"])
    @pytest.mark.parametrize("what", ["is closed", "is another file"])
    def test_somebody_closed_one(
        self, passing: Passing, tcp: socket.socket, unchanged: Unchanged, *, by: str, what: str
    ) -> None:
        """A number that is closed, or has another file now, is not taken, and neither are the others."""
        passing(tcp, tcp, names="web:web")
        found = Activation.current()
        if what == "is closed":
            os.close(4)
        else:
            with socket.socket() as other:
                os.dup2(other.fileno(), 4, inheritable=False)
        take: Callable[[], object] = listen_fds if by == "listen_fds" else lambda: getattr(found, by)("web")

        with unchanged(), pytest.raises(DescriptorError) as caught:
            take()

        assert str(caught.value) == (
            f"fd 4 'web' {where(tcp)} {what} meanwhile: "
            f"some code in this process closed a descriptor that it did not own"
        )
        assert len(found.remaining) == 2

    def test_a_failing_first_call_claims_nothing(
        self, passing: Passing, tcp: socket.socket, unchanged: Unchanged
    ) -> None:
        """If listen_fds() is the first call and fails, variables and flags are still there."""
        passing(tcp, tcp, environ={"LISTEN_FDS": "3"})

        with unchanged(), pytest.raises(DescriptorError) as caught:
            listen_fds()

        assert str(caught.value) == (
            "LISTEN_FDS=3 promises fd 3 to 5, but fd 5 is not open (Bad file descriptor): "
            "something between the manager and us closed it"
        )
        assert caught.value.fd == 5


def race(*actions: Callable[[], object]) -> list[object]:
    """Run functions in threads that start at the same moment; return results and errors in that order."""
    barrier = threading.Barrier(len(actions))
    results: list[object] = [None] * len(actions)

    def run(index: int) -> None:
        barrier.wait(SECONDS)
        try:
            results[index] = actions[index]()
        except SdlistenError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    return results


RACERS: dict[str, Callable[[], object]] = {
    "current": lambda: Activation.current().take_listeners("web"),
    "listen": lambda: listen("127.0.0.1:0", name="web"),
    "listen_fds": listen_fds,
}
PAIRS = [(one, other) for one in RACERS for other in RACERS if one <= other]


class TestThreads:
    """Threads wait for each other."""

    @pytest.mark.parametrize(("one", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
    def test_only_one_adopts(
        self, passing: Passing, tcp: socket.socket, rounds: Rounds, *, one: str, other: str
    ) -> None:
        """Of two threads that start at once one gets the descriptor; the other is told, and binds nothing."""
        passing(tcp, names="web")
        os.environ["LISTEN_PID"] = "0"  # each round is a process of its own

        def once() -> list[str]:
            os.environ["LISTEN_PID"] = str(os.getpid())
            results = race(RACERS[one], RACERS[other])
            if isinstance(results[0], AlreadyTakenError) or results[0] == ():
                results.reverse()
            winner, loser = results
            assert isinstance(winner, tuple)
            assert isinstance(loser, AlreadyTakenError) or loser == ()
            return [type(taken).__name__ for taken in winner]

        for _ in range(rounds(20)):
            assert in_child(once) in (["Listener"], ["InheritedFd"])

    def test_claiming_is_exclusive(self, passing: Passing, tcp: socket.socket) -> None:
        """Many threads that claim at once get one and the same object."""
        passing(tcp)

        results = race(*[Activation.current] * 8)

        assert len(set(map(id, results))) == 1
        assert isinstance(results[0], Activation)


class TestFork:
    """A forked child neither adopts nor binds by mistake."""

    def refusals(self) -> list[str]:
        """Return what every way to take, or to bind beside, says."""
        said = []
        for call in (
            lambda: Activation.current().take_listeners("web"),
            lambda: Activation.current().take_sockets("web"),
            lambda: Activation.current().take_fds("web"),
            lambda: Activation.current().close_remaining(),
            listen_fds,
            listen,
            lambda: listen("127.0.0.1:0"),
            lambda: listen(name="web"),
        ):
            try:
                said.append(f"{call()}")
            except SdlistenError as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    def text(self, tcp: socket.socket) -> str:
        """Return what they should say, up to the pid of the child."""
        parent = os.getpid()
        return (
            rf"AlreadyTakenError: fd 3 'web' {re.escape(where(tcp))}: passed to pid {parent}, "
            rf"which forked this one, \d+\. "
            rf"Take them in pid {parent}, before it forks, and use the listeners made there\."
        )

    @pytest.mark.parametrize("taken", [True, False])
    def test_after_the_claim(self, passing: Passing, tcp: socket.socket, *, taken: bool) -> None:
        """In a child of a process that has claimed, everything belongs to the parent, taken or not."""
        passing(tcp, names="web")
        found = Activation.current()
        with found.take_listeners("web") if taken else contextlib.nullcontext():
            said = in_child(self.refusals)
            seen = in_child(lambda: [found.forked, found.remaining, Activation.current() is found])

            assert [line for line in said if not re.fullmatch(self.text(tcp), line)] == []
            assert seen == [True, [], True]
            assert found.forked is False
        assert listen_fds() == (() if taken else found.descriptors)

    def test_before_the_claim(self, passing: Passing, tcp: socket.socket) -> None:
        """A child that was forked first has its parent's variables, and knows whose; its own child too."""
        passing(tcp, names="web")

        said = in_child(self.refusals)
        grandchild = in_child(lambda: in_child(self.refusals))

        assert [line for line in [*said, *grandchild] if not re.fullmatch(self.text(tcp), line)] == []
        with listen(name="web") as (listener,):
            assert (listener.fileno(), listener.backlog) == (3, 77)

    @pytest.mark.parametrize("backend", ["auto", "builtin"])
    def test_a_child_may_bind_on_purpose(self, passing: Passing, tcp: socket.socket, backend: str) -> None:
        """Adopt.NEVER binds in a child too; variables and descriptors do not reach what the child starts."""
        passing(tcp, names="web", environ={"SDLISTEN_BACKEND": backend})

        def bind() -> object:
            with listen("127.0.0.1:0", adopt=Adopt.NEVER) as (listener,):
                return [listener.origin.value, c_environment(), os.get_inheritable(3)]

        assert in_child(bind) == ["bound", {}, False]

    def test_a_child_of_its_own(self, passing: Passing, tcp: socket.socket) -> None:
        """Variables that name the child (written between fork and now) are for the child."""
        passing(tcp, names="web")

        def adopt() -> object:
            os.environ["LISTEN_PID"] = str(os.getpid())
            return [listener.fileno() for listener in listen(name="web")]

        assert in_child(adopt) == [3]

    def test_nothing_was_passed(self, passing: Passing) -> None:
        """Where nothing was passed, parent and child may bind as they like."""
        passing()
        Activation.current()

        def bind() -> object:
            with listen("127.0.0.1:0") as (listener,):
                return listener.origin.value

        assert in_child(bind) == "bound"

    def test_files_alone_do_not_keep_a_child_from_binding(self, passing: Passing) -> None:
        """Only sockets mean activation; a child of a process that was passed files may bind."""
        with open(os.devnull, "rb") as file:
            passing(file.fileno(), names="config")

        assert in_child(lambda: str(listen("127.0.0.1:0")[0].origin.value)) == "bound"
        assert in_child(listen_fds).startswith("AlreadyTakenError: fd 3 'config' device: passed to pid")

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_while_another_thread_holds_the_lock(self, passing: Passing, tcp: socket.socket) -> None:
        """A child forked in the middle of another thread's claim gets a lock of its own, and an answer."""
        passing(tcp, names="web")
        locked, go = threading.Event(), threading.Event()

        def hold() -> None:
            with activation.lock:
                locked.set()
                go.wait(SECONDS)

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait(SECONDS)
        try:
            said = in_child(listen_fds)
        finally:
            go.set()
            holder.join()

        assert re.fullmatch(self.text(tcp), said)


def missing(what: str) -> NoReturn:
    """Skip for want of something, or fail where nothing may be skipped."""
    if os.environ.get("SDLISTEN_NO_SKIP") == "1":
        pytest.fail(f"{what}, and SDLISTEN_NO_SKIP=1")
    pytest.skip(what)


MEASURE = """
import json, os, resource, socket, sys, time
from sdlisten.activation import Activation

def passed(number):
    sock = socket.socket()
    sock.bind((f"127.77.{number >> 8}.{number & 255}", 0))
    sock.listen(1)
    return sock

count = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
sockets = [passed(number) for number in range(count)]
assert [sock.fileno() for sock in sockets] == list(range(3, 3 + count))
for sock in sockets:
    sock.detach()
names = ":".join(f"name{number % 7}" for number in range(count))
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}
best = float("inf")
for _ in range(3):
    start = time.process_time()
    found = Activation.from_environ(environ)
    taken = [listener for number in range(7) for listener in found.take_listeners(f"name{number}")]
    best = min(best, time.process_time() - start)
    assert len(taken) == count and found.remaining == ()
    for listener in taken:
        listener.detach().detach()
print(best / count)
"""


def test_ten_thousand_listeners_in_linear_time(capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 passed listeners cost each at most three times what each of 1,000 costs."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 10_010:
        missing(f"only {hard} descriptors may be open: ulimit -Hn")
    seconds = {}
    for count in (1_000, 10_000):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(count)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seconds[count] = float(done.stdout)
    with capsys.disabled():
        figures = ", ".join(f"{each * 1e6:.1f} µs at {count:,}" for count, each in seconds.items())
        sys.stdout.write(f"\nadopting costs per socket {figures}\n")

    assert seconds[10_000] <= 3 * seconds[1_000]


def test_the_public_names_are_these() -> None:
    """Activation and listen_fds are the package's own."""
    assert sdlisten.Activation is Activation
    assert sdlisten.listen_fds is listen_fds
