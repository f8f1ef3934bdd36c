"""Fixtures: an engine, images of this checkout, machines with systemd 252, 257 and 262, plain containers.

What a test asks for
    ``machine``       a booted `Machine`; the test runs once on each systemd: ids ``systemd252``,
                      ``systemd257``, ``systemd262`` (``-k systemd257`` picks one). Booted once per run and
                      shared: all that a test puts, installs and starts there is undone after it.
    ``plain``         a function: ``plain(*command, tini=…, ipv6=…, env=…)`` starts a `Plain` container with
                      the library in it, removed after the test.
    ``rounds``        a function: ``rounds(20)`` is 20, times SDLISTEN_ROUNDS if that is set.
    ``images``        a function: ``images(release)`` is the tag of an image with the library in it.
    ``suite_image``   the tag of an image that has the dependencies of ``tests/``, too, on Python 3.14.
    ``engine``, ``network``   for tests that make containers of their own: `Plain` and `Machine`.

Marks
    ``@pytest.mark.systemd(since=257)``   runs only on these versions, without a skip on the others.
    ``@pytest.mark.timeout(S)``           unless a test says otherwise: 120 s, fixtures not counted.
    ``@pytest.mark.machine``              what asks for ``machine`` has it by itself, for ``pytest -m``.

A set-up that several tests share (module scope) goes into ``with machine.cleanup():``; what it adds outlives
the clean-up after each test. Without an engine the tests are skipped with the reason; with SDLISTEN_NO_SKIP=1
every skip is a failure.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from docker.errors import ImageNotFound
from testcontainers.core.config import testcontainers_config

from .container import Plain
from .engine import EngineUnavailableError, answers, lease
from .images import RELEASES, Release, abandon, connect, image
from .machine import Machine
from .session import create_network, remove_leftovers, remove_own

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from concurrent.futures import Future
    from types import FrameType

    import docker

NO_SKIP = os.environ.get("SDLISTEN_NO_SKIP") == "1"

TEST_SECONDS = 120
TRIXIE = RELEASES[1]


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks; let SIGTERM end a run as Ctrl-C does, both at once and with fixtures torn down."""
    config.addinivalue_line("markers", "systemd(since): the first version of systemd that has what is tested")
    config.addinivalue_line("markers", "machine: runs on a booted systemd")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    abandon()
    signal.default_int_handler(number, frame)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `machine` on each systemd, or on those that its mark ``systemd`` admits."""
    if "machine" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("systemd")
        since = mark.kwargs["since"] if mark else 0
        releases = [release for release in RELEASES if release.systemd >= since]
        metafunc.parametrize(
            "machine", releases, indirect=True, scope="session", ids=lambda release: release.id
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its marks. Fixtures have no time limit: the first one may have to build images."""
    here = Path(__file__).parent
    asked = float(config.getoption("timeout") or 0)  # a soak needs longer
    for item in items:
        if here in item.path.parents:
            mark = item.get_closest_marker("timeout")
            seconds = max(asked, mark.args[0] if mark else TEST_SECONDS)
            item.add_marker(pytest.mark.timeout(seconds, func_only=True), append=False)
            if "machine" in getattr(item, "fixturenames", ()):
                item.add_marker("machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn every skip into a failure where nothing may be skipped."""
    report = yield
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = call.excinfo.value if call.excinfo else report.longrepr
        report.longrepr = f"{item.nodeid} is skipped, which SDLISTEN_NO_SKIP=1 forbids: {reason}"
    return report


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[docker.DockerClient]:
    """A client of an engine that answers, started for this run if none did; nothing of ours is left in it."""
    if not answers():
        _say(request, "no docker engine answers: starting one")
    try:
        with lease(), contextlib.closing(connect()) as client:
            _without_ryuk_unless_there(client)
            remove_leftovers(client)
            try:
                yield client
            finally:
                remove_own(client)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def network(engine: docker.DockerClient) -> str:
    """The name of this run's network; it has IPv6 if the kernel has it."""
    return create_network(engine)


@pytest.fixture(scope="session")
def images(engine: docker.DockerClient, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """A function: the tag of a release's image. Those that the selected tests need are built from now on."""
    assert engine.ping()
    fixtures = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ThreadPoolExecutor(len(RELEASES)) as pool:

        @functools.cache
        def begin(release: Release, *, test_dependencies: bool = False) -> Future[str]:
            return pool.submit(image, release, test_dependencies=test_dependencies)

        for release in _wanted(request):
            begin(release)
        if "plain" in fixtures:
            begin(TRIXIE)
        if "suite_image" in fixtures:
            begin(RELEASES[-1], test_dependencies=True)
        yield lambda release, **options: _tag(begin(release, **options))


@pytest.fixture(scope="session")
def fleet(
    images: Callable[..., str], network: str, request: pytest.FixtureRequest
) -> Iterator[Mapping[Release, Future[Machine]]]:
    """The machines that the selected tests need, all of them booting at once."""
    wanted = _wanted(request)
    _say(request, f"booting {', '.join(release.id for release in wanted)}; images are built if need be")

    def boot(release: Release) -> Machine:
        return Machine(images(release), release, network=network).start()

    with ThreadPoolExecutor(len(wanted)) as pool:
        booting = {release: pool.submit(boot, release) for release in wanted}
        yield booting
        booted = [future.result() for future in booting.values() if future.exception() is None]
        list(pool.map(Machine.stop, booted))  # what did not boot: see `engine`


@pytest.fixture(scope="session")
def machine(fleet: Mapping[Release, Future[Machine]], request: pytest.FixtureRequest) -> Machine:
    """A booted machine; the test runs once on each."""
    return fleet[request.param].result()


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Undo what the test did to its machine; see `Machine.cleanup`."""
    if "machine" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("machine").cleanup():
        yield


@pytest.fixture
def plain(images: Callable[..., str], network: str) -> Iterator[Callable[..., Plain]]:
    """Start a plain container with the library in it: the arguments of `Plain`, and `release` (trixie)."""
    images(TRIXIE)  # takes its time here, not in the test
    with contextlib.ExitStack() as stack:

        def start(*command: str, release: Release = TRIXIE, **options: Any) -> Plain:  # noqa: ANN401 -- Plain's
            return stack.enter_context(Plain(images(release), command, network=network, **options))

        yield start


@pytest.fixture(scope="session")
def suite_image(images: Callable[..., str]) -> str:
    """The tag of an image of the newest release with what tests/ needs; the tests themselves are not in."""
    return images(RELEASES[-1], test_dependencies=True)


@pytest.fixture(scope="session")
def rounds() -> Callable[[int], int]:
    """How often to repeat a proof: the number given, times SDLISTEN_ROUNDS; at least once."""
    factor = float(os.environ.get("SDLISTEN_ROUNDS") or 1)
    return lambda usual: max(1, round(usual * factor))


def _wanted(request: pytest.FixtureRequest) -> list[Release]:
    """Return the releases whose machines the selected tests ask for."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {parameters["machine"] for parameters in calls if "machine" in parameters}
    return [release for release in RELEASES if release in wanted]


def _tag(building: Future[str]) -> str:
    try:
        return building.result()
    except EngineUnavailableError as error:  # no mmdebstrap, and it cannot be installed
        pytest.skip(str(error))


def _without_ryuk_unless_there(client: docker.DockerClient) -> None:
    """Do without testcontainers' reaper if its image would have to be pulled: we clean up ourselves."""
    if not testcontainers_config.ryuk_disabled:
        try:
            client.images.get(testcontainers_config.ryuk_image)
        except ImageNotFound:
            testcontainers_config.ryuk_disabled = True


def _say(request: pytest.FixtureRequest, text: str) -> None:
    """Write a line to the terminal at once: what follows takes a while."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.write_line(f"\nintegration: {text}")
