"""Bootable images of three Debian releases, and the wheel of this checkout on top of them.

A base comes from the first source that works:

1. ``SDLISTEN_BASE_IMAGE``, if set: an image name in which ``{suite}`` stands for bookworm, trixie and sid; or
   the name of one image, which is then the base of the release that its os-release(5) file names.
2. The stock image ``debian:SUITE-slim``, if the engine has it or a registry answers.
3. Debian's own packages, put together by mmdebstrap: no registry is needed.

Every tag carries a hash of all that went into it: an image is built once, used again by later sessions, and
built anew when its recipe or the library changes; what it replaces is removed. Nothing inside a container
needs the network: the wheel (``SDLISTEN_WHEEL``, or one built now) and what tests/ needs are copied in.

``python -m integration.images`` builds all of them and prints their tags.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from docker.errors import APIError, BuildError, ImageNotFound
from testcontainers.core.docker_client import DockerClient

from .engine import install, lease
from .tarball import tarball

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import docker
    from docker.models.images import Image

__all__ = ("RELEASES", "ImageError", "Release", "abandon", "base", "connect", "image", "wheel")

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Release:
    """A Debian release, named by what it brings.

    Attributes:
        suite: Debian's name of it.
        systemd: The version of its systemd. Sid moves: there it is the least one.
        python: The version of its ``python3``, without the patch level.
    """

    suite: str
    systemd: int
    python: str

    @property
    def id(self) -> str:
        """The name in test ids, such as ``systemd257``."""
        return f"systemd{self.systemd}"

    @property
    def site(self) -> str:
        """The directory that its ``python3`` imports local packages from, before Debian's own."""
        return f"/usr/local/lib/python{self.python}/dist-packages"


RELEASES = (Release("bookworm", 252, "3.11"), Release("trixie", 257, "3.13"), Release("sid", 262, "3.14"))

# mount and passwd by name: sid has neither unless asked. libpam-systemd, dbus-user-session: `systemd --user`.
# openssl, strace: for the tests of tests/, see `suite_image`.
PACKAGES = (
    "dbus",
    "dbus-user-session",
    "iproute2",
    "libpam-systemd",
    "mount",
    "openssl",
    "passwd",
    "procps",
    "python3",
    "python3-systemd",
    "strace",
    "systemd",
    "systemd-sysv",
    "tini",
)

BOOTSTRAP = (
    "--quiet",
    "--variant=apt",
    f"--include={','.join(PACKAGES)}",
    '--aptopt=Acquire::Languages "none"',
    '--aptopt=Acquire::Retries "2"',
    '--aptopt=Acquire::http::Timeout "30"',
    # A mirror that was frozen at some day has a Release file past its date.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    # bookworm: init-system-helpers brings usrmerge, and that all of perl; usr-is-merged will do.
    """--customize-hook=! chroot "$1" dpkg --status usrmerge >/dev/null 2>&1 || chroot "$1" apt-get -qq \
    purge --yes --autoremove --allow-remove-essential usrmerge perl usr-is-merged+ >/dev/null""",
    # Deleted afterwards: path-exclude= sends every package through a filter and costs 8 s more.
    """--customize-hook=cd "$1"/usr/share && rm -rf doc man info lintian i18n locale \
    ../lib/*/gconv ../../var/lib/apt/lists/*""",
)
BOOTSTRAP_SECONDS = 600

MAKE_BOOTABLE = f"""\
FROM {{source}}
RUN dpkg --status {" ".join(PACKAGES)} >/dev/null 2>&1 || {{{{ \
    export DEBIAN_FRONTEND=noninteractive && apt-get -qq update && \
    apt-get -qq install --yes --no-install-recommends {" ".join(PACKAGES)} >/dev/null && \
    rm -rf /var/lib/apt/lists/*; }}}}
"""

# Compiled now: a service under ProtectSystem= or DynamicUser= could never write its own .pyc files.
# No timers: apt-daily would begin its work in the middle of a test.
ADD_PACKAGES = """\
FROM {parent}
COPY root /
RUN python3 -m compileall -q {site} && rm -f /etc/systemd/system/timers.target.wants/*
"""

# How long a registry may take to describe an image before it counts as absent.
PULL_SECONDS = 20
KEEP_SECONDS = 3600


class ImageError(Exception):
    """An image cannot be had; the text says which, and what was tried."""


def connect(seconds: float = 60) -> docker.DockerClient:
    """Return a client of the engine that waits at most `seconds` for each answer; the caller closes it."""
    return DockerClient(timeout=seconds).client


def image(release: Release, *, test_dependencies: bool = False) -> str:
    """Return the tag of an image of `release` with this checkout's wheel, building what is missing.

    Safe to call from several threads and sessions at once.

    Args:
        release: Which Debian.
        test_dependencies: Whether the dependency group ``test`` of pyproject.toml is wanted in it, too.

    Raises:
        ImageError: It cannot be built.
        EngineUnavailableError: mmdebstrap is missing and cannot be installed.
    """
    client = connect(BOOTSTRAP_SECONDS)
    try:
        parent = base(client, release)
        if test_dependencies:
            parent = _with_test_dependencies(client, release, parent)
        dockerfile = ADD_PACKAGES.format(parent=parent, site=release.site)
        files = _installed(release)
        return _made(
            client,
            f"sdlisten-{'suite' if test_dependencies else 'tests'}:{release.suite}",
            [dockerfile, *map(repr, sorted(files.items()))],
            lambda tag: _build(client, tag, dockerfile, files),
        )
    finally:
        client.close()


def abandon() -> None:
    """End what is being put together now, also in other threads: `image` then raises ImageError there."""
    for bootstrap in _bootstraps.copy():
        bootstrap.send_signal(signal.SIGINT)


def wheel() -> Mapping[str, bytes]:
    """Return the members of the library's wheel by name; it is built at most once in the life of the process.

    Raises:
        ImageError: The build backend refuses; its words are in the text.
    """
    with _one_at_a_time:
        return _wheel()


_one_at_a_time = threading.Lock()
_bootstraps: list[subprocess.Popen[bytes]] = []


@functools.cache
def _wheel() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        path = os.environ.get("SDLISTEN_WHEEL")
        if not path:
            _run([sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", directory])
            (path,) = map(str, Path(directory).glob("sdlisten-*.whl"))
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def _installed(release: Release) -> Mapping[str, bytes]:
    """Where an installer would put the members of the wheel, and its console scripts, in an image."""
    files = {f"root{release.site}/{name}": data for name, data in wheel().items()}
    (points,) = (data for name, data in wheel().items() if name.endswith(".dist-info/entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(points.decode())
    for script, target in parser["console_scripts"].items():
        module, _, function = target.partition(":")
        text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        files[f"root/usr/local/bin/{script}"] = text.encode()
    return files


def _with_test_dependencies(client: docker.DockerClient, release: Release, parent: str) -> str:
    """Return the tag of `parent` with what the test suite needs; downloaded on the host, for `release`."""
    architecture = client.info()["Architecture"]
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in (5, 12, 17, 28, 34)]
    wanted = [f"--platform={platform}" for platform in platforms] + _requirements("test")
    dockerfile = ADD_PACKAGES.format(parent=parent, site=release.site)

    def make(tag: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            pip = [
                sys.executable,
                "-P",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--only-binary=:all:",
                "--no-compile",
            ]
            _run([*pip, f"--python-version={release.python}", f"--target={directory}", *wanted])
            # Scripts with the host's interpreter in their first line.
            shutil.rmtree(Path(directory, "bin"), ignore_errors=True)
            _build(client, tag, dockerfile, {f"root{release.site}": Path(directory)})

    return _made(client, f"sdlisten-dependencies:{release.suite}", [dockerfile, *wanted], make)


def _requirements(group: str) -> list[str]:
    """Return what a dependency group of pyproject.toml asks for, with the groups that it includes."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][group]
    lists = (
        _requirements(entry["include-group"]) if isinstance(entry, dict) else [entry] for entry in entries
    )
    return [requirement for requirements in lists for requirement in requirements]


def base(client: docker.DockerClient, release: Release) -> str:
    """Return the tag of a bootable image of `release` without the wheel."""
    named = _named(client, release)

    def make(tag: str) -> None:
        source = named or _pulled(client, f"debian:{release.suite}-slim")
        if source:
            _build(client, tag, MAKE_BOOTABLE.format(source=source.id))
        else:
            _bootstrap(client, tag, release)

    source = [str(named.id)] if named else BOOTSTRAP
    return _made(client, f"sdlisten-base:{release.suite}", [MAKE_BOOTABLE, *source], make)


def _named(client: docker.DockerClient, release: Release) -> Image | None:
    """Return the image that ``SDLISTEN_BASE_IMAGE`` names for `release`; None if it names none."""
    name = os.environ.get("SDLISTEN_BASE_IMAGE", "")
    if not name:
        return None
    found = _pulled(client, name.replace("{suite}", release.suite))
    if found is None:
        raise ImageError(
            f"SDLISTEN_BASE_IMAGE={name}: neither the engine nor a registry has it for {release.suite}"
        )
    if "{suite}" in name:
        return found
    system = client.containers.run(found, ["cat", "/etc/os-release"], remove=True).decode()
    suites = [known.suite for known in RELEASES]
    if not any(suite in system for suite in suites):
        raise ImageError(
            f"SDLISTEN_BASE_IMAGE={name} is none of {', '.join(suites)}. Its os-release:\n{system}"
        )
    return found if release.suite in system else None


def _pulled(client: docker.DockerClient, name: str) -> Image | None:
    """Return the image called `name`, from the engine or else from a registry that answers soon; or None."""
    with contextlib.suppress(ImageNotFound):
        return client.images.get(name)
    impatient = connect(PULL_SECONDS)
    try:
        impatient.images.get_registry_data(name)  # docker-py's pull itself has no time limit
        return client.images.pull(name)
    except (APIError, OSError):  # OSError: requests' errors, ReadTimeout among them
        return None
    finally:
        impatient.close()


def _bootstrap(client: docker.DockerClient, tag: str, release: Release) -> None:
    """Put an image together from Debian's packages."""
    with _one_at_a_time:
        install(["mmdebstrap"])
    # timeout(1) hands a signal on to all of mmdebstrap's processes, a group of their own. It gets one
    # from abandon(), or from the kernel if we are killed.
    limits = ["setpriv", "--pdeathsig", "INT", "timeout", "--signal=INT", str(BOOTSTRAP_SECONDS)]
    command = [*limits, "mmdebstrap", *BOOTSTRAP, release.suite, "-"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        ) as bootstrap,
    ):
        _bootstraps.append(bootstrap)
        try:
            # Not under its tag yet: the engine takes half an archive for an image, too.
            answer = client.api.import_image_from_stream(bootstrap.stdout)
        except APIError as error:
            answer = str(error)
        code = bootstrap.wait()
        _bootstraps.remove(bootstrap)
        if code:
            errors.seek(0)
            raise ImageError(f"mmdebstrap of {release.suite} failed:\n{errors.read()[-1500:]}")
    try:
        imported = json.loads(answer)["status"]
    except (ValueError, KeyError):
        raise ImageError(f"the engine did not import {release.suite}: {answer}") from None
    client.images.get(imported).tag(tag)


def _build(
    client: docker.DockerClient,
    tag: str,
    dockerfile: str,
    files: Mapping[str, bytes | Path] = MappingProxyType({}),
) -> None:
    context = io.BytesIO(tarball({**files, "Dockerfile": dockerfile}))
    try:
        client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, forcerm=True)
    except BuildError as error:
        said = "".join(str(line.get("stream", "")) for line in error.build_log)
        raise ImageError(f"{tag} cannot be built: {error.msg}\n{said[-1500:]}") from None


def _made(client: docker.DockerClient, name: str, inputs: Iterable[str], make: Callable[[str], None]) -> str:
    """Return `name` with a hash of `inputs` after it, as the tag of an image, made now unless it is there."""
    tag = f"{name}-{hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:12]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlisten"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions do not build the same
        try:
            client.images.get(tag)
        except ImageNotFound:
            make(tag)
            _remove_older(client, name, tag)
    return tag


def _remove_older(client: docker.DockerClient, name: str, tag: str) -> None:
    """Remove what `tag` replaces, except what another session may be about to use."""
    for other in client.api.images(name.partition(":")[0]):
        if time.time() - other["Created"] < KEEP_SECONDS:
            continue
        for old in other["RepoTags"] or ():
            if old.startswith(f"{name}-") and old != tag:
                with contextlib.suppress(APIError):  # a container uses it, or a younger image is made from it
                    client.images.remove(old)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise ImageError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}")


def main() -> int:
    """Build every image that is missing, three at a time, and print the tags."""
    with lease(), ThreadPoolExecutor(len(RELEASES)) as pool:
        suite = pool.submit(image, RELEASES[-1], test_dependencies=True)
        tags = [*pool.map(image, RELEASES), suite.result()]
    print(*tags, sep="\n")  # noqa: T201 -- what a command says
    return 0


if __name__ == "__main__":
    sys.exit(main())
