"""listen(): every row of the table in the design, and every error text with its values."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from sdlisten import (
    Activation,
    AddressError,
    Adopt,
    AlreadyTakenError,
    DescriptorError,
    ListenEnvironmentError,
    NameNotFoundError,
    NotActivatedError,
    Origin,
    listen,
    listen_fds,
)
from sdlisten.binding import bind_sockets
from sdlisten.descriptor import listen_queue

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    # conftest.Passing: test modules are not a package, and cannot import each other.
    Passing = Callable[..., Any]
    Unchanged = Callable[[], contextlib.AbstractContextManager[None]]


def word(sock: socket.socket) -> str:
    """Write where an IPv4 or unix socket listens."""
    name = sock.getsockname()
    return name if isinstance(name, str) else f"{name[0]}:{name[1]}"


def numbers(listeners: tuple[object, ...]) -> list[int]:
    """Return the descriptors of listeners."""
    return [listener.fileno() for listener in listeners]  # type: ignore[attr-defined]


@pytest.mark.parametrize("adopt", [Adopt.AUTO, Adopt.NEVER])
def test_binds_if_nothing_was_passed(passing: Passing, adopt: Adopt) -> None:
    """With nothing passed and an address, AUTO and NEVER bind: non-blocking, close-on-exec, named."""
    passing()

    with listen("127.0.0.1:0", name="http", adopt=adopt, backlog=33) as (listener,):
        assert (listener.origin, listener.name) == (Origin.BOUND, "http")
        assert not os.get_blocking(listener.fileno())
        assert not os.get_inheritable(listener.fileno())
        assert listener.socket.proto == socket.IPPROTO_TCP
        assert listener.backlog == 33


@pytest.mark.parametrize("adopt", [Adopt.AUTO, Adopt.NEVER])
def test_nothing_passed_and_nothing_to_bind(passing: Passing, unchanged: Unchanged, adopt: Adopt) -> None:
    """With nothing passed and no address there is nothing to do, and the error says how to be activated."""
    passing()

    with unchanged(), pytest.raises(NotActivatedError) as caught:
        listen(name="http", adopt=adopt)

    assert str(caught.value) == (
        "no sockets were passed (LISTEN_FDS is not set), and there is no address to bind. "
        "Start it through its unit: systemctl start http.socket; "
        "to try it: systemd-socket-activate -l 8080 --fdname=http COMMAND."
    )
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("by_environment", [False, True])
def test_required_but_nothing_passed(
    passing: Passing, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch, *, by_environment: bool
) -> None:
    """REQUIRE, or AUTO under SDLISTEN_REQUIRE=1, does not bind."""
    passing()
    if by_environment:
        monkeypatch.setenv("SDLISTEN_REQUIRE", "1")

    with unchanged(), pytest.raises(NotActivatedError) as caught:
        listen("8080", name="http", adopt=Adopt.AUTO if by_environment else Adopt.REQUIRE)

    assert str(caught.value) == (
        "no sockets were passed (LISTEN_FDS is not set). "
        "Start it through its unit: systemctl start http.socket; "
        "to try it: systemd-socket-activate -l 8080 --fdname=http COMMAND."
    )


@pytest.fixture
def in_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Let this process find itself in a cgroup, and a pid in SYSTEMD_EXEC_PID."""

    def place(cgroup: str, exec_pid: int) -> None:
        (tmp_path / "cgroup").write_text(f"1:name=other:/\n0::{cgroup}\n")
        monkeypatch.setattr("sdlisten.adopt_or_bind._CGROUP", str(tmp_path / "cgroup"))
        monkeypatch.setenv("SYSTEMD_EXEC_PID", str(exec_pid))

    return place


def start_command() -> str:
    """Return the command that an error proposes to start us with."""
    with pytest.raises(NotActivatedError) as caught:
        listen("8080", name="http", adopt=Adopt.REQUIRE)
    return str(caught.value).partition("Start it through its unit: ")[2].partition(";")[0]


@pytest.mark.parametrize("started", [os.getpid, os.getppid], ids=["directly", "by a wrapper"])
def test_error_names_our_socket(
    passing: Passing, in_service: Callable[[str, int], None], started: Callable[[], int]
) -> None:
    """In a service, also behind a wrapper, the command in an error starts the socket called like it."""
    passing()
    in_service("/system.slice/hello.service", started())

    assert start_command() == "systemctl start hello.socket"


def test_error_names_our_units(
    passing: Passing, in_service: Callable[[str, int], None], tcp: socket.socket
) -> None:
    """In a service the commands in an error can be run as they stand, whatever the socket is named."""
    passing(tcp, names=["wrong"])
    in_service("/system.slice/hello.service", os.getpid())

    with pytest.raises(NameNotFoundError) as caught:
        listen("8080", name="http")
    mend = "systemctl daemon-reload; systemctl stop hello.service; systemctl restart hello.socket."
    assert str(caught.value).endswith(mend)


def test_error_names_our_service_and_its_socket(
    passing: Passing, in_service: Callable[[str, int], None], tcp: socket.socket, unix: socket.socket
) -> None:
    """The service is ours, the socket the one that was passed, also where they are not called alike."""
    passing(tcp, unix, names=["web.socket", "web.socket"])
    in_service("/system.slice/hello.service", os.getpid())

    with pytest.raises(NameNotFoundError) as caught:
        listen("8080", name="http")

    assert str(caught.value).endswith("systemctl stop hello.service; systemctl restart web.socket.")


def test_error_in_a_user_service(passing: Passing, in_service: Callable[[str, int], None]) -> None:
    """In a service of a user the commands are for the manager of that user."""
    passing()
    in_service("/user.slice/user-1000.slice/user@1000.service/app.slice/hello.service", os.getpid())

    assert start_command() == "systemctl --user start hello.socket"


@pytest.mark.parametrize(
    ("cgroup", "exec_pid"),
    [
        pytest.param("/system.slice/cron.service", 1, id="job of another service"),
        pytest.param("/user.slice/user-1000.slice/session-3.scope", os.getpid(), id="session"),
    ],
)
def test_error_outside_of_a_service(
    passing: Passing, in_service: Callable[[str, int], None], cgroup: str, exec_pid: int
) -> None:
    """What was not started by a service of its own does not take another one's unit for its own."""
    passing()
    in_service(cgroup, exec_pid)

    assert start_command() == "systemctl start http.socket"


def test_error_without_proc(
    passing: Passing, in_service: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc is missing the error comes all the same."""
    passing()
    in_service("/", os.getpid())
    monkeypatch.setattr("sdlisten.adopt_or_bind._CGROUP", "/nonexistent")

    assert start_command() == "systemctl start http.socket"


def test_required_and_meant_for_another(passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
    """A wrapper that does not exec is named as the reason: LISTEN_PID is its pid, not ours."""
    passing(tcp, environ={"LISTEN_PID": str(os.getppid())})

    with unchanged(), pytest.raises(NotActivatedError) as caught:
        listen("8080", adopt=Adopt.REQUIRE)

    why = f"LISTEN_FDS=1 is meant for pid {os.getppid()}, this is {os.getpid()}"
    assert f"({why}: a wrapper started us without exec)" in str(caught.value)


def test_address_in_use_and_meant_for_another(
    passing: Passing, tcp: socket.socket, unchanged: Unchanged
) -> None:
    """A wrapper that does not exec is named in a note too when binding finds the address in use."""
    passing(tcp, environ={"LISTEN_PID": str(os.getppid())})

    with unchanged(), pytest.raises(OSError, match="in use") as caught:
        listen(word(tcp))

    notes = "\n".join(caught.value.__notes__)
    assert "a wrapper started us without exec" in notes
    assert "start through the unit" in notes


def test_address_in_use(passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
    """An address in use is an OSError, with a note for operators that names no wrapper if there was none."""
    passing()

    with unchanged(), pytest.raises(OSError, match="in use") as caught:
        listen(word(tcp))

    assert caught.value.errno == errno.EADDRINUSE
    assert "wrapper" not in "".join(caught.value.__notes__)


def test_require_by_environment_has_two_values(passing: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDLISTEN_REQUIRE is 1, 0 or nothing; anything else may have meant either."""
    passing()
    monkeypatch.setenv("SDLISTEN_REQUIRE", "yes")
    with pytest.raises(ListenEnvironmentError, match=r"SDLISTEN_REQUIRE='yes': expected 1"):
        listen("127.0.0.1:0")
    monkeypatch.setenv("SDLISTEN_REQUIRE", "0")

    listen("127.0.0.1:0").close()


def test_never_binds_beside_what_was_passed(passing: Passing, tcp: socket.socket) -> None:
    """NEVER binds, and what was passed stays open, close-on-exec, for others to take."""
    passing(tcp, names=["http"])

    with listen("127.0.0.1:0", name="http", adopt=Adopt.NEVER) as (listener,):
        assert Origin.BOUND is listener.origin
        assert not os.get_inheritable(3)
        assert "LISTEN_FDS" not in os.environ

    Activation.current().take_listeners("http").close()


@pytest.mark.parametrize("adopt", list(Adopt))
def test_accepted_connection_is_not_for_listen(
    passing: Passing, tcp: socket.socket, unchanged: Unchanged, adopt: Adopt
) -> None:
    """The one connection of an Accept=yes unit is refused in words that name both ways to take it."""
    with socket.create_connection(tcp.getsockname()) as client, tcp.accept()[0] as served:
        passing(served, names=["connection"])
        with unchanged(), pytest.raises(DescriptorError) as caught:
            listen("8080", adopt=adopt)

    assert caught.value.fd == 3
    for needed in ("serve()", "take_sockets('connection')", "Accept=yes", "fd 3 'connection'"):
        assert needed in str(caught.value)
    assert client is not served


def test_adopts_by_name(passing: Passing, tcp: socket.socket, unix: socket.socket) -> None:
    """All listeners with the name are adopted, whatever their address; the others stay."""
    with socket.create_server(("127.0.0.1", 0), backlog=44) as second:
        passing(tcp, unix, second, names=["http", "admin", "http"])

        with listen("8080", name="http") as listeners:
            assert numbers(listeners) == [3, 5]
            assert [listener.backlog for listener in listeners] == [77, 44]
            assert {Origin.ADOPTED} == {listener.origin for listener in listeners}
            assert [found.fd for found in Activation.current().remaining] == [4]

        Activation.current().close_remaining()
    assert listen_queue(tcp.fileno()) == (0, 77)


def test_adopts_by_the_name_of_the_unit(passing: Passing, tcp: socket.socket, unix: socket.socket) -> None:
    """Without FileDescriptorName= systemd names a socket after its unit: 'hello' finds 'hello.socket'."""
    passing(tcp, unix, names=["other.socket", "hello.socket"])

    with listen("8080", name="hello") as listeners:
        assert numbers(listeners) == [4]

    Activation.current().close_remaining()


@pytest.mark.parametrize("name", ["http", None])
def test_adopts_unnamed_by_address(
    passing: Passing, tcp: socket.socket, unix: socket.socket, name: str | None
) -> None:
    """Of unnamed sockets the one at the wanted address is adopted, also if a name was asked for."""
    passing(tcp, unix, names=["hello.socket", "hello.socket"])

    with listen(word(unix), name=name) as listeners:
        assert numbers(listeners) == [4]

    Activation.current().close_remaining()


def test_adopts_the_only_endpoint(passing: Passing, tcp: socket.socket) -> None:
    """One unnamed endpoint is meant even if its port is another than the program's default."""
    passing(tcp)

    with listen("8080", name="http") as (listener,):
        assert (3, "unknown", word(tcp)) == (listener.fileno(), listener.name, listener.address)


def test_adopts_one_port_of_both_families(passing: Passing) -> None:
    """A v6-only and an IPv4 socket with one port are one endpoint."""
    # It tries again where the port that one family got is taken in the other.
    one, other = bind_sockets(0)
    with one, other:
        passing(one, other, names=["x.socket", "x.socket"])

        with listen("8080") as listeners:
            assert numbers(listeners) == [3, 4]


def test_adopts_one_named_group_without_a_name(
    passing: Passing, tcp: socket.socket, unix: socket.socket
) -> None:
    """Who asks for no name gets a named group by its address."""
    passing(tcp, unix, names=["http", "admin"])

    with listen(word(unix)) as listeners:
        assert numbers(listeners) == [4]

    Activation.current().close_remaining()


def test_adopts_the_only_named_group_without_a_name(passing: Passing, tcp: socket.socket) -> None:
    """Who asks for no name gets the only group there is, as one endpoint."""
    passing(tcp, names=["http"])

    with listen() as listeners:
        assert numbers(listeners) == [3]


def test_does_not_guess_the_transport(passing: Passing, unix: socket.socket, unchanged: Unchanged) -> None:
    """The only endpoint is not meant if the program asks for another transport; nothing is bound."""
    passing(unix)

    with unchanged(), pytest.raises(NameNotFoundError):
        listen("8080")


def test_does_not_take_another_name(passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
    """Who asks for a name does not get a socket that has another one, not even the only one."""
    passing(tcp, names=["admin"])

    with unchanged(), pytest.raises(NameNotFoundError) as caught:
        listen(word(tcp), name="http")

    assert f"Passed: fd 3 'admin' {word(tcp)}. Wanted: name 'http', else address {word(tcp)}." in str(
        caught.value
    )


def test_none_fits(passing: Passing, unix: socket.socket, unchanged: Unchanged) -> None:
    """The error lists what was passed, what was wanted, and what to write into which unit."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as dual:
        port = dual.getsockname()[1]
        passing(dual, unix, names=["hello.socket", "hello.socket"])
        with unchanged(), pytest.raises(NameNotFoundError) as caught:
            listen("8080", name="http")

    assert (
        f"no passed socket is named 'http'. Passed: fd 3 'hello.socket' [::]:{port}, fd 4 'hello.socket' "
        f"{unix.getsockname()}. Wanted: name 'http', else address 8080. Put FileDescriptorName=http into the "
        f".socket unit that has ListenStream={port}, then: systemctl daemon-reload; "
        f"systemctl stop hello.service; systemctl restart hello.socket."
    ) == str(caught.value)


@pytest.mark.parametrize(
    ("address", "headline"),
    [("8080", "no passed socket is at address 8080. "), (None, "no passed socket is the only endpoint. ")],
)
def test_none_fits_without_a_name(
    passing: Passing, tcp: socket.socket, unix: socket.socket, address: str | None, headline: str
) -> None:
    """Without a name the error says to give one and to ask for it."""
    passing(tcp, unix, names=["a", "b"])

    with pytest.raises(NameNotFoundError) as caught:
        listen(address)

    assert str(caught.value).startswith(headline)
    assert "Put FileDescriptorName=NAME into the .socket unit that has ListenStream=" in str(caught.value)
    assert "and ask for that name" in str(caught.value)


def test_datagram_socket_is_something(passing: Passing, udp: socket.socket, unchanged: Unchanged) -> None:
    """A passed socket that does not listen means activation: there is no silent bind beside it."""
    passing(udp, names=["dns"])

    with unchanged(), pytest.raises(NameNotFoundError, match="fd 3 'dns' datagram socket"):
        listen("127.0.0.1:0")


def test_files_are_nothing(passing: Passing) -> None:
    """Files, FIFOs and memfds are no sockets: beside them alone a program binds."""
    memfd = os.memfd_create("state")
    try:
        passing(memfd, names=["config"])
    finally:
        os.close(memfd)

    with listen("127.0.0.1:0") as (listener,):
        assert Origin.BOUND is listener.origin

    Activation.current().close_remaining()


@pytest.mark.parametrize("name", ["stored", "sdlisten.f.http", "sdlisten.c.0"])
def test_stored_descriptors_are_nothing(passing: Passing, tcp: socket.socket, name: str) -> None:
    """What comes back from the fd store does not count as passed: the daemon binds again and again."""
    passing(tcp, names=[name])

    with listen("127.0.0.1:0", name="http") as (listener,):
        assert Origin.BOUND is listener.origin

    Activation.current().close_remaining()


def test_second_taker_is_told_who_was_first(
    passing: Passing, tcp: socket.socket, unchanged: Unchanged
) -> None:
    """What fits by name and was taken is not bound instead."""
    passing(tcp, names=["http"])

    with listen("8080", name="http"), unchanged(), pytest.raises(AlreadyTakenError) as caught:
        listen("127.0.0.1:0", name="http")

    first, second = "listen('8080', name='http')", "listen('127.0.0.1:0', name='http')"
    assert f"fd 3 'http' {word(tcp)} was taken before, by {first}; {second} comes second" == str(caught.value)


def test_the_same_call_twice_does_not_bind(passing: Passing, tcp: socket.socket) -> None:
    """The only endpoint fits a first call whatever its address; a second equal call must not bind."""
    passing(tcp)

    with listen("8080"), pytest.raises(AlreadyTakenError):
        listen("8080")


def test_another_port_binds_once_all_are_taken(passing: Passing, tcp: socket.socket) -> None:
    """With everything passed taken, a request that none of them fits is the program's own business."""
    passing(tcp, names=["http"])

    with listen("8080", name="http"), listen("127.0.0.1:0", name="metrics") as (metrics,):
        assert Origin.BOUND is metrics.origin


def test_required_again_once_all_are_taken(passing: Passing, tcp: socket.socket) -> None:
    """REQUIRE does not bind when all that was passed is taken; the error lists it."""
    passing(tcp, names=["http"])

    taken = r"fd 3 'http' .* are taken or no sockets"
    with listen("8080", name="http"), pytest.raises(NotActivatedError, match=taken):
        listen("9090", name="metrics", adopt=Adopt.REQUIRE)


def test_the_last_endpoint_is_not_guessed(passing: Passing, tcp: socket.socket, unix: socket.socket) -> None:
    """Once something was taken, being the only one left proves nothing."""
    passing(tcp, unix, names=["http", "x.socket"])

    with listen("8080", name="http"), pytest.raises(NameNotFoundError):
        listen("/run/other.sock", name="admin")

    Activation.current().close_remaining()


def test_listen_fds_takes_what_is_left(passing: Passing, tcp: socket.socket, udp: socket.socket) -> None:
    """listen_fds() after listen() gives the rest, and nothing the second time."""
    passing(tcp, udp, names=["http", "dns"])

    with listen(name="http"):
        (rest,) = listen_fds()
        assert (rest.fd, rest.name) == (4, "dns")
        assert listen_fds() == ()
        os.close(rest.fd)


def in_fork(action: Callable[[], str]) -> str:
    """Return what a function returns in a forked child, or its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            answer = action()
        except BaseException as error:  # noqa: BLE001 - it is the answer
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_forked_after_the_claim(passing: Passing, tcp: socket.socket) -> None:
    """A child forked after the claim neither adopts what its parent has nor binds beside it; NEVER binds."""
    passing(tcp, names=["http"])

    with listen(name="http"):
        answer = in_fork(lambda: str(listen("127.0.0.1:0", name="metrics")))
        assert answer.startswith("AlreadyTakenError: fd 3 'http'")
        assert f"passed to pid {os.getpid()}, which forked this one" in answer
        assert "bound" in in_fork(lambda: str(listen("127.0.0.1:0", adopt=Adopt.NEVER)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_forked_before_the_claim(passing: Passing, tcp: socket.socket) -> None:
    """A child forked before the claim, which has its parent's variables, is told the same; NEVER binds."""
    passing(tcp)

    for address in (word(tcp), "127.0.0.1:0"):
        answer = in_fork(lambda address=address: str(listen(address)))  # type: ignore[misc]
        assert f"passed to pid {os.getpid()}, which forked this one" in answer
    assert "bound" in in_fork(lambda: str(listen("127.0.0.1:0", adopt=Adopt.NEVER)))
    with listen() as (listener,):
        assert listener.fileno() == 3


def test_two_threads_adopt_once(passing: Passing, tcp: socket.socket) -> None:
    """Of two threads one adopts, and the other is told."""
    results: list[object] = []
    start = threading.Barrier(2)

    def ask() -> None:
        start.wait(10)
        try:
            results.append(listen("8080", name="http"))
        except AlreadyTakenError as error:
            results.append(error)

    passing(tcp, names=["http"])
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    adopted = [result for result in results if isinstance(result, tuple)]
    assert len(adopted) == 1, results
    assert len(results) == 2
    adopted[0].close()  # type: ignore[attr-defined]


def test_binds_a_port_for_both_families(passing: Passing) -> None:
    """A bare port binds one dual-stack socket, as systemd does."""
    passing()

    with listen(0) as (listener,):
        assert listener.socket.family == socket.AF_INET6
        port = listener.sockname[1]  # type: ignore[index]
        assert str(port) == listener.address
        socket.create_connection(("127.0.0.1", port)).close()
        socket.create_connection(("::1", port)).close()


@pytest.mark.parametrize("address", ["[::]:0", "[::1]:0", "localhost:0"])
def test_binds_tcp_words(passing: Passing, address: str) -> None:
    """Other TCP words bind what they say."""
    passing()

    with listen(address) as listeners:
        port = listeners[0].sockname[1]  # type: ignore[index]
        assert {port} == {listener.sockname[1] for listener in listeners}  # type: ignore[index]
        socket.create_connection(("127.0.0.1" if address != "[::1]:0" else "::1", port)).close()


def test_binds_with_a_scope(passing: Passing) -> None:
    """A scope is part of the address that is bound."""
    passing()
    index = socket.if_nametoindex("lo")

    with listen("[::1]:0%lo") as (listener,):
        assert listener.sockname[0] == "::1"  # type: ignore[index]
    assert index > 0


def test_binds_and_removes_a_path(passing: Passing, tmp_path: Path) -> None:
    """A path is bound with its mode, and removed by close() in the process that bound it alone."""
    passing()
    path = tmp_path / "x.sock"

    with listen(str(path), mode=0o640) as (listener,):

        def close() -> str:
            listener.close()
            return "closed"

        assert str(path) == listener.address
        assert path.stat().st_mode & 0o777 == 0o640
        assert (in_fork(close), path.exists()) == ("closed", True)

    assert not path.exists()


def test_binds_an_abstract_name(passing: Passing) -> None:
    """An abstract name is bound without a file."""
    passing()

    with listen(f"@sdlisten-test-{os.getpid()}") as (listener,):
        assert f"\0sdlisten-test-{os.getpid()}".encode() == listener.sockname
        assert f"@sdlisten-test-{os.getpid()}" == listener.address


def test_binds_a_vm_socket(passing: Passing) -> None:
    """A VM socket binds where the kernel has them, and else fails as the kernel says."""
    passing()
    try:
        with socket.socket(socket.AF_VSOCK):
            pass
    except OSError as error:
        with pytest.raises(OSError, match=error.strerror or ""):
            listen("vsock::4711")
    else:
        with listen("vsock::4711") as (listener,):
            assert listener.address == "vsock::4711"


def test_reuse_port(passing: Passing, unchanged: Unchanged, tmp_path: Path) -> None:
    """reuse_port lets two listeners have one port, and is refused where it means nothing."""
    passing()

    with listen("127.0.0.1:0", reuse_port=True) as (first,):
        listen(first.address, reuse_port=True).close()
    with unchanged(), pytest.raises(ValueError, match="reuse_port is for TCP, not for /"):
        listen(str(tmp_path / "x.sock"), reuse_port=True)


def test_bad_arguments_change_nothing(passing: Passing, tcp: socket.socket, unchanged: Unchanged) -> None:
    """What cannot be read is refused before anything is claimed."""
    passing(tcp)

    with unchanged(), pytest.raises(AddressError):
        listen("nonsense")
    with unchanged(), pytest.raises(ListenEnvironmentError, match="cannot be a FileDescriptorName"):
        listen("8080", name="a:b")
    with unchanged(), pytest.raises(ValueError, match="'sometimes' is not a valid Adopt"):
        listen("8080", adopt="sometimes")  # type: ignore[arg-type]
