"""python-systemd as the second judge of what was passed.

Our own reader decides. Only when it says that descriptors were passed, and python-systemd can be imported,
libsystemd is asked as well and must agree. ``SDLISTEN_BACKEND`` chooses: ``auto``, ``libsystemd`` (it must be
there) or ``builtin`` (it is not asked).

On PyPI the package is called systemd-python; the python-systemd there is another one, without
``systemd.daemon``.
"""

from __future__ import annotations

import os

from sdlisten.errors import ListenEnvironmentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ("require_agreement",)

_NOT_US = "SDLISTEN_BACKEND=builtin does without it; please report this."
# By default python-systemd unsets the variables where libsystemd looks, and leaves them in os.environ.
_BEFORE_US = (
    "Other code in this process has called systemd.daemon.listen_fds() before; call sdlisten instead."
)


def require_agreement(names: Mapping[int, str]) -> None:
    """Ask libsystemd what was passed to this process, unless ``SDLISTEN_BACKEND`` says otherwise.

    Args:
        names: What we found: descriptor to FileDescriptorName. Their flags are as before afterwards.

    Raises:
        ListenEnvironmentError: It sees something else, or ``SDLISTEN_BACKEND`` cannot be satisfied.
    """
    wanted = os.environ.get("SDLISTEN_BACKEND") or "auto"
    if wanted not in {"auto", "libsystemd", "builtin"}:
        text = f"SDLISTEN_BACKEND={wanted!r}: expected auto, libsystemd or builtin"
        raise ListenEnvironmentError(text, variable="SDLISTEN_BACKEND", value=wanted)
    # Names that are not UTF-8 crash python-systemd 235 (SystemError); no manager writes them.
    if wanted == "builtin" or not all(name.isascii() for name in names.values()):
        return
    try:
        from systemd.daemon import listen_fds_with_names  # noqa: PLC0415 - an optional package
    except ImportError as error:
        if wanted == "auto":
            return
        text = "SDLISTEN_BACKEND=libsystemd, but python-systemd is missing: pip install 'sdlisten[systemd]'"
        raise ListenEnvironmentError(text, variable="SDLISTEN_BACKEND", value=wanted) from error
    _compare(names, listen_fds_with_names)


def _compare(names: Mapping[int, str], listen_fds_with_names: Callable[..., dict[int, str]]) -> None:
    # sd_listen_fds(3) makes what it finds close-on-exec, and unset_environment clears only the C environment.
    inheritable = {fd: os.get_inheritable(fd) for fd in names}
    try:
        found: object = dict(listen_fds_with_names(unset_environment=False))
    except OSError as error:
        found = error
    finally:
        for fd, flag in inheritable.items():
            os.set_inheritable(fd, flag)
    if found != names:
        text = (
            f"libsystemd does not agree on what was passed: it says {found!r}, we found {dict(names)!r}. "
            f"{_NOT_US if found else _BEFORE_US}"
        )
        raise ListenEnvironmentError(text, variable="LISTEN_FDS", value=os.environ.get("LISTEN_FDS"))
