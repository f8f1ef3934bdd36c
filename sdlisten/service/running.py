"""`serve`: adopt or bind, run a service with its signals, return when it is drained."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from sdlisten.activation import Activation
from sdlisten.address import parse_named_address
from sdlisten.adopt_or_bind import Adopt, listen
from sdlisten.descriptor import Kind
from sdlisten.listener import Listeners
from sdlisten.notifier import Notifier
from sdlisten.service.core import Service
from sdlisten.service.journal import set_up_logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from ssl import SSLContext
    from typing import Any, Literal

    from sdlisten.service.connection import Connection
    from sdlisten.service.report import DrainReport

__all__ = ("run", "serve", "take_sockets")


def serve(
    handler: Callable[[Connection], Awaitable[object]],
    *words: str,
    adopt: Adopt = Adopt.AUTO,
    ssl: SSLContext | None = None,
    log: Literal["stderr", "journal"] = "stderr",
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **service_options: Any,  # noqa: ANN401 - those of Service, which checks them
) -> DrainReport:
    """Run a daemon: get the sockets, say READY=1, serve, and drain on SIGTERM or SIGINT; SIGHUP reloads.

    Call it in the main thread. NOTIFY_SOCKET and WATCHDOG_* leave the environment, LISTEN_* too. Started
    for one connection (``Accept=yes``), it serves that one and returns.

    Afterwards SIGTERM and SIGHUP are ignored, if they had their default: who stops a service may say so
    twice, and the second one must not kill a process that is on its way out with 0.

    Args:
        handler: Called with each `Connection`; see `Service.attach`.
        words: ``[NAME=]ADDRESS`` for each endpoint, as `listen` takes them. None: whatever was passed.
        adopt: Whether to adopt or to bind.
        ssl: Serve TLS.
        log: Where log records go, if logging is not configured: "stderr", with ``<N>`` priorities if that is
            the journal; "journal": with fields, if python-systemd is installed, else as "stderr".
        loop_factory: Makes the event loop, such as ``uvloop.new_event_loop``; asyncio's own if None.
        service_options: Those of `Service`.

    Returns:
        What became of the last connections. The program should exit with 0.

    Raises:
        AddressError, ActivationError: As `listen`; exit with 78 (EX_CONFIG).
        OSError: Binding failed.
        ValueError: An option makes no sense.
    """
    set_up_logging(journal=log == "journal")
    service_options.setdefault("notifier", Notifier.from_environ(unset_environment=True))
    service = Service(**service_options)
    taken = take_sockets(words, adopt=adopt)
    if isinstance(taken, Listeners):
        service.attach(taken, handler, ssl=ssl)
    else:
        service.attach_connection(taken, handler, ssl=ssl)
    return run(service, loop_factory=loop_factory)


def run(
    service: Service, *, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> DrainReport:
    """Run a service with signal handlers as `serve` does, in a loop of its own.

    Args:
        service: With its listeners attached.
        loop_factory: Makes the event loop; asyncio's own if None.

    Raises:
        ValueError: This is not the main thread.
    """
    # Before the loop: 262 asks that the handler of SIGHUP is in place at READY=1.
    with _signals(service), asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(service.serve())


def take_sockets(words: Iterable[str], *, adopt: Adopt = Adopt.AUTO) -> Listeners | socket.socket:
    """Take what a daemon is to serve: its listeners, or the one connection that it was started for.

    Args:
        words: ``[NAME=]ADDRESS`` for each endpoint. None: all listeners that were passed.
        adopt: Whether to adopt or to bind.

    Returns:
        The listeners, or the connection (``Accept=yes``); the caller *takes ownership*.

    Raises:
        AddressError, ActivationError: As `sdlisten.listen`; what was taken is closed.
        OSError: Binding failed.
    """
    activation = Activation.current()
    free = [found for found in activation.remaining if found.kind.is_socket and not found.stored]
    if adopt is not Adopt.NEVER and [found.kind for found in free] == [Kind.CONNECTION]:
        return activation.take_sockets(free[0].name)[0]
    wanted = [parse_named_address(word) for word in words]
    listening = [found for found in free if found.kind is Kind.LISTENER]
    if not wanted and listening and adopt is not Adopt.NEVER:
        return activation.adopt(listening, by="serve()")
    with contextlib.ExitStack() as undo:
        taken = [
            undo.enter_context(listen(str(address), name=name, adopt=adopt)) for name, address in wanted
        ] or [listen(adopt=adopt)]
        undo.pop_all()
    return Listeners(listener for listeners in taken for listener in listeners)


@contextlib.contextmanager
def _signals(service: Service) -> Iterator[None]:
    # Not loop.add_signal_handler(): loop.close() would restore the default action before we can do otherwise.
    orders: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: service.stop,
        signal.SIGINT: service.stop,
        signal.SIGHUP: service.reload,
    }
    before = {number: signal.signal(number, _calling(order)) for number, order in orders.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Ignored, not handled: when Python ends, it gives back the default to all that have a handler.
            signal.signal(number, signal.SIG_IGN if handler == signal.SIG_DFL else handler)


def _calling(order: Callable[[], None]) -> Callable[[int, object], None]:
    return lambda _number, _frame: order()
