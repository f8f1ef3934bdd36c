"""What a supervisor keeps in memory, and what a roll costs it: resident size, its private part, CPU time.

The program that it runs does nothing; so all that is measured is the supervisor. Goal: 15 MiB resident.

    python bench/supervisor_memory.py [--rolls N]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sdlisten.supervisor import ctl
from sdlisten.testing import activate

GOAL = 15.0  # MiB
PROGRAM = """
import os, signal, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
    sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""
KIB = {"Rss": "resident", "Pss": "proportional", "Private_Dirty": "private, written"}


def memory(pid: int) -> dict[str, float]:
    """Return what /proc says of the memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    words = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return {text: int(words[name][0]) / 1024 for name, text in KIB.items()}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used itself, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Measure, write, and return 0; 1 if a roll was refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rolls", type=int, default=50)
    rolls = parser.parse_args().rolls
    with tempfile.TemporaryDirectory() as directory:
        control = f"{directory}/control"
        run = [sys.executable, "-m", "sdlisten", "run", "--control", control, "--"]
        with activate([*run, sys.executable, "-I", "-S", "-c", PROGRAM], ["127.0.0.1:0"]) as supervisor:
            supervisor.wait_ready()
            before = memory(supervisor.pid)
            used = cpu_seconds(supervisor.pid)
            for _ in range(rolls):
                answer = ctl.ask(control, {"do": "roll", "wait": True})
                if answer["code"]:
                    sys.stderr.write(f"{answer['text']}\n")
                    return 1
            after = memory(supervisor.pid)
            used = cpu_seconds(supervisor.pid) - used
    lines = [
        f"{name:21} {before[name]:6.2f} MiB at the start, {mebibytes:6.2f} after {rolls} rolls"
        for name, mebibytes in after.items()
    ]
    verdict = "met" if after["resident"] <= GOAL else "missed"
    lines.append(f"{'goal, resident':21} {GOAL:6.2f} MiB: {verdict}")
    lines.append(f"{'CPU per roll':21} {used / rolls * 1000:6.2f} ms in the supervisor, to 10 ms / rolls")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
