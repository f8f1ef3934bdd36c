"""System packages that the tests need: installed where we are root and have apt, otherwise only named.

A container engine is not among them: integration/ brings its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tools.checkout import SetupError, say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tools.pythons import Interpreter

__all__ = ("provide_packages",)

# Program: the Debian package that has it, and why the tests want it.
_PROGRAMS = {
    "gcc": "gcc",  # compiles systemd-python
    "pkg-config": "pkg-config",  # tells it where libsystemd is
    "strace": "strace",  # counts system calls
    "openssl": "openssl",  # makes certificates for the tests of TLS
    "curl": "curl",  # the client in the documentation
    "ss": "iproute2",  # reads backlogs from outside
    "systemd-socket-activate": "systemd",  # the manager's side, without a manager
}


def provide_packages(pythons: Iterable[Interpreter]) -> None:
    """Install what the tests need and this machine lacks.

    Raises:
        SetupError: We are not root, there is no apt, or apt failed. The text has the command that mends it.
    """
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if not _has_libsystemd():
        missing.append("libsystemd-dev")
    if importlib.util.find_spec("ensurepip") is None:
        missing.append(f"python3.{sys.version_info.minor}-venv")
    # Only Debian's own Pythons have a package with their headers.
    debians = (p for p in pythons if p.path.parent.as_posix() == "/usr/bin")
    missing += [f"python{python.minor}-dev" for python in debians if not python.has_headers]
    if missing:
        _install(missing)


def _has_libsystemd() -> bool:
    return shutil.which("pkg-config") is not None and _succeeds("pkg-config", "--exists", "libsystemd")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _install(packages: list[str]) -> None:
    names = " ".join(packages)
    options = ("--yes", "--no-install-recommends")
    command = ["apt-get", "install", *options, *packages]
    if shutil.which("apt-get") is None:
        raise SetupError(f"the tests need what Debian calls {names}: install these and run this again")
    if os.geteuid() != 0:
        raise SetupError(f"the tests need more. Run this, then try again: sudo {' '.join(command)}")
    say(f"installing, as root: {names}")
    if _apt(command) is None:
        return
    # A new machine has no package lists, an old one stale ones.
    failure = _apt(["apt-get", "update"]) or _apt(command)
    if failure is not None:
        raise SetupError(f"apt-get install {names}: {failure}")


def _apt(command: list[str]) -> str | None:
    """Run apt and return None, or its last words if it failed."""
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    patient = [*command, "--option", "DPkg::Lock::Timeout=120"]  # a new machine may still be upgrading itself
    done = subprocess.run(patient, check=False, capture_output=True, text=True, env=environ)
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
