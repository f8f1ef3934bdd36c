"""Behind a relay that drops most of what a manager is told: Podman's conmon, ``--sdnotify=container``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdlisten.testing import activate

from .test_podman import alone, image, podman

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("image", "podman")  # fixtures

SECONDS = 30.0
# What a confirmed store waits for a manager that does not answer.
LIMIT = 2.0

# Says how each of three calls ended and how long they took; then READY=1.
PROGRAM = """
import json, os, signal, sys, time
from sdlisten import Notifier, SdlistenError
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
notifier = Notifier.from_environ()
def store(): return notifier.store(os.memfd_create("kept"), name="kept", confirm=True)
def state(): return notifier.store_state("state", b"bytes", confirm=True)
told = []
start = time.monotonic()
for call in (store, store, state):
    try:
        told.append(f"{call()}")
    except SdlistenError as error:
        told.append(type(error).__name__)
print(json.dumps([time.monotonic() - start, *told]), "told", flush=True)
notifier.ready()
signal.pause()
"""


def test_store_behind_a_relay(image: str, podman: Mapping[str, str]) -> None:
    """What conmon drops is an error each time, and two seconds are the most that all of it costs."""
    command = ["python3", "-c", PROGRAM]
    run = alone("podman", "run", "--rm", "--network=none", "--sdnotify=container", image, *command)
    with activate(run, [], env=podman) as container:
        container.wait_ready(SECONDS)
        container.wait_output(" told\n", SECONDS)  # READY=1 goes another way, and may be faster
        line = next(line for line in container.output.splitlines() if line.endswith(" told"))
        said = [name for message in container.messages for name in message]
        assert container.terminate(SECONDS) == 0

    seconds, *told = json.loads(line.removesuffix(" told"))
    # Which one: conmon 2.1 reads a message without its descriptors, so the kernel closes them at once. One
    # that kept them open would be silent.
    assert set(told) <= {"StoreRefusedError", "BarrierTimeoutError"}
    assert seconds < 1.5 * LIMIT
    assert "READY" in said
    assert "FDSTORE" not in said
