"""What each check is. ``make`` runs these; by hand: ``.venv/bin/nox -s tests-3.12 -- -k name``.

Environments are kept between runs, and nothing is downloaded again: remove them with ``make clean``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5"
# virtualenv brings a pip of its own that is new enough, and needs no ensurepip (which Debian packages apart).
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
NO_SKIP = os.environ.get("SDLISTEN_NO_SKIP") == "1"
WHEELS = ROOT / "build" / "wheel"
COVERAGE = ROOT / "build" / "coverage"
SUITE = "integration/test_suite.py"

# Errors only: some machines' pip warns about each place that it looks at.
os.environ.setdefault("PIP_QUIET", "2")
os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
# Without it `python -m pytest` puts the checkout before the installed wheel, and the wheel goes untested.
os.environ["PYTHONSAFEPATH"] = "1"


def group(*names: str) -> tuple[str, ...]:
    """Return the requirements of dependency groups."""
    return nox.project.dependency_groups(PROJECT, *names)


def existing(*places: str) -> list[str]:
    """Return those of the top-level directories that this checkout has."""
    return [place for place in places if (ROOT / place).exists()]


def install_wheel(session: nox.Session) -> None:
    """Install the wheel that SDLISTEN_WHEEL names, or one built now."""
    wheel = os.environ.get("SDLISTEN_WHEEL") or build_wheel(session)
    session.install("--force-reinstall", "--no-deps", wheel)


def build_wheel(session: nox.Session) -> str:
    """Build the wheel into build/wheel/ and return its path."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    session.install(*PROJECT["build-system"]["requires"])
    build = ("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    session.run_install(*build, "--wheel-dir", str(WHEELS), str(ROOT))
    (wheel,) = WHEELS.glob("*.whl")
    return str(wheel)


def install_for_tests(session: nox.Session, name: str) -> None:
    """Install a group, and systemd-python; say which package does not exist for this Python."""
    try:
        session.install(*group(name))
    except CommandFailed:
        for requirement in group(name):
            install_if_possible(session, requirement)
    for requirement in group("systemd"):
        install_if_possible(session, requirement)


def install_if_possible(session: nox.Session, requirement: str) -> None:
    """Install a requirement, or say that it is missing; with SDLISTEN_NO_SKIP that is a failure."""
    try:
        session.install(requirement)
    except CommandFailed:
        text = f"{requirement} cannot be installed on Python {session.python or 'of this session'}"
        if NO_SKIP:
            session.error(f"{text}, and SDLISTEN_NO_SKIP is set")
        session.warn(f"{text}: tests that need it are skipped")


def run_pytest(session: nox.Session, *command: str, env: dict[str, str] | None = None) -> None:
    """Run the tests; after Ctrl-C they get the time to stop what they started, such as containers."""
    session.run(*command, env=env, interrupt_timeout=120, terminate_timeout=30)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel that all tests run on."""
    session.log(f"built {build_wheel(session)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check with ruff and import-linter."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache", "--no-logo")


@nox.session
def types(session: nox.Session) -> None:
    """Check with mypy --strict, the tests included."""
    session.install(*group("types"))
    session.run("mypy", *PROJECT["tool"]["mypy"]["files"], *existing("integration"))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run tests/ on the built wheel; with SDLISTEN_COVERAGE=1, measured for the session `coverage`."""
    measured = os.environ.get("SDLISTEN_COVERAGE") == "1"
    if measured:
        shutil.rmtree(COVERAGE, ignore_errors=True)
        COVERAGE.mkdir(parents=True)
    install_for_tests(session, "test")
    install_wheel(session)
    if not measured:
        run_pytest(session, "pytest", *session.posargs)
        return
    # Absolute, because children of the tests run elsewhere; coverage hands both on to them.
    command = ("coverage", "run", f"--rcfile={ROOT / 'pyproject.toml'}", "-m", "pytest")
    run_pytest(session, *command, *session.posargs, env={"COVERAGE_FILE": str(COVERAGE / "data")})


@nox.session(python=PYTHONS)
def coverage(session: nox.Session) -> None:
    """Hold every module to its coverage, from what the measured tests of the same Python left."""
    session.install(*(requirement for requirement in group("test") if requirement.startswith("coverage")))
    # Under another name than what was measured: some versions of `report` combine and delete that.
    env = {"COVERAGE_FILE": str(COVERAGE / "combined")}
    measured = [str(path) for path in COVERAGE.glob("data.*")]
    if not measured:
        session.error("nothing was measured: run a session tests-3.N with SDLISTEN_COVERAGE=1 first")
    session.run("coverage", "combine", "--keep", "--quiet", *measured, env=env, log=False)
    session.run("coverage", "report", env=env)
    session.run("coverage", "json", "--quiet", "-o", str(COVERAGE / "report.json"), env=env)
    session.run("python", "tools/coverage_gate.py", str(COVERAGE / "report.json"))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error. Its snippets run in the tests."""
    session.install(*group("docs"))
    install_wheel(session)
    session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", "docs/_build/html")


@nox.session
def machines(session: nox.Session) -> None:
    """Run those tests of integration/ that need a booted systemd, on the built wheel."""
    install_for_tests(session, "integration")
    install_wheel(session)
    run_pytest(session, "pytest", "integration", "-m", "machine", *session.posargs)


@nox.session
def containers(session: nox.Session) -> None:
    """Run the other tests of integration/, on the built wheel."""
    install_for_tests(session, "integration")
    install_wheel(session)
    # SUITE takes as long as all of tests/, whose run on one more Python it is: it has a session of its own.
    run_pytest(session, "pytest", "integration", "-m", "not machine", f"--ignore={SUITE}", *session.posargs)


@nox.session
def suite(session: nox.Session) -> None:
    """Run tests/ on the newest release of the integration tests, inside its image."""
    install_for_tests(session, "integration")
    install_wheel(session)
    run_pytest(session, "pytest", SUITE, *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run all tests with every repeated proof SDLISTEN_ROUNDS times as long."""
    install_for_tests(session, "integration")
    install_wheel(session)
    run_pytest(session, "pytest", "--timeout=3600", *existing("tests", "integration"), *session.posargs)
