"""A container with systemd as PID 1."""

from __future__ import annotations

import contextlib
import posixpath
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .container import Container, merged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    from .images import Release

__all__ = ("Machine",)

UNITS = Path(__file__).resolve().parent.parent / "units"

# PID 1 until systemd is: gives systemd a cgroup2 tree rooted at the container's own cgroup. With a bind mount
# of /sys/fs/cgroup instead, it would write into the host's tree, and containers would share one system.slice.
SHIM = """\
umount -R -l /sys/fs/cgroup 2>/dev/null || umount -l /sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate cgroup2 /sys/fs/cgroup ||
mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 71
exec /lib/systemd/systemd
"""

# systemctl cannot wait before PID 1 listens, and nothing announces that.
AWAIT_BOOT = """\
until [ -S /run/systemd/private ]; do sleep 0.02; done
until state=$(systemctl is-system-running --wait); [ "$state" = running ] || [ "$state" = degraded ]; do
    sleep 0.02
done
echo "$state"
"""

# How long a test's units may take to stop when it has ended.
STOP_SECONDS = 20

# Directories in which a test's units appear: written, edited, enabled, transient.
UNIT_DIRECTORIES = "/etc/systemd /run/systemd/system /run/systemd/system.control /run/systemd/transient"
UNIT_SUFFIXES = (".service", ".socket", ".timer", ".path", ".target", ".mount", ".slice", ".scope")


class Machine(Container):
    """A container with systemd as PID 1, in a cgroup tree of its own.

    Args:
        image: A tag from `integration.images`.
        release: What is in it.
        options: See `Container`.
    """

    def __init__(self, image: str, release: Release, **options: Any) -> None:  # noqa: ANN401 -- those of Container
        self.release = release
        needed = {
            "cap_add": ["SYS_ADMIN"],
            "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
            "cgroupns": "private",
            "stop_signal": "SIGRTMIN+3",
        }
        options["options"] = merged(needed, options.get("options") or {})
        super().__init__(image, ["/bin/sh", "-c", SHIM], **options)
        self.with_env("container", "docker")
        # The engine's default is noexec, which systemd's own mounts there are not.
        self.tmpfs.update({"/run": "exec,mode=755", "/run/lock": "", "/tmp": "exec,mode=1777"})  # noqa: S108 -- in there
        self._put: list[str] = []
        self._users: list[str] = []
        self._since = 0.0

    def start(self) -> Self:
        """Start the container and wait until systemd has booted."""
        super().start()
        self.boot()
        return self

    def boot(self, timeout: float = 60.0) -> str:
        """Wait until systemd has booted; returns ``running``, or ``degraded`` if a unit has failed.

        Raises:
            AssertionError: It does not come up, or not in time; says in which state it is.
        """
        try:
            return self.sh(AWAIT_BOOT, timeout=timeout)
        except TimeoutError as error:
            seen = self.run("systemctl is-system-running; systemctl list-jobs; systemctl --failed").output
            raise AssertionError(f"not booted within {timeout} s: {error}\n{seen}\n{self._story()}") from None

    @cached_property
    def version(self) -> int:
        """The version of its systemd."""
        return int(self.sh("systemctl --version").split()[1])

    @cached_property
    def python_version(self) -> str:
        """The version of its ``python3``, without the patch level."""
        return self.python("import sys; print('%d.%d' % sys.version_info[:2])")

    def put(self, files: Mapping[str, str | bytes | Path]) -> None:
        """Write files inside, see `Container.put`; `cleanup` removes them."""
        self._put.extend(files)
        super().put(files)

    def units(self, *names: str, extra: Mapping[str, str] | None = None, user: bool = False) -> None:
        """Install unit files and load them.

        Args:
            names: Files of the project's ``units/``.
            extra: Further ones: name, or path of a drop-in such as ``hello.socket.d/port.conf``, to text.
            user: Whether they are for user managers, which are not told: that is up to the caller.
        """
        directory = f"/etc/systemd/{'user' if user else 'system'}"
        files = {f"{directory}/{name}": UNITS / name for name in names}
        self.put({**files, **{f"{directory}/{name}": text for name, text in (extra or {}).items()}})
        if not user:
            self.systemctl("daemon-reload")

    def systemctl(
        self, *arguments: str, check: bool = True, user: str = "root", timeout: float = 30.0
    ) -> str:
        """Run systemctl, with ``--user`` if `user` is somebody; see `sh`."""
        words = ["systemctl", *([] if user == "root" else ["--user"]), *arguments]
        return self.sh(words, check, user=user, timeout=timeout)

    def show(self, unit: str, name: str) -> str:
        """Return the property `name` of `unit`."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def journal(self, *units: str) -> str:
        """Return the messages of units, and of systemd about them, since the current `cleanup` block began.

        A word with ``=`` is a match of its own, as in journalctl(1): ``_SYSTEMD_USER_UNIT=hello.service``.
        """
        words = [unit if "=" in unit else f"--unit={unit}" for unit in units]
        command = ["journalctl", "--no-pager", "--output=cat", f"--since=@{self._since:.6f}", *words]
        self.sh(["journalctl", "--sync"])  # else what was just written may be missing
        return self.sh(command)

    def add_user(self, name: str) -> None:
        """Create a user whose user manager runs; `cleanup` removes it. Its commands: ``sh(…, user=name)``."""
        self._users.append(name)
        # Its start job ends when the user manager has said READY=1.
        self.sh(
            f"useradd --create-home {name} && loginctl enable-linger {name} &&"
            f" systemctl start user@$(id -u {name}).service"
        )

    @contextlib.contextmanager
    def cleanup(self) -> Iterator[Self]:
        """Undo at the end what the block did to the machine; blocks can be nested.

        Units that have appeared, also transient ones and instances of templates, are stopped; their files,
        those that the block `put`, and its users are removed; failed states are reset. A file that was there
        before is not restored if the block overwrites it. Inside, `journal` begins where the block begins.

        Raises:
            AssertionError: A unit did not stop; says which.
        """
        outer = self._put, self._users, self._since
        self._put, self._users, self._since = [], [], time.time()
        before = self._unit_files()
        try:
            yield self
        finally:
            files, users, _ = self._put, self._users, self._since
            self._put, self._users, self._since = outer
            for name in users:
                self._remove_user(name)
            self._remove(self._unit_files() - before, files)

    def _unit_files(self) -> set[str]:
        found = self.sh(f"find {UNIT_DIRECTORIES} ! -type d 2>/dev/null; systemctl reset-failed")
        return set(found.splitlines())

    def _remove_user(self, name: str) -> None:
        self.sh(
            f"systemctl stop user@$(id -u {name}).service && loginctl disable-linger {name} &&"
            f" userdel --remove {name} 2>&1"
        )

    def _remove(self, unit_files: set[str], files: Sequence[str]) -> None:
        """Stop the units that have files among `unit_files`, and remove all files."""
        paths = sorted({*unit_files, *files})
        if not paths:
            return
        names = {posixpath.basename(path) for path in paths if path.endswith(UNIT_SUFFIXES)}
        # First what starts others: a service stopped before its socket comes back with the next client.
        units = sorted(
            (name.replace("@.", "@*.") for name in names), key=lambda name: name.endswith(".service")
        )
        stuck = self._stop(units) if units else ""
        forget = 'rm -rf "$@" && systemctl daemon-reload && systemctl reset-failed'
        self.sh(["/bin/sh", "-c", forget, "sh", *paths])
        if stuck:
            raise AssertionError(
                f"the test leaves behind what does not stop within {STOP_SECONDS} s:\n{stuck}"
            )

    def _stop(self, units: Sequence[str]) -> str:
        """Stop `units`, and return what systemctl says of those that did not in good time and were killed."""
        try:
            self.run(["systemctl", "stop", *units], timeout=STOP_SECONDS)
        except TimeoutError:
            stuck = self.sh(["systemctl", "list-units", "--plain", "--no-legend", *units])
            self.run(["systemctl", "kill", "--signal=KILL", *units])
            self.run(["systemctl", "stop", *units])
            return stuck
        return ""
