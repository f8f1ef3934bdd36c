"""What can be asked at the control socket, and the answer to it: now, or when it has happened."""

from __future__ import annotations

import time

from sdlisten.exit_codes import USAGE
from sdlisten.supervisor.control import Client
from sdlisten.supervisor.phase import Phase
from sdlisten.supervisor.status import report, snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeGuard

    from sdlisten.supervisor.action import Settle
    from sdlisten.supervisor.runner import Supervisor

__all__ = ("Questions",)

_SERVING = {Phase.SERVING, Phase.ROLLING, Phase.SOAKING}


class Questions:
    """Takes questions, hands orders on, and answers.

    Args:
        supervisor: Who is asked.
    """

    __slots__ = ("_supervisor", "_waiting_for_the_end")

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._waiting_for_the_end: list[Client] = []

    def take(self, question: Mapping[str, object], client: Client) -> None:
        """Answer a question, or remember who asked."""
        match question:
            case {"do": "status"}:
                facts = snapshot(self._supervisor)
                code = 0 if self._supervisor.machine.phase in _SERVING else 1
                client.answer(code, report(facts), status=facts)
            case {"do": "roll", **rest}:
                self._roll(rest, client)
            case {"do": "stop", **rest}:
                self._stop(rest, client)
            case _:
                client.answer(USAGE, f"{dict(question)!r} is no question")

    def settled(self, action: Settle, code: int, text: str, *, wrote: str) -> None:
        """Answer those who asked for a roll.

        Args:
            action: Who asked, and what became of it.
            code: The exit code for ``sdlisten ctl``.
            text: The outcome in words.
            wrote: The end of what the generation wrote to stderr, if that is of interest.
        """
        for requester in action.requesters:
            if isinstance(requester, Client):
                requester.answer(code, text, stderr=wrote, outcome=action.outcome.value)

    def ended(self, code: int) -> None:
        """Answer those who waited until all has stopped."""
        for client in self._waiting_for_the_end:
            client.answer(code, "stopped")

    def _roll(self, question: Mapping[str, object], client: Client) -> None:
        command = question.get("command")
        if command is not None and not _is_command(command):
            client.answer(USAGE, f"command is {command!r}: expected a list of words")
            return
        if not question.get("wait"):
            client.answer(0, "asked for a roll")
        self._supervisor.apply(self._supervisor.machine.roll(time.monotonic(), client, command))

    def _stop(self, question: Mapping[str, object], client: Client) -> None:
        if question.get("wait"):
            self._waiting_for_the_end.append(client)
        else:
            client.answer(0, "told to stop")
        self._supervisor.apply(self._supervisor.machine.stop(time.monotonic()))


def _is_command(words: object) -> TypeGuard[Sequence[str]]:
    if not isinstance(words, list) or not words:
        return False
    return all(isinstance(word, str) and "\0" not in word for word in words)
