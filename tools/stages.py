"""``make test`` and its parts: nox sessions with a budget each, and at the end a line for each.

The tests wait more than they compute (for containers, restarts, deadlines), so `_test` runs several sessions
side by side. What a session prints is shown when it has ended, so that nothing is mixed up.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tools.checkout import ROOT, SetupError, pip_install, say, venv_python
from tools.packages import provide_packages
from tools.pythons import find_pythons

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

    from tools.pythons import Interpreter

__all__ = ()

# Seconds on two cores, side by side. They inform and do not gate: a slow machine fails no test.
_BUDGETS = {
    "setup": 45,
    "wheel": 10,
    "lint": 15,
    "types": 45,
    "tests": 340,
    "coverage": 15,
    "docs": 30,
    "machines": 600,
    "containers": 300,
    "suite": 270,
    "soak": 3600,
}
_LANES = 4
_SOAK_ROUNDS = "20"
_USAGE = 2
_INTERRUPTED = 130


_Chain: TypeAlias = "Sequence[tuple[str, dict[str, str]]]"
"""Nox sessions, one after the other, each with what its environment has in addition."""


class _Result(NamedTuple):
    stage: str
    verdict: str
    seconds: float


class _Runner:
    """Runs stages and remembers how they ended."""

    def __init__(self) -> None:
        self.results: list[_Result] = []
        self._environ = dict(os.environ)
        self._printing = threading.Lock()
        self._began = time.monotonic()
        self._interrupted = False

    @contextmanager
    def stage(self, name: str, *, output: IO[str] | None = None) -> Iterator[None]:
        """Time a stage. A command that fails ends the stage, not the run; it has said why itself.

        Args:
            name: What is timed and budgeted.
            output: Where its commands print, if that is to be shown at the end.
        """
        say(f"\n=== {name}: budget {_budget(name)} s")
        start = time.monotonic()
        verdict = "failed"
        try:
            yield
            verdict = "ok"
        except subprocess.CalledProcessError:
            pass
        finally:
            self.results.append(_Result(name, verdict, time.monotonic() - start))
            with self._printing:
                if output is not None:
                    output.seek(0)
                    say(f"\n=== {name} printed:\n{output.read()}")
                say(f"=== {name}: {verdict} in {self.results[-1].seconds:.1f} s")

    def set_up(self, pythons: list[Interpreter], *, for_tests: bool) -> None:
        """Make ``.venv`` with nox; `for_tests`, also install what the system lacks.

        Raises:
            SetupError: Something is missing that only the user can provide.
        """
        with self.stage("setup"):
            if for_tests:
                provide_packages(pythons)
            has_nox = subprocess.run([venv_python(), "-c", "import nox"], check=False, capture_output=True)
            if has_nox.returncode != 0:
                say("installing nox into .venv …")
                pip_install(*_project()["dependency-groups"]["nox"])
        # nox finds python3.12 by PATH: the Pythons that run go before shims that do not.
        places = [str(python.path.parent) for python in pythons]
        self._environ["PATH"] = os.pathsep.join([*places, *os.get_exec_path()])

    def nox(self, session: str, *, hold_back: bool = False, **environ: str) -> None:
        """Run one nox session as a stage; `hold_back`, show what it prints only when it has ended."""
        command = [str(venv_python()), "-m", "nox", "--session", session]
        if not hold_back:
            with self.stage(session):
                _run(command, self._environ | environ)
            return
        with tempfile.TemporaryFile("w+", errors="replace") as output, self.stage(session, output=output):
            _run(command, self._environ | environ, output)

    def side_by_side(self, *chains: _Chain) -> None:
        """Run chains of nox sessions, `_LANES` at the same time, the sessions of a chain one after the other.

        Args:
            chains: In the order in which they are begun: the longest first.
        """

        def run_chain(chain: _Chain) -> None:
            for session, environ in chain:
                if not self._interrupted:
                    self.nox(session, hold_back=True, **environ)

        with ThreadPoolExecutor(_LANES) as pool:
            try:
                for done in [pool.submit(run_chain, chain) for chain in chains]:
                    done.result()
            except KeyboardInterrupt:
                self._interrupted = True  # what runs has been interrupted too, and is waited for
                raise

    def remember(self, name: str, value: Path) -> None:
        """Set an environment variable for all later stages."""
        self._environ[name] = str(value)

    def summary(self) -> int:
        """Print a line for each stage; return the exit code of it all."""
        say("")
        for stage, verdict, seconds in self.results:
            late = ", over its budget" if seconds > _budget(stage) else ""
            say(f"{stage:<13} {verdict:<6} {seconds:6.1f} s of {_budget(stage):>4} s{late}")
        say(f"{'together':<20} {time.monotonic() - self._began:6.1f} s, side by side")
        return 0 if all(result.verdict == "ok" for result in self.results) else 1


def _run(command: list[str], environ: dict[str, str], output: IO[str] | None = None) -> None:
    errors = None if output is None else subprocess.STDOUT
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=errors) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            # subprocess.run() would kill it a moment later; it has to stop what it started.
            process.wait()
            raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def _budget(stage: str) -> int:
    return _BUDGETS[stage.partition("-")[0]]


def _project() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _has_integration() -> bool:
    return any((ROOT / "integration").rglob("test_*.py"))


def _supported_pythons() -> list[Interpreter]:
    """Return the Pythons to test on, oldest first, and print which these are.

    Raises:
        SetupError: There is none.
    """
    classifiers = _project()["project"]["classifiers"]
    found = find_pythons()
    supported = [p for p in found if f"Programming Language :: Python :: {p.minor}" in classifiers]
    for python in found:
        note = "" if python in supported else ": not used, pyproject.toml does not name it"
        place = str(python.path).replace(str(Path.home()), "~", 1)
        say(f"Python {python.version:<8} {place}{note}")
    if not supported:
        raise SetupError("none of these is a Python that pyproject.toml names")
    return supported


def _test(runner: _Runner) -> None:
    pythons = _supported_pythons()
    runner.set_up(pythons, for_tests=True)
    runner.nox("wheel")
    for wheel in (ROOT / "build" / "wheel").glob("*.whl"):
        runner.remember("SDLISTEN_WHEEL", wheel)
    oldest, *others = (f"tests-{python.minor}" for python in pythons)
    # Coverage is measured on the oldest; on the others the tests run undisturbed.
    measured: _Chain = [(oldest, {"SDLISTEN_COVERAGE": "1"}), (f"coverage-{pythons[0].minor}", {})]
    # The longest first, so that the end is not waited for with one lane in use.
    with_engine = ("machines", "suite", "containers") if _has_integration() else ()
    alone: list[_Chain] = [[(name, {})] for name in (*with_engine, *others, "types", "docs", "lint")]
    runner.side_by_side(*alone[:1], measured, *alone[1:])


def _soak(runner: _Runner) -> None:
    rounds = os.environ.get("SDLISTEN_ROUNDS", _SOAK_ROUNDS)
    now = dt.datetime.now(tz=dt.UTC)
    log = ROOT / "bench" / "results" / f"soak-{now:%Y%m%d-%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _copy_output_to(log)
    say(f"{log.relative_to(ROOT)}: SDLISTEN_ROUNDS={rounds} on {platform.platform()}, {os.cpu_count()} cores")
    runner.set_up(_supported_pythons(), for_tests=True)
    runner.nox("soak", SDLISTEN_ROUNDS=rounds)


def _copy_output_to(log: Path) -> None:
    """Let all that we and our children print from now on go to `log` as well."""
    # In a session of its own, so that Ctrl-C does not end it before us.
    tee = subprocess.Popen(["tee", log], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None  # noqa: S101 - for the type checker
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    tee.stdin.close()


def main(what: str) -> int:
    """Run ``test``, ``soak`` or a nox session; return the exit code: 2 if something has to be installed."""
    runner = _Runner()
    if what in {"test", "soak"} and sys.platform != "linux":
        say(f"The tests need Linux, this is {platform.system()}. The demo runs here: make demo")
        return _USAGE
    try:
        if what == "test":
            _test(runner)
        elif what == "soak":
            _soak(runner)
        else:
            runner.set_up([], for_tests=False)
            runner.nox(what)
    except SetupError as error:
        say(str(error))
        return _USAGE
    except KeyboardInterrupt:
        say("interrupted")
        runner.summary()
        return _INTERRUPTED
    return runner.summary()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
