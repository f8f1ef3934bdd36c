"""What systemd passes, and what a daemon makes of it through the public API: see apps/probe.py.

The services of `answers` are started together and asked once; most tests look at what they said.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from . import apps

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

    from .machine import Machine

PROBE = " ".join(apps.command("probe"))
BACKLOG = 77
MARK = "/tmp/mark"  # noqa: S108 -- in the machine


class Kind(NamedTuple):
    """A kind of listening socket: what its unit says; how a daemon calls it, and how a client does."""

    unit: str
    address: str
    client: str
    family: str
    type: str = "SOCK_STREAM"


KINDS = {
    "tcp-v4": Kind("ListenStream=127.0.0.1:7001", "127.0.0.1:7001", "127.0.0.1:7001", "AF_INET"),
    "tcp-v6": Kind("ListenStream=[::1]:7002", "[::1]:7002", "[::1]:7002", "AF_INET6"),
    "tcp-dual": Kind("ListenStream=7003", "7003", "[::1]:7003", "AF_INET6"),
    "unix": Kind("ListenStream=/run/unix.sock", "/run/unix.sock", "/run/unix.sock", "AF_UNIX"),
    "abstract": Kind("ListenStream=@abstract", "@abstract", "@abstract", "AF_UNIX"),
    "seqpacket": Kind(
        "ListenSequentialPacket=/run/seq.sock",
        address="/run/seq.sock",
        client="seqpacket:/run/seq.sock",
        family="AF_UNIX",
        type="SOCK_SEQPACKET",
    ),
}
# Name of a .socket unit to what is in its [Socket].
SOCKETS = {
    **{name: f"{kind.unit}\nFileDescriptorName=web" for name, kind in KINDS.items()},
    "unnamed": "ListenStream=127.0.0.1:7010",
    "executed": "ListenStream=127.0.0.1:7011",
    "builtin": "ListenStream=127.0.0.1:7012",
    "web": "ListenStream=127.0.0.1:7020\nFileDescriptorName=web\nService=two.service",
    "admin": """
        ListenStream=127.0.0.1:7021
        ListenStream=/run/admin
        FileDescriptorName=admin
        Service=two.service
    """,
    "instance@": "ListenStream=/run/instance-%i",
    "mixed": """
        ListenDatagram=127.0.0.1:7031
        ListenFIFO=/run/mixed.fifo
        ListenStream=127.0.0.1:7030
        ListenNetlink=route 1361
        ListenMessageQueue=/mixed
        FileDescriptorName=mixed
    """,
    "file": "ListenStream=127.0.0.1:7032\nFileDescriptorName=web",
    "accept": "ListenStream=127.0.0.1:7040\nAccept=yes",
    "jail": "ListenStream=/run/jail",
}
# Name of a .service unit to what is in its [Service].
SERVICES = {
    **dict.fromkeys(KINDS, f"ExecStart={PROBE} -l web=9"),
    "unnamed": f"ExecStart={PROBE} -l web=127.0.0.1:7010",
    "executed": f"ExecStart=/usr/bin/env A=B {PROBE}",
    "builtin": f"Environment=SDLISTEN_BACKEND=builtin\nExecStart={PROBE}",
    "two": f"Sockets=web.socket admin.socket\nExecStart={PROBE} -l web=9 -l admin=10",
    "instance@": f"ExecStart={PROBE} -l /run/instance-%i",
    "mixed": f"ExecStart={PROBE} -l mixed=9",
    "file": f"OpenFile={MARK}:config:read-only\nExecStart={PROBE} -l web=9",
    "accept@": f"ExecStart={PROBE} -l web=9",
    "jail": f"""
        RootDirectory=/srv/jail
        BindReadOnlyPaths=/usr /opt
        MountAPIVFS=yes
        DynamicUser=yes
        PrivateTmp=yes
        ExecStart={PROBE} -l /run/jail --look {MARK} --look /run/jail --look /srv
    """,
}
INSTANCES = ("a", "b")
ADDRESSES = (
    *("datagram:127.0.0.1:7031", "fifo:/run/mixed.fifo"),
    *(kind.client for kind in KINDS.values()),
    *("127.0.0.1:7003", "127.0.0.1:7010", "127.0.0.1:7011", "127.0.0.1:7012"),
    *("127.0.0.1:7020", "127.0.0.1:7021", "/run/admin", "/run/instance-a", "/run/instance-b"),
    *("127.0.0.1:7030", "127.0.0.1:7032", "127.0.0.1:7040", "127.0.0.1:8080", "/run/jail", "127.0.0.1:7050"),
)
# What a Debian program needs to run in there; /usr is mounted.
MAKE_JAIL = """\
mkdir -p /srv/jail && cd /srv/jail && mkdir usr opt run proc sys dev tmp var &&
ln -s usr/bin bin && ln -s usr/lib lib && if [ -e /lib64 ]; then ln -s usr/lib64 lib64; fi
"""
RUN_TRANSIENT = [
    "systemd-run",
    "--unit=transient",
    "--socket-property=ListenStream=127.0.0.1:7050",
    "--socket-property=FileDescriptorName=web",
    f"--socket-property=Backlog={BACKLOG}",
    *apps.command("probe", "-l", "web=9"),
]


def socket_unit(text: str) -> str:
    """Return a .socket unit."""
    return f"[Socket]\nBacklog={BACKLOG}\n{text}\n"


def service_unit(text: str) -> str:
    """Return a .service unit in which python-systemd has to agree on what was passed."""
    return f"[Service]\nEnvironment=SDLISTEN_BACKEND=libsystemd\n{text}\n"


@pytest.fixture(scope="module")
def answers(machine: Machine) -> Iterator[Mapping[str, Any]]:
    """What the daemons say, by the address at which a client asked."""
    sockets = {f"{name}.socket": socket_unit(text) for name, text in SOCKETS.items()}
    services = {f"{name}.service": service_unit(text) for name, text in SERVICES.items()}
    hello = f"[Service]\nExecStart=\nExecStart={PROBE} -l http=9 --look {MARK}\n"
    try:
        with machine.cleanup():
            apps.install(machine)
            machine.put({MARK: "mark"})
            machine.sh(MAKE_JAIL)
            machine.units(
                *("hello.socket", "hello.service"),
                extra={**sockets, **services, "hello.service.d/probe.conf": hello},
            )
            templates = [f"instance@{instance}.socket" for instance in INSTANCES]
            machine.systemctl("start", "hello.socket", *templates, *(sockets.keys() - {"instance@.socket"}))
            machine.sh(RUN_TRANSIENT)
            found = apps.ask(machine, *ADDRESSES)
            if not all(isinstance(answer, dict) for answer in found.values()):
                sys.stderr.write(machine.journal("*.service"))
            yield found
    finally:
        machine.sh("rm -rf --one-file-system /srv/jail")


def the_listener(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the only listener in a report."""
    (listener,) = report["listeners"]
    found: Mapping[str, Any] = listener
    return found


@pytest.mark.parametrize("name", KINDS)
def test_kind(answers: Mapping[str, Any], name: str) -> None:
    """Each kind of listener is adopted by name, where it is, as it is, and children inherit no LISTEN_*."""
    kind = KINDS[name]
    report = answers[kind.client]

    listener = dict(the_listener(report))
    assert listener.pop("queued") >= 1  # who asks
    assert listener == {
        "fd": 3,
        "blocking": False,
        "inheritable": False,
        "name": "web",
        "origin": "adopted",
        "address": kind.address,
        "family": kind.family,
        "type": kind.type,
        "backlog": BACKLOG,
    }
    assert report["variables"] == report["inherited variables"] == report["left"] == []


def test_dual_stack(answers: Mapping[str, Any]) -> None:
    """One socket serves clients of both families."""
    assert answers["127.0.0.1:7003"] == answers["[::1]:7003"]


def test_unnamed(answers: Mapping[str, Any]) -> None:
    """A socket that nobody named is called after its unit, and found by its address."""
    listener = the_listener(answers["127.0.0.1:7010"])

    assert (listener["name"], listener["address"]) == ("unnamed.socket", "127.0.0.1:7010")


def test_wrapper_that_executes(answers: Mapping[str, Any]) -> None:
    """Behind a wrapper that execs, the pid is the one that systemd has started, and all is as without it."""
    assert the_listener(answers["127.0.0.1:7011"])["name"] == "executed.socket"


def test_two_socket_units(answers: Mapping[str, Any]) -> None:
    """The sockets of two units are told apart by name, in whatever order systemd passes them."""
    report = answers["127.0.0.1:7020"]

    assert report == answers["127.0.0.1:7021"] == answers["/run/admin"]
    adopted = [(listener["name"], listener["address"]) for listener in report["listeners"]]
    # In the order in which the daemon asked.
    assert adopted == [("web", "127.0.0.1:7020"), ("admin", "127.0.0.1:7021"), ("admin", "/run/admin")]
    assert sorted(listener["fd"] for listener in report["listeners"]) == [3, 4, 5]


def test_template_instances(answers: Mapping[str, Any]) -> None:
    """Each instance of a template has a process and a socket of its own, called after the instance."""
    reports = {instance: answers[f"/run/instance-{instance}"] for instance in INSTANCES}

    adopted = {instance: the_listener(report) for instance, report in reports.items()}
    assert {instance: (found["name"], found["address"]) for instance, found in adopted.items()} == {
        instance: (f"instance@{instance}.socket", f"/run/instance-{instance}") for instance in INSTANCES
    }
    assert reports["a"]["pid"] != reports["b"]["pid"]


def test_descriptors_that_do_not_listen(answers: Mapping[str, Any]) -> None:
    """Of one name the listener is adopted, and the others stay with their numbers, flags and contents."""
    report = answers["127.0.0.1:7030"]

    listener = the_listener(report)
    assert listener["address"] == "127.0.0.1:7030"
    assert report["passed"][listener["fd"] - 3]["kind"] == "listener"
    left = {found["kind"]: (found["name"], found["blocking"], found["start"]) for found in report["left"]}
    assert left == {
        "datagram socket": ("mixed", True, "word"),
        "FIFO": ("mixed", True, "word"),
        "socket": ("mixed", True, ""),  # netlink
        "message queue": ("mixed", True, ""),
    }
    assert {found["fd"] for found in report["left"]} == {3, 4, 5, 6, 7} - {listener["fd"]}
    assert not any(found["inheritable"] for found in report["passed"])


@pytest.mark.systemd(since=253)
def test_open_file(answers: Mapping[str, Any]) -> None:
    """A file of OpenFile= stays beside the listener, to be read."""
    report = answers["127.0.0.1:7032"]

    assert the_listener(report)["name"] == "web"
    (file,) = report["left"]
    assert (file["name"], file["kind"], file["start"]) == ("config", "file", "mark")


def test_accepted_connection(answers: Mapping[str, Any]) -> None:
    """Under Accept=yes listen() says what to do, and take_sockets('connection') gives the connection."""
    report = answers["127.0.0.1:7040"]

    assert "take_sockets('connection')" in report["error"]
    assert "serve()" in report["error"]
    (passed,) = report["passed"]
    # Blocking as it came: its other holder might be stdin of somebody.
    assert passed == {
        "fd": 3,
        "blocking": True,
        "inheritable": False,
        "name": "connection",
        "kind": "connection",
        "stored": False,
    }
    assert report["listeners"] == report["variables"] == report["inherited variables"] == []


def test_hardened_unit(answers: Mapping[str, Any]) -> None:
    """Under all that hello.service says, a user that exists only now adopts the socket and its backlog."""
    report = answers["127.0.0.1:8080"]

    listener = the_listener(report)
    assert (listener["name"], listener["address"], listener["backlog"]) == ("http", "8080", 4096)
    assert 61184 <= report["uid"] <= 65519  # DynamicUser=
    assert report["sees"] == []  # PrivateTmp=


def test_root_directory(answers: Mapping[str, Any]) -> None:
    """A path outside of the daemon's root is matched as text, and its socket serves."""
    report = answers["/run/jail"]

    assert the_listener(report)["address"] == "/run/jail"
    assert report["sees"] == []


def test_transient_unit(answers: Mapping[str, Any]) -> None:
    """What `systemd-run --socket-property=` makes is as good as a unit in a file."""
    listener = the_listener(answers["127.0.0.1:7050"])

    assert (listener["name"], listener["address"], listener["backlog"]) == ("web", "127.0.0.1:7050", BACKLOG)


def test_second_judge(answers: Mapping[str, Any]) -> None:
    """python-systemd was asked, and agreed, but where SDLISTEN_BACKEND=builtin did without."""
    judged = {address: report["libsystemd"] for address, report in answers.items()}

    assert {address for address, used in judged.items() if not used} == {"127.0.0.1:7012"}
    assert the_listener(answers["127.0.0.1:7012"])["name"] == "builtin.socket"


def test_pidfd(answers: Mapping[str, Any], machine: Machine) -> None:
    """LISTEN_PIDFDID is the inode of the daemon's pidfd, from systemd 259 on; before, there is none."""
    for report in answers.values():
        pidfd = report["pidfd"]
        assert pidfd["passed"] == (str(pidfd["own"]) if machine.release.systemd >= 259 else None)


def test_pidfd_of_another_process(machine: Machine) -> None:
    """With a LISTEN_PIDFDID that is not ours nothing is adopted, on every version, and the error says why."""
    apps.install(machine)
    rewritten = f"ExecStart=/usr/bin/env LISTEN_PIDFDID=1 SDLISTEN_REQUIRE=1 {PROBE} -l web=7060"
    machine.units(
        extra={
            "rewritten.socket": socket_unit("ListenStream=127.0.0.1:7060\nFileDescriptorName=web"),
            "rewritten.service": service_unit(f"Type=oneshot\n{rewritten}"),
        }
    )
    machine.sh("systemctl start rewritten.socket; systemctl start rewritten.service", check=False)

    assert machine.show("rewritten.service", "ExecMainStatus") == "78"
    text = "LISTEN_PIDFDID=1 is meant for another process with our pid; ours is "
    assert text in machine.journal("rewritten.service")


TWO_SERVICES = {
    "shared.socket": "[Socket]\nListenStream=7070\nFileDescriptorName=web\nService=first.service\n",
    "control.socket": "[Socket]\nListenStream=7071\nFileDescriptorName=control\nService=first.service\n",
    "first.service": f"""
        [Service]
        Sockets=shared.socket control.socket
        ExecStart={" ".join(apps.command("robbed"))}
    """,
    "second.service": f"[Service]\nSockets=shared.socket\nExecStart={PROBE} -l web=9\n",
    "idle.service": "[Service]\nType=exec\nSockets=shared.socket\nExecStart=/bin/sleep infinity\n",
    "idle-non-blocking.service": """
        [Service]
        Type=exec
        Sockets=shared.socket
        NonBlocking=yes
        ExecStart=/bin/sleep infinity
    """,
}


def order(machine: Machine, word: str) -> socket.socket:
    """Give robbed.py a word, and return the connection on which the answer comes."""
    connection = machine.connect(7071)
    connection.sendall(word.encode())
    return connection


def answer(connection: socket.socket) -> str:
    """Read all that is said on a connection, and close it."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def test_two_services_on_one_socket(machine: Machine) -> None:
    """A socket that systemd makes blocking, for a second service, does not stall the loop of the first."""
    apps.install(machine)
    machine.units(extra=TWO_SERVICES)
    machine.systemctl("start", "shared.socket", "control.socket")
    assert answer(order(machine, "flag")) == "non-blocking"

    machine.systemctl("start", "idle-non-blocking.service")
    assert answer(order(machine, "flag")) == "non-blocking"
    machine.systemctl("start", "idle.service")
    assert answer(order(machine, "flag")) == "blocking"  # systemd, for a service without NonBlocking=yes

    # Somebody else takes the connection that the first one has seen: a blocking accept() would now wait.
    with order(machine, "rob") as robber:
        assert robber.recv(16) == b"go"
        assert answer(machine.connect(7070)) == "robbed"
    assert answer(order(machine, "ping")) == "pong"
    assert answer(order(machine, "flag")) == "non-blocking"

    machine.systemctl("start", "second.service")
    told = {answer(connection)[:7] for connection in [machine.connect(7070) for _ in range(20)]}
    assert told <= {"served", '{"pid":'}
