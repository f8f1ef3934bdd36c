"""Claim what the manager passed, once per process: sd_listen_fds(3).

Rule 1. The environment is read in full and every descriptor looked at before anything changes. What cannot be
used is an error, and the environment, the flags and the descriptors are then as before.

Rule 2. Claiming makes every passed descriptor close-on-exec and removes the four variables from the C
environment and from ``os.environ``: a child must not find them, and python-systemd's ``unset_environment``
clears only the former. It happens once; threads wait for each other.

Rule 3. Each descriptor is taken once. A second taker is told who was first; so is a forked child, for which
all of them belong to its parent, whether that has claimed them or not.

Rule 4. Numbers stay where they are: the program may be going to exec itself, and then they must be at 3
again.
"""

from __future__ import annotations

import os
import threading

from sdlisten.backend import require_agreement
from sdlisten.descriptor import Kind, describe
from sdlisten.environment import LISTEN_FDS_START, VARIABLES, read_listen_environment
from sdlisten.errors import AlreadyTakenError, DescriptorError, NameNotFoundError
from sdlisten.exec_shim import pidfdid
from sdlisten.inherited import InheritedFd, join
from sdlisten.lifeline import claim_lifeline
from sdlisten.listener import Listeners

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence

    from sdlisten.descriptor import Descriptor
    from sdlisten.environment import ListenEnvironment
    from sdlisten.state import State

__all__ = ("Activation", "close_untaken_stored", "lifeline", "listen_fds", "lock", "process_activation")

lock = threading.RLock()
"""Held while deciding what to take. Read it from the module: a forked child gets a new one."""

_process: Activation | None = None
_importer = os.getpid()  # the only process that may claim what it was passed: children forked from it may not


class Activation:
    """The descriptors passed to one process, and who took which.

    Attributes:
        descriptors: All of them, in the order of their numbers.
        absent: If there are none, the reason in words, for error texts; else "".
        lifeline: After the claim, the number of what ``sdlisten.lifeline`` describes, or None; *borrowed*.
    """

    __slots__ = ("_claimed", "_own", "_pid", "absent", "descriptors", "lifeline")

    def __init__(self, environment: ListenEnvironment, *, own: bool, pid: int | None = None) -> None:
        """Look at every descriptor and change nothing; `current` and `from_environ` are the way in.

        Args:
            environment: What the variables say.
            own: Whether they are this process's own variables, to be removed at the claim.
            pid: The process that the descriptors belong to; this one if None.

        Raises:
            DescriptorError: A descriptor that should have been passed is not open.
        """
        last = LISTEN_FDS_START + environment.count
        self.descriptors = tuple(
            InheritedFd(_describe_passed(fd, last), environment.name(fd))
            for fd in range(LISTEN_FDS_START, last)
        )
        self.absent = environment.absent
        self.lifeline: int | None = None
        self._pid = os.getpid() if pid is None else pid
        self._own = own
        self._claimed = False

    @classmethod
    def current(cls) -> Activation:
        """Claim what was passed to this process; the first call does it, later ones return the same.

        Raises:
            ListenEnvironmentError: A LISTEN_* variable is malformed, or the backend disagrees.
            DescriptorError: A descriptor that should have been passed is not open.
        """
        with lock:
            activation = process_activation()
            activation.claim()
            return activation

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, pid: int | None = None) -> Activation:
        """Claim what a mapping of your own says; the mapping is neither changed nor remembered.

        Args:
            environ: Variables as in ``os.environ``.
            pid: The process they must be meant for; this one if None.

        Raises:
            ListenEnvironmentError: A LISTEN_* variable is malformed.
            DescriptorError: A descriptor that should have been passed is not open.
        """
        activation = cls(_read(environ, os.getpid() if pid is None else pid), own=False)
        activation.claim()
        return activation

    @property
    def forked(self) -> bool:
        """Whether the descriptors were passed to the process that forked us."""
        return self._pid != os.getpid() and bool(self.descriptors)

    @property
    def remaining(self) -> tuple[InheritedFd, ...]:
        """What nobody has taken yet; nothing in a forked child."""
        return () if self.forked else tuple(found for found in self.descriptors if found.taken_by is None)

    def claim(self) -> None:
        """Make the descriptors close-on-exec and remove the variables, once (Rule 2)."""
        global _process  # noqa: PLW0603 - LISTEN_* belong to the process
        with lock:
            # listen() binds between its look and its claim, and another thread may claim meanwhile.
            if self._claimed or (self._own and _process is not None):
                return
            for inherited in self.descriptors:
                os.set_inheritable(inherited.fd, False)
            self._claimed = True
            if self._own:
                _process = self
                if self.descriptors and not self.forked:
                    self.lifeline = claim_lifeline(LISTEN_FDS_START + len(self.descriptors))
                for variable in VARIABLES:
                    os.environ.pop(variable, None)
                    os.unsetenv(variable)  # C code may have set it without telling os.environ

    def take_listeners(self, name: str) -> Listeners:
        """Take all listeners that were passed or stored under a name.

        A unit may pass other descriptors under the same name (``ListenDatagram=`` beside ``ListenStream=``);
        they stay for others to take.

        Returns:
            The listeners, which own their descriptors: non-blocking and close-on-exec.

        Raises:
            NameNotFoundError: Nothing has that name.
            AlreadyTakenError: Somebody took one before.
            DescriptorError: Nothing with that name listens.
        """
        named = self._named(name)
        chosen = [inherited for inherited in named if inherited.kind is Kind.LISTENER]
        if not chosen:
            text = f"{join(named)} does not listen; take_sockets() and take_fds() take anything"
            raise DescriptorError(text, fd=named[0].fd)
        return self.adopt(chosen, by=f"take_listeners({name!r})")

    def take_sockets(self, name: str) -> tuple[socket.socket, ...]:
        """Take all sockets of any kind that were passed or stored under a name, flags as they are.

        Returns:
            The sockets, close-on-exec; the caller owns them. O_NONBLOCK stays: other holders share it.

        Raises:
            NameNotFoundError: Nothing has that name.
            AlreadyTakenError: Somebody took one before.
            DescriptorError: Something with that name is no socket; nothing is taken.
        """
        chosen = self._named(name)
        for inherited in chosen:
            if not inherited.kind.is_socket:
                text = f"{inherited} is no socket; take_fds({name!r}) takes the bare descriptor"
                raise DescriptorError(text, fd=inherited.fd)
        with lock:
            self._take(chosen, by=f"take_sockets({name!r})")
            return tuple(inherited.to_socket() for inherited in chosen)

    def take_fds(self, name: str) -> tuple[int, ...]:
        """Take all descriptors of any kind that were passed or stored under a name.

        Returns:
            Their numbers; the caller owns the descriptors.

        Raises:
            NameNotFoundError: Nothing has that name.
            AlreadyTakenError: Somebody took one before.
            DescriptorError: Somebody closed one.
        """
        chosen = self._named(name)
        self._take(chosen, by=f"take_fds({name!r})")
        return tuple(inherited.fd for inherited in chosen)

    def take_state(self, name: str, *, limit: int | None = None) -> State | None:
        """Take the bytes that an earlier start of the program stored with ``Notifier.store_state``.

        The manager keeps its own copy until the name is stored again or removed: a program that dies early
        finds the state once more.

        Args:
            name: As it was given to ``store_state``.
            limit: How many bytes are accepted; STATE_MAX (16 MiB) if None.

        Returns:
            The state, the latest if there are several; None if there is none.

        Raises:
            AlreadyTakenError: Somebody took it before.
            DescriptorError: One has the name but is no state, or somebody closed it.
        """
        from sdlisten import state  # noqa: PLC0415 - few programs keep one

        stored_name = state.STATE_PREFIX + name
        chosen = [inherited for inherited in self.descriptors if inherited.stored_name == stored_name]
        self._take(chosen, by=f"take_state({name!r})")
        return state.take_state(name, chosen, limit=state.STATE_MAX if limit is None else limit)

    def take_remaining(self, *, by: str) -> tuple[InheritedFd, ...]:
        """Take all that nobody has taken yet.

        Args:
            by: Who takes it, in words.

        Returns:
            The descriptors; the caller owns them.

        Raises:
            AlreadyTakenError: They belong to the process that forked us.
            DescriptorError: Somebody closed one.
        """
        with lock:
            self.check_not_forked()
            remaining = self.remaining
            self._take(remaining, by=by)
            return remaining

    def close_remaining(self) -> None:
        """Close what nobody has taken; the manager's own descriptors stay open.

        Raises:
            AlreadyTakenError: They belong to the process that forked us.
            DescriptorError: Somebody closed one; nothing is closed.
        """
        for inherited in self.take_remaining(by="close_remaining()"):
            os.close(inherited.fd)

    def close_untaken_stored(self) -> list[str]:
        """Do what the function of this name does."""
        stored = [inherited for inherited in self.descriptors if inherited.stored_name]
        names = dict.fromkeys(inherited.stored_name for inherited in stored)
        for inherited in stored:
            try:
                self._take([inherited], by="close_untaken_stored()")
            except (AlreadyTakenError, DescriptorError):  # or somebody has closed it, who had no use for it
                names.pop(inherited.stored_name, None)
            else:
                os.close(inherited.fd)
        return list(names)

    def adopt(self, chosen: Sequence[InheritedFd], *, by: str) -> Listeners:
        """Take chosen listeners, all or none.

        Args:
            chosen: Some of `descriptors`, all of them listeners.
            by: Who takes them, in words.

        Returns:
            The listeners, which own their descriptors: non-blocking and close-on-exec.

        Raises:
            AlreadyTakenError: Somebody took one before.
            DescriptorError: Somebody closed one.
        """
        with lock:
            self._take(chosen, by=by)
            return Listeners(inherited.to_listener() for inherited in chosen)

    def check_not_forked(self) -> None:
        """Check that the descriptors were passed to this process.

        Raises:
            AlreadyTakenError: They belong to the process that forked us.
        """
        if self.forked:
            text = (
                f"{join(self.descriptors)}: passed to pid {self._pid}, which forked this one, {os.getpid()}. "
                f"Take them in pid {self._pid}, before it forks, and use the listeners made there."
            )
            raise AlreadyTakenError(text)

    def _named(self, name: str) -> list[InheritedFd]:
        chosen = [inherited for inherited in self.descriptors if inherited.name == name]
        if not chosen:
            passed = join(self.descriptors) or f"nothing ({self.absent})"
            text = (
                f"no passed descriptor is named {name!r}. Passed: {passed}. "
                f"Put FileDescriptorName={name} into the .socket unit."
            )
            raise NameNotFoundError(text)
        return chosen

    def _take(self, chosen: Iterable[InheritedFd], *, by: str) -> None:
        with lock:
            self.check_not_forked()
            for inherited in chosen:
                if inherited.taken_by is not None:
                    text = f"{inherited} was taken before, by {inherited.taken_by}; {by} comes second"
                    raise AlreadyTakenError(text)
                inherited.check_same()
            self.claim()
            for inherited in chosen:
                inherited.taken_by = by


def process_activation() -> Activation:
    """Return what was passed to this process, claimed or not yet; the caller holds `lock`.

    Raises:
        ListenEnvironmentError: A LISTEN_* variable is malformed, or the backend disagrees.
        DescriptorError: A descriptor that should have been passed is not open.
    """
    if _process is not None:
        return _process
    # A child that was forked before the claim still has its parent's variables and descriptors. To read them
    # as foreign ones would say that nothing was passed, and to bind would be right.
    pid = _importer if os.environ.get("LISTEN_PID") == str(_importer) else os.getpid()
    environment = _read(os.environ, pid)
    activation = Activation(environment, own=True, pid=pid)
    if activation.remaining:
        require_agreement({found.fd: environment.name(found.fd) for found in activation.descriptors})
    return activation


def listen_fds() -> tuple[InheritedFd, ...]:
    """Take every descriptor that was passed and that nobody has taken yet: sd_listen_fds(3).

    Returns:
        The descriptors in the order of their numbers; the caller owns them. Empty if nothing was passed.

    Raises:
        ListenEnvironmentError: A LISTEN_* variable is malformed.
        AlreadyTakenError: They belong to the process that forked us.
        DescriptorError: A descriptor is not open.
    """
    with lock:
        return process_activation().take_remaining(by="listen_fds()")


def close_untaken_stored() -> tuple[str, ...]:
    """Close what the manager's fd store passed under sdlisten's own names and nobody has taken.

    Nothing happens in a forked child, or if nobody has claimed what was passed to this process.

    Returns:
        The names to remove from the store: those of which nobody took or closed anything.
    """
    with lock:
        if _process is None or _process.forked:
            return ()
        return tuple(_process.close_untaken_stored())


def lifeline() -> int | None:
    """Return the number of what ``sdlisten.lifeline`` describes, *borrowed*; None in a forked child, too."""
    return None if _process is None or _process.forked else _process.lifeline


def _read(environ: Mapping[str, str], pid: int) -> ListenEnvironment:
    own = pidfdid() if "LISTEN_PIDFDID" in environ and pid == os.getpid() else None
    return read_listen_environment(environ, pid=pid, pidfdid=own)


def _describe_passed(fd: int, last: int) -> Descriptor:
    try:
        return describe(fd)
    except OSError as error:
        text = (
            f"LISTEN_FDS={last - LISTEN_FDS_START} promises fd {LISTEN_FDS_START} to {last - 1}, but fd {fd} "
            f"is not open ({error.strerror}): something between the manager and us closed it"
        )
        raise DescriptorError(text, fd=fd) from error


def _after_fork_in_child() -> None:
    # Another thread may have held the lock when this one forked.
    global lock  # noqa: PLW0603
    lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
