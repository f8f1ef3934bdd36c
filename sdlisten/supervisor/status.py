"""How the whole is: facts for programs, lines for people."""

from __future__ import annotations

import os
import time

from sdlisten.supervisor.phase import Phase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from sdlisten.supervisor.generation import Generation
    from sdlisten.supervisor.rollover import Rollover
    from sdlisten.supervisor.runner import Supervisor

__all__ = ("headline", "report", "shorter", "snapshot")


def headline(machine: Rollover, phase: Phase) -> str:
    """Say in one line where the whole is."""
    serving, trial = _name(machine.current), _name(machine.successor)
    return {
        Phase.NEW: "not started",
        Phase.STARTING: f"{trial} starts",
        Phase.SERVING: f"{serving} serves",
        Phase.ROLLING: f"{serving} serves, {trial} starts",
        Phase.SOAKING: f"{serving} serves, {trial} serves on trial",
        Phase.LEAVING: f"stopping; {serving} serves until the stop delay is over",
        Phase.STOPPING: "stopping; the last connections are finished",
        Phase.STOPPED: "stopped",
    }[phase]


def snapshot(supervisor: Supervisor) -> dict[str, Any]:
    """Return all that ``sdlisten ctl status --json`` has."""
    machine, now = supervisor.machine, time.monotonic()
    generations = [(machine.current, "serving"), (machine.successor, "starting")]
    if machine.phase is Phase.SOAKING:
        generations[1] = (machine.successor, "soaking")
    generations += [(generation, "draining") for generation in machine.draining]
    return {
        "phase": machine.phase.value,
        "summary": headline(machine, machine.phase),
        "pid": os.getpid(),
        "uptime": round(now - supervisor.started, 3),
        "generation": machine.current.number if machine.current else None,
        "command": list(machine.command),
        "rolls": machine.rolls,
        "refused": machine.refused,
        "restarts": machine.restarts,
        "killed": machine.killed,
        "stored": len(supervisor.store),
        "generations": [
            {
                "number": generation.number,
                "state": state,
                "command": list(generation.command),
                "workers": _workers(supervisor, generation, now),
            }
            for generation, state in generations
            if generation
        ],
        "listeners": supervisor.sockets.status(),
    }


def shorter(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a snapshot with less and less in it, for an answer that has a limit; ``cut`` says so.

    The rows of the workers go first. In the end there is little, but always the phase.
    """
    generations = [{**generation, "workers": []} for generation in facts["generations"]]
    yield {**facts, "generations": generations, "cut": True}
    yield {**{name: facts[name] for name in ("phase", "summary", "pid")}, "cut": True}


def report(facts: dict[str, Any]) -> str:
    """Write a snapshot for people."""
    counts = " · ".join(
        f"{name} {facts[name]}" for name in ("rolls", "refused", "restarts", "killed", "stored")
    )
    lines = [f"{facts['summary']} (pid {facts['pid']}, up {facts['uptime']:.0f} s)", counts]
    for generation in facts["generations"]:
        lines.append(
            f"generation {generation['number']} {generation['state']}: {' '.join(generation['command'])}"
        )
        for worker in generation["workers"]:
            line = f"  worker {worker['pid']} {worker['state']}, up {worker['uptime']:.0f} s"
            lines.append(f"{line}: {worker['status']}" if worker["status"] else line)
    for socket in facts["listeners"]:
        queue = "" if socket["queued"] is None else f", {socket['queued']} of {socket['backlog']} queued"
        lines.append(f"{socket['kind']} {socket['name']} {socket['address']}{queue}")
    return "\n".join(lines)


def _workers(supervisor: Supervisor, generation: Generation, now: float) -> list[dict[str, Any]]:
    processes = [supervisor.processes.get(worker) for worker in generation.workers]
    return [
        {
            "pid": process.pid,
            "slot": process.worker.slot.number,
            "state": process.worker.state.value,
            "uptime": round(now - process.started, 3),
            "crashes": process.worker.slot.crashes,
            "says": process.says,
            "status": process.status,
        }
        for process in processes
        if process
    ]


def _name(generation: Generation | None) -> str:
    return f"generation {generation.number}" if generation else "nobody"
