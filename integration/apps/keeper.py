"""A daemon that keeps a memfd, a listener and a state with its manager, over its restarts.

``keeper.py ADDRESS [EXTRA [COUNT]]``

It adopts or binds ADDRESS. With EXTRA it binds that on its first start, and later finds the listener in the
store; with COUNT it tries on its first start to store so many memfds, confirmed. A client of either gets a
line of JSON: who answers, where the listeners came from, what was found, what the store said to COUNT. The
state counts the starts. A word "" counts as missing.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from sdlisten import Activation, Adopt, Notifier, Service, StoreRefusedError, listen
from sdlisten.service import run, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdlisten import Connection, Listener

report: dict[str, Any] = {"pid": os.getpid()}


def memfd(text: str) -> int:
    """Return a memfd with a text."""
    fd = os.memfd_create("keeper")
    os.write(fd, text.encode())
    return fd


def read(fds: Iterable[int]) -> list[str]:
    """Return the texts of memfds."""
    return [os.pread(fd, 100, 0).decode() for fd in fds]


def stored(name: str) -> tuple[int, ...]:
    """Take the descriptors that were stored under a name."""
    activation = Activation.current()
    found = any(one.stored and one.name == name for one in activation.remaining)
    return activation.take_fds(name) if found else ()


def keep(notifier: Notifier, count: int) -> None:
    """Count this start; on the first one store a memfd, and as many as there is room for."""
    state = Activation.current().take_state("starts")
    starts = int(state.data) if state else 0
    report["starts"] = starts
    notifier.store_state("starts", f"{starts + 1}".encode())
    report["memfd"] = read(stored("memfd"))
    report["many"] = read(stored("many"))
    if not report["memfd"]:
        notifier.store(memfd(f"of {os.getpid()}"), name="memfd")
    if not starts:
        fds = [memfd(f"{number}") for number in range(count)]
        try:
            report["confirmed"] = bool(fds) and notifier.store(*fds, name="many", confirm=True)
        except StoreRefusedError as error:
            report["kept"] = error.kept
            report["error"] = str(error)
    notifier.barrier(5)


def extra(notifier: Notifier, address: str) -> list[Listener]:
    """Find the second listener in the store; or bind and store it."""
    if any(one.name == "extra" for one in Activation.current().remaining):
        return list(Activation.current().take_listeners("extra"))
    (listener,) = listen(address, adopt=Adopt.NEVER)
    notifier.store(listener, name="extra")
    return [listener]


async def tell(connection: Connection) -> None:
    """Tell a client."""
    _, writer = connection.streams()
    writer.write(f"{json.dumps(report)}\n".encode())
    await writer.drain()


def main() -> None:
    """Serve until told to stop."""
    address, second, count, *_ = [*sys.argv[1:], "", ""]
    set_up_logging()
    notifier = Notifier.from_environ(unset_environment=True)
    listeners = list(listen(address))
    if second:
        listeners += extra(notifier, second)
    report["origins"] = [listener.origin.value for listener in listeners]
    keep(notifier, int(count or 0))
    service = Service(notifier=notifier, idle_timeout=0)
    service.attach(listeners, tell)
    run(service)


if __name__ == "__main__":
    main()
