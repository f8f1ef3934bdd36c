"""One container as an object; `Plain` runs one program, `integration.machine.Machine` has systemd as PID 1.

Both are testcontainers' `DockerContainer` and can do all that it can; start them in a ``with`` statement.
Every wait has a deadline, and its error says what was seen instead.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeVar

from testcontainers.core.container import DockerContainer

from .session import LABEL, SESSION
from .tarball import tarball

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ("Container", "Done", "IPv6", "Plain", "eventually", "merged")

T = TypeVar("T")

# on: addresses of its own, and ::1.
# off: AF_INET6 exists, without any address (net.ipv6.conf.all.disable_ipv6=1).
# absent: socket(AF_INET6) fails with EAFNOSUPPORT, as on a kernel booted with ipv6.disable=1.
IPv6 = Literal["on", "off", "absent"]

NO_AF_INET6 = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 97,  # EAFNOSUPPORT
            "args": [{"index": 0, "value": socket.AF_INET6.value, "op": "SCMP_CMP_EQ"}],
        }
    ],
}


class Done(NamedTuple):
    """A command that has ended: its exit code, and what it wrote to stdout and stderr, in order."""

    code: int
    output: str


def eventually(
    read: Callable[[], T],
    wanted: Callable[[T], object],
    *,
    within: float = 10.0,
    what: str = "the wanted state",
) -> T:
    """Call `read` until its result is `wanted`, and return that result.

    For states that announce themselves to nobody; where there is a byte, a line or an EOF, wait for that.

    Raises:
        AssertionError: Not `within` so many seconds; says what was last seen.
    """
    deadline = time.monotonic() + within
    while not wanted(seen := read()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {within} s; last seen: {seen!r}")
        time.sleep(0.02)
    return seen


class Container(DockerContainer):
    """What `Machine` and `Plain` have in common.

    Args:
        image: A tag from `integration.images`.
        command: PID 1 and its arguments.
        network: The name of an engine's network; with IPv6, for ``ipv6="on"``.
        ipv6: What the container has of IPv6, see `IPv6`.
        env: Environment of PID 1 beside what the image sets.
        options: More options of docker-py's ``containers.create``; lists and mappings add to ours.
    """

    def __init__(
        self,
        image: str,
        command: Sequence[str],
        *,
        network: str = "bridge",
        ipv6: IPv6 = "on",
        env: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        # The limit of one answer of the engine; commands have limits of their own, inside.
        super().__init__(image, docker_client_kw={"timeout": 600})
        self.image = image  # without testcontainers' prefix for images of a registry
        self.with_command(list(command))
        self.with_envs(**(env or {}))
        ours: dict[str, Any] = {"labels": {LABEL: SESSION}, "network": network if ipv6 == "on" else "bridge"}
        if Path("/proc/sys/net/ipv6").exists():
            # The default bridge turns it off, even for ::1.
            ours["sysctls"] = {"net.ipv6.conf.all.disable_ipv6": "0" if ipv6 == "on" else "1"}
        if ipv6 == "absent":
            ours["security_opt"] = [f"seccomp={json.dumps(NO_AF_INET6)}"]
        self.with_kwargs(**merged(ours, options or {}))

    @property
    def ip(self) -> str:
        """The IPv4 address, as the host and other containers reach it."""
        return str(self._network_settings()["IPAddress"])

    @property
    def ip6(self) -> str:
        """The global IPv6 address; empty without one."""
        return str(self._network_settings()["GlobalIPv6Address"])

    @property
    def pid(self) -> int:
        """The pid of its PID 1 on the engine's host; 0 if it does not run."""
        return int(self._inspected()["State"]["Pid"])

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Done:
        """Run a command inside and return how it ended.

        Args:
            command: Words; or a text for the shell.
            user: Who runs it. XDG_RUNTIME_DIR is set to where its user manager listens.
            env: Environment beside the container's.
            timeout: Seconds, after which it is killed.

        Raises:
            TimeoutError: It took longer; says what it had written.
        """
        words = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *_words(command)]
        code, out, _ = self._execute(words, user, env, timeout)
        return Done(code, out)

    def sh(
        self,
        command: str | Sequence[str],
        check: bool = True,
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> str:
        """Run a command inside and return its stdout without the last newline, as ``$(command)`` does.

        Arguments as for `run`.

        Raises:
            AssertionError: The exit code is not 0, and `check` is true; says what stdout and stderr had.
            TimeoutError: See `run`.
        """
        code, out, err = self._execute(_words(command), user, env, timeout)
        if check and code:
            raise AssertionError(f"{command!r} ended with {code}\nstdout: {out}\nstderr: {err}")
        return out.rstrip("\n")

    def python(self, code: str, *arguments: str, user: str = "root", timeout: float = 30.0) -> str:
        """Run Python `code` inside; see `sh`."""
        return self.sh(["python3", "-c", code, *arguments], user=user, timeout=timeout)

    def put(self, files: Mapping[str, str | bytes | Path]) -> None:
        """Write files inside: absolute path to text, bytes, or a path on the host (a file or a whole tree).

        They belong to root, with mode 0644, or 0755 if text or bytes begin with ``#!``. Missing directories
        are made.
        """
        # The engine writes below a tmpfs mount, where nobody inside sees it; so the files take a detour.
        hidden = any(path.startswith(f"{mount}/") for path in files for mount in self.tmpfs)
        stage = "/var/lib/sdlisten-put" if hidden else ""
        data = tarball({stage + path: content for path, content in files.items()})
        if not self.get_wrapped_container().put_archive("/", data):
            raise AssertionError(f"the engine did not take {', '.join(files)}")
        if stage:
            self.sh(f"tar -C {stage} -c . | tar -C / -x --no-overwrite-dir && rm -r {stage}")

    def connect(self, port: int, *, ipv6: bool = False, within: float = 0.0) -> socket.socket:
        """Connect from the host to a TCP port; the caller closes the socket, whose timeout is 10 s.

        Args:
            port: The port inside.
            ipv6: Whether to use its IPv6 address.
            within: For how many seconds a refusal means "not yet".

        Raises:
            OSError: It cannot be reached; ConnectionRefusedError if nobody listens.
        """
        deadline = time.monotonic() + within
        while True:
            try:
                return socket.create_connection((self.ip6 if ipv6 else self.ip, port), timeout=10)
            except ConnectionRefusedError as error:
                if time.monotonic() >= deadline:
                    error.add_note(f"nobody listens on port {port} within {within} s; {self._story()}")
                    raise
            time.sleep(0.02)

    def logs(self) -> str:
        """Return what PID 1 has written to stdout and stderr."""
        written = self.get_wrapped_container().logs()
        assert isinstance(written, bytes)
        return written.decode(errors="replace")

    def wait_for_log(self, text: str, *, within: float = 10.0) -> str:
        """Wait until PID 1 has written `text`, and return all that it wrote until then.

        Raises:
            AssertionError: Not `within` so many seconds, or it ended without; says what it wrote.
        """
        stream = self.get_wrapped_container().logs(stream=True, follow=True)
        limit = threading.Timer(within, stream.close)
        limit.start()
        seen = b""
        try:
            for piece in stream:
                seen += piece
                if text.encode() in seen:
                    return seen.decode(errors="replace")
        finally:
            limit.cancel()
            stream.close()  # ends the reading
            _close_response(stream)
        raise AssertionError(f"{text!r} was not written within {within} s; {self._story()}")

    def _execute(
        self, words: Sequence[str], user: str, env: Mapping[str, str] | None, timeout: float
    ) -> tuple[int, str, str]:
        """Run `words`; returns exit code, stdout and stderr."""
        if user != "root":
            words = ["/bin/sh", "-c", 'XDG_RUNTIME_DIR=/run/user/$(id -u) exec "$@"', "sh", *words]
        # Measured inside: the engine cannot end what it has started by exec.
        words = ["timeout", "--kill-after=2", f"{timeout}", *words]
        api: Any = self.get_docker_client().client.api  # docker-py keeps private what is needed below
        created = api.exec_create(self.get_container_id(), words, user=user, environment=dict(env or {}))
        stream = api.exec_start(created["Id"], socket=True)
        try:
            api._disable_socket_timeout(stream)  # timeout(1) is the limit
            out, err = _outputs(stream._response.raw._fp.fp)
        finally:
            _close_response(stream)
        code = api.exec_inspect(created["Id"])["ExitCode"]
        if code is None:
            raise AssertionError(f"{words} was cut off; {self._story()}")
        if code in {124, 137}:  # what timeout(1) says after TERM and after KILL
            raise TimeoutError(f"{words} did not end within {timeout} s (code {code}). It wrote: {out}{err}")
        return code, out, err

    def _inspected(self) -> dict[str, Any]:
        container = self.get_wrapped_container()
        container.reload()
        return dict(container.attrs)

    def _network_settings(self) -> dict[str, Any]:
        (settings,) = self._inspected()["NetworkSettings"]["Networks"].values()
        return dict(settings)

    def _story(self) -> str:
        """What became of the container, for an error text."""
        state = self._inspected()["State"]
        ended = "" if state["Running"] else f" with code {state['ExitCode']}"
        return f"the container is {state['Status']}{ended}. It wrote:\n{self.logs()[-3000:]}"


class Plain(Container):
    """A container without systemd: one program as PID 1, or as the only child of tini.

    Args:
        image: A tag from `integration.images`.
        command: The program and its arguments.
        tini: Whether tini is PID 1.
        options: And the others: see `Container`.
    """

    def __init__(self, image: str, command: Sequence[str], *, tini: bool = False, **options: Any) -> None:  # noqa: ANN401 -- those of Container
        super().__init__(image, ["tini", "--", *command] if tini else command, **options)

    def signal(self, name: str = "SIGTERM") -> None:
        """Send PID 1 a signal."""
        self.get_wrapped_container().kill(signal=name)

    def wait(self, within: float = 20.0) -> int:
        """Wait until the container has ended by itself, and return its exit code.

        Raises:
            AssertionError: Not `within` so many seconds; says what it wrote.
        """
        try:
            return int(self.get_wrapped_container().wait(timeout=within)["StatusCode"])
        except OSError:  # requests' ReadTimeout or ConnectionError
            raise AssertionError(f"it did not end within {within} s; {self._story()}") from None


def _close_response(stream: Any) -> None:  # noqa: ANN401 -- docker-py has several kinds
    """Close the connection that `stream` reads from: docker-py itself leaves it to the garbage collector."""
    stream._response.close()


def _outputs(reader: BinaryIO) -> tuple[str, str]:
    """Read what a command writes to stdout and stderr until it ends, in the frames of the engine's API.

    Not by docker-py's reader of the same frames: it reads past the buffer that the headers of the answer were
    read with, and so loses what came along with them, which is everything if the command was quick.

    Args:
        reader: That buffer.
    """
    written: dict[int, bytes] = {1: b"", 2: b""}
    while header := reader.read(8):
        stream, length = struct.unpack(">BxxxI", header)
        written[stream] += reader.read(length)
    return written[1].decode(errors="replace"), written[2].decode(errors="replace")


def _words(command: str | Sequence[str]) -> list[str]:
    return ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `ours` and `theirs` together: lists and mappings are joined, others replaced."""
    merged = {**ours, **theirs}
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], list):
            merged[key] = [*ours[key], *theirs[key]]
        elif isinstance(ours[key], dict):
            merged[key] = {**ours[key], **theirs[key]}
    return merged
