"""`sdlisten run`, seen from outside: real supervisors, real programs, and what clients notice of it.

Numbers of faults are those of the list that the supervisor is held to: what an operator, a bad deploy, a
signal or the kernel can do to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sdlisten
from sdlisten.load import LoadProcess
from sdlisten.supervisor import ctl, nice
from sdlisten.testing import activate

from .supervised import (
    HELLO,
    SECONDS,
    answer,
    app,
    ask,
    children,
    descriptors,
    gone,
    is_free,
    supervisors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .supervised import Running


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Give a function that starts a supervisor; what it started is gone afterwards."""
    with supervisors(tmp_path) as start:
        yield start


BAD = {
    "raises": "raise RuntimeError('bad deploy')",
    "exits 0": "os._exit(0)",
    "hangs": "signal.pause()",
    "segfaults": "os.kill(os.getpid(), signal.SIGSEGV)",
}


def test_a_program_is_served_and_stopped(run: Callable[..., Running]) -> None:
    """The program gets the socket, our manager hears READY and STOPPING, and the exit code is 0."""
    running = run()

    pid, generation = running.get()
    assert ([pid], generation) == (running.pids("serving"), 1)
    assert running.ask("status")["code"] == 0
    assert running.daemon.terminate() == 0
    gone(pid)
    says = [
        word
        for message in running.daemon.messages
        for word in message
        if word in {"READY", "RELOADING", "STOPPING"}
    ]
    assert says == ["READY", "STOPPING"]


def test_rolls_under_load(run: Callable[..., Running], rounds: Callable[[int], int]) -> None:
    """Twenty rolls of two workers fail no request; descriptors and processes are then as before."""
    running = run("--workers", "2")
    count = rounds(20)
    running.roll()
    running.settled()
    before = descriptors(running.daemon.pid)
    with LoadProcess(running.word, mode="short") as load:
        load.wait_started()
        answers = [running.roll()["code"] for _ in range(count)]
        result = load.stop()

    assert result.clean, result
    assert answers == [0] * count
    facts = running.settled()
    assert (facts["rolls"], facts["restarts"], facts["killed"]) == (count + 1, 0, 0)
    assert descriptors(running.daemon.pid) == before
    assert children(running.daemon.pid) == sorted(running.pids())


@pytest.mark.parametrize(
    ("mode", "rate"),
    [("short", None), ("slow", None), ("keep", None), pytest.param("keep", 0, id="keep-no-pause")],
)
def test_hello_rolls_under_load(
    run: Callable[..., Running],
    rounds: Callable[[int], int],
    capsys: pytest.CaptureFixture[str],
    mode: str,
    rate: float | None,
) -> None:
    """Our own daemon, two workers of it, fails no request of any kind, however often it is rolled."""
    running = run("--workers", "2", command=[sys.executable, "-m", "sdlisten.hello"])
    with LoadProcess(running.word, mode=mode, rate=rate) as load:
        load.wait_started()
        answers = [running.roll()["code"] for _ in range(rounds(5))]
        result = load.stop()

    with capsys.disabled():
        sys.stdout.write(f"\n{rounds(5)} rolls: {result}\n")
    assert result.clean, result
    assert answers == [0] * rounds(5)
    facts = running.settled()
    assert (facts["restarts"], facts["killed"]) == (0, 0)


def test_clients_that_are_slow_during_a_switch(run: Callable[..., Running]) -> None:
    """Faults 21 to 23: nothing sent yet, half a request, two at once, an idle connection: all answered."""
    running = run(command=HELLO)
    with contextlib.ExitStack() as stack:
        fresh, half, kept, silent = (
            stack.enter_context(socket.create_connection(running.address, timeout=SECONDS)) for _ in range(4)
        )
        half.sendall(b"GET / HT")
        old = ask(kept).split()[-3:]
        running.roll()
        assert b"close" in ask(fresh).lower()
        assert ask(half, b"TP/1.1\r\nHost: x\r\n\r\n").split()[-3:] == old
        kept.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        assert answer(kept).split()[-3:] == old
        # Who says nothing for ever is closed in an orderly way, and holds nobody up.
        assert silent.recv(1) == b""
        facts = running.settled()
    assert (facts["restarts"], facts["killed"]) == (0, 0)


@pytest.mark.parametrize("kind", BAD)
def test_bad_deploys(run: Callable[..., Running], kind: str) -> None:
    """Faults 1 to 4: a version that does not start is refused, with its words; clients see nothing of it."""
    running = run("--ready-timeout", "3")
    old, _ = running.get()
    with LoadProcess(running.word, mode="short", rate=100) as load:
        load.wait_started()
        running.deploy(app(f"print('these are my last words', file=sys.stderr); {BAD[kind]}"))
        answer = running.roll()
        result = load.stop()

    assert result.clean, result
    assert list(result.pids) == [old]
    assert (answer["code"], "these are my last words" in answer["stderr"]) == (3, True)
    assert f"generation 2 was refused: a worker {'did not say' if kind == 'hangs' else ''}" in answer["text"]
    running.says("READY", 2)
    running.deploy(app())
    assert running.roll()["code"] == 0
    running.settled()
    assert running.get()[0] != old


def test_a_version_that_dies_in_the_soak(run: Callable[..., Running]) -> None:
    """Fault 5: it says READY and dies while the old generation still accepts: it is removed."""
    running = run("--soak", "60")
    old, _ = running.get()
    running.deploy(app(ready="os._exit(7)"))

    answer = running.roll()
    assert (answer["code"], answer["text"]) == (
        3,
        "the roll to generation 2 was refused: a worker exited with 7",
    )
    assert running.get()[0] == old


def test_a_version_that_dies_without_a_soak(run: Callable[..., Running]) -> None:
    """Fault 5: without a soak it is committed, crashes, and is replaced until a good version comes."""
    running = run()
    running.deploy(app(ready="os._exit(7)"))
    running.roll()
    running.until(lambda facts: facts["restarts"] > 1)

    running.deploy(app())
    running.until(
        lambda facts: (
            facts["generations"][0]["workers"] and facts["generations"][0]["workers"][0]["says"] == "READY"
        )
    )
    assert running.get()[1] == 2


def test_one_worker_of_a_generation_fails(run: Callable[..., Running], tmp_path: Path) -> None:
    """Fault 7: one of two is not ready: both go, and the old two serve on."""
    running = run("--workers", "2")
    old = running.pids()
    lock = tmp_path / "first"
    running.deploy(app(f"os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL)"))

    assert running.roll()["code"] == 3
    running.settled()
    assert running.pids() == old


def test_commands_that_cannot_be_executed(run: Callable[..., Running], tmp_path: Path) -> None:
    """Fault 8: a directory, a file that may not be executed, a missing interpreter, nothing at all."""
    running = run()
    (tmp_path / "plain").touch()
    (tmp_path / "script").write_text("#!/nonexistent/python\n")
    (tmp_path / "script").chmod(0o755)

    for name in ("", "plain", "script", "missing"):
        answer = running.roll(command=[str(tmp_path / name)])
        assert (answer["code"], "sdlisten: cannot execute" in answer["stderr"]) == (3, True), answer
    assert running.roll(command=["a\0b"])["code"] == 2
    assert running.get()[1] == 1


def test_no_descriptor_left(run: Callable[..., Running]) -> None:
    """Fault 9: if there are no descriptors to start a worker the roll is refused; later ones are not."""
    running = run()
    pid = running.daemon.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 2, hard))

    answer = running.roll()
    assert (answer["code"], "Too many open files" in answer["stderr"]) == (3, True), answer
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert running.roll()["code"] == 0
    running.settled()
    assert running.get()[1] == 3


def test_strange_messages(run: Callable[..., Running]) -> None:
    """Fault 10: no message, READY twice, and READY by a process that the worker has started."""
    running = run()
    hook = """
for text in "READY=0", "nonsense", "EXTEND_TIMEOUT_USEC=many", "X" * 5000:
    say(text)
if not os.fork():
    say("READY=1")
    say("READY=1")
    os._exit(0)
os.wait()
"""
    running.deploy(app(hook))

    assert running.roll()["code"] == 0
    running.settled()
    assert running.get()[1] == 2


def test_many_hangups_are_one_roll_and_one_more(run: Callable[..., Running]) -> None:
    """Fault 11: fifty SIGHUP while nothing goes on are a roll, and at most one after it."""
    running = run()
    for _ in range(50):
        os.kill(running.daemon.pid, signal.SIGHUP)

    running.says("READY", 2)
    facts = running.settled()
    assert facts["rolls"] in {1, 2}


def test_rolls_while_one_is_under_way(run: Callable[..., Running], tmp_path: Path) -> None:
    """Fault 12: what is asked for while a generation starts comes after it, once."""
    running = run()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    running.deploy(app(f"print('at the gate', flush=True); open({str(gate)!r}).read()"))
    running.ask("roll")
    running.reads("at the gate")
    running.ask("roll")
    running.ask("roll")
    running.deploy(app())
    gate.write_text("")

    facts = running.until(lambda facts: facts["phase"] == "serving" and facts["rolls"] == 2)
    assert facts["generation"] == 3


@pytest.mark.parametrize("state", ["starting", "serving", "rolling", "soaking", "draining"])
def test_a_stop_in_each_state(run: Callable[..., Running], state: str) -> None:
    """Fault 13: SIGTERM ends all at any time, and nobody is left; with 1 only if a drain was cut short."""
    running = in_state(run, state)
    pids = running.pids()

    running.daemon.terminate(SECONDS)
    assert running.daemon.returncode == (1 if state == "draining" else 0)
    for pid in pids:
        gone(pid)


@pytest.mark.parametrize("state", ["starting", "serving", "rolling", "soaking", "draining"])
def test_the_supervisor_is_killed_in_each_state(run: Callable[..., Running], state: str) -> None:
    """Fault 19: after SIGKILL every worker is told to end, and the port is free for the next start."""
    running = in_state(run, state)
    pids, address = running.pids(), running.address
    pidfds = [os.pidfd_open(pid) for pid in pids]
    os.kill(running.daemon.pid, signal.SIGKILL)

    for pidfd in pidfds:
        assert select.select([pidfd], [], [], SECONDS)[0]
        os.close(pidfd)
    running.daemon.terminate()
    running.daemon.listeners.close()
    assert is_free(address)


def in_state(run: Callable[..., Running], state: str) -> Running:
    """Start a supervisor and bring it into a state."""
    slow = app("signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.pause()")
    if state == "starting":
        running = run(text=slow, ready=False)
        running.reads("generation 1 starts")
        deadline = time.monotonic() + SECONDS
        while not os.path.exists(running.control) and time.monotonic() < deadline:
            select.select([], [], [], 0.01)
        running.until(lambda facts: bool(facts["generations"][0]["workers"]))
        return running
    running = run("--drain-timeout", "1", *(["--soak", "60"] if state == "soaking" else []))
    if state == "rolling":
        running.deploy(slow)
    if state == "draining":
        # The old generation has a request that takes as long as the test does.
        running.deploy(app(stop="print('draining', flush=True); select.select([4], [], [])"))  # the lifeline
        running.roll()
        running.deploy(app())
        running.roll()
        running.reads("draining")
    elif state != "serving":
        running.ask("roll")
    running.until(lambda facts: state in {facts["phase"], *(one["state"] for one in facts["generations"])})
    return running


def test_a_stop_at_the_very_beginning(run: Callable[..., Running]) -> None:
    """Fault 14: SIGTERM as early as it can come leaves nobody behind."""
    running = run(ready=False)

    assert running.daemon.terminate(SECONDS) in {0, -signal.SIGTERM}


def test_a_hangup_of_the_whole_group(run: Callable[..., Running]) -> None:
    """Fault 15: what is sent to our process group reaches the supervisor alone: a roll, an orderly end."""
    running = run()
    old, _ = running.get()
    assert os.getpgid(old) == old != os.getpgid(running.daemon.pid)

    os.kill(running.daemon.pid, signal.SIGHUP)
    running.says("READY", 2)
    os.kill(running.daemon.pid, signal.SIGINT)
    running.says("STOPPING")
    assert running.daemon.terminate(SECONDS) == 0


def test_the_old_generation_is_frozen_while_it_drains(run: Callable[..., Running]) -> None:
    """Fault 16: a worker that cannot react is killed at its limit."""
    running = run("--drain-timeout", "0.5")
    old, _ = running.get()
    os.kill(old, signal.SIGSTOP)

    assert running.roll()["code"] == 0
    gone(old)
    assert running.until(lambda facts: facts["killed"] == 1)["restarts"] == 0


def test_the_old_generation_thaws_while_it_drains(run: Callable[..., Running]) -> None:
    """Fault 16: one that reacts late, but in time, ends by itself."""
    running = run("--drain-timeout", "60")
    old, _ = running.get()
    os.kill(old, signal.SIGSTOP)
    running.roll()
    os.kill(old, signal.SIGCONT)

    gone(old)
    assert running.status()["killed"] == 0


def test_the_new_generation_is_frozen_before_the_switch(run: Callable[..., Running]) -> None:
    """Fault 17: with a watchdog a frozen successor is refused in the soak, and the old one serves on."""
    running = run("--soak", "60", "--watchdog", "0.5")
    old, _ = running.get()
    running.deploy(app(ready="say('WATCHDOG=1'); os.kill(os.getpid(), signal.SIGSTOP)"))

    assert running.roll()["code"] == 3
    assert "no sign of life" in running.daemon.output
    running.settled()
    assert running.get()[0] == old


def test_the_old_generation_is_killed_while_it_drains(run: Callable[..., Running]) -> None:
    """Fault 18: its end is an end; it is not replaced, and the new one serves."""
    running = in_state(run, "draining")
    (old,) = running.pids("draining")
    os.kill(old, signal.SIGKILL)

    gone(old)
    facts = running.settled()
    assert (facts["restarts"], facts["phase"]) == (0, "serving")


def test_a_short_queue(run: Callable[..., Running]) -> None:
    """Fault 29: with room for one connection in the queue clients wait, and none is refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as sock:
        running = run(sockets=[("http", sock)])
        with LoadProcess(f"127.0.0.1:{sock.getsockname()[1]}", mode="short", clients=4, rate=40) as load:
            load.wait_started()
            assert [running.roll()["code"] for _ in range(3)] == [0] * 3
            result = load.stop()
        (listener,) = running.status()["listeners"]

    assert result.clean, result
    assert listener["backlog"] == 1


@pytest.mark.parametrize(("options", "blocking"), [((), True), (("--non-blocking",), False)])
def test_how_listeners_are_passed(
    run: Callable[..., Running], options: tuple[str, ...], blocking: bool
) -> None:
    """Fault 33: accept(2) waits, as under systemd, unless asked for otherwise; a roll leaves it as it is."""
    running = run(*options, text=app("print('blocking', blocking); sys.stdout.flush()"))

    running.reads(f"blocking {blocking}")
    running.roll()
    running.reads("blocking False")


def test_a_worker_that_shuts_the_listener_down(run: Callable[..., Running]) -> None:
    """Fault 34: shutdown() on a shared TCP socket is mended, and listen(1) is seen in the status."""
    running = run()
    running.deploy(app("listener.shutdown(socket.SHUT_RDWR); raise SystemExit"))
    assert running.roll()["code"] == 3
    running.reads("a worker has shut down the listener 'http'; it listens again")
    assert running.get()[1] == 1
    assert running.status()["listeners"][0]["backlog"] == 4096
    running.deploy(app("listener.listen(1)"))
    running.roll()
    assert running.status()["listeners"][0]["backlog"] == 1


def test_a_worker_that_shuts_a_unix_listener_down(run: Callable[..., Running], tmp_path: Path) -> None:
    """Fault 34: a unix listener stays shut down, and that is said once."""
    running = run(sockets=[f"http={tmp_path}/socket"])
    running.deploy(app("listener.shutdown(socket.SHUT_RDWR); raise SystemExit"))
    running.roll()

    running.reads("a worker has shut down the listener 'http', which cannot be undone")
    assert running.daemon.output.count("which cannot be undone") == 1


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"LISTEN_FDS": "x"}, "LISTEN_FDS='x'"),
        ({"LISTEN_FDNAMES": "a:b"}, "LISTEN_FDNAMES"),
    ],
)
def test_a_bad_environment(env: dict[str, str], text: str) -> None:
    """Fault 35: what cannot be used ends the supervisor with 78, before anything is started."""
    script = f"LISTEN_PID=$$ exec {sys.executable} -m sdlisten run -- true"
    environ = {**os.environ, "LISTEN_FDS": "1", **env}
    done = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True, check=False)

    assert (done.returncode, text in done.stderr) == (78, True), done.stderr


def test_nothing_to_serve() -> None:
    """Without -l and without anything passed there is nothing to hold: 78."""
    done = subprocess.run(
        [sys.executable, "-m", "sdlisten", "run", "--", "true"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, "no -l" in done.stderr) == (78, True)


def test_what_a_worker_finds(run: Callable[..., Running]) -> None:
    """Faults 36 and 37: its own variables, its own descriptors, and nothing of ours or of our manager's."""
    hook = """
import json
ours = ("LISTEN", "SDLISTEN", "WATCHDOG", "NOTIFY", "MINE", "FDSTORE")
facts = {name: value for name, value in os.environ.items() if name.startswith(ours)}
for name in ("BASE_IMAGE", "COVERAGE", "NO_SKIP", "ROUNDS", "WHEEL"):
    facts.pop(f"SDLISTEN_{name}", None)  # of the tests
facts["fds"] = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:7]
facts["own"] = int(facts.pop("LISTEN_PID")) == os.getpid()
print(json.dumps(facts), end="|"); sys.stdout.flush()
"""
    env = {"WATCHDOG_USEC": "9000000", "FDSTORE": "7", "MINE": "yes", "SDLISTEN_GENERATION": "77"}
    running = run(text=app(hook), env=env, sockets=["http=127.0.0.1:0", "admin=127.0.0.1:0"])

    running.reads("|")
    output = running.daemon.output
    facts = json.loads(output[output.index("{") : output.index("|")])
    facts.pop("LISTEN_PIDFDID", None)
    assert facts.pop("NOTIFY_SOCKET") != running.daemon._environ["NOTIFY_SOCKET"]
    # 3 and 4 were passed, 5 is the lifeline, 6 lists the directory.
    assert facts.pop("fds")[:6] == [0, 1, 2, 3, 4, 5]
    assert facts == {
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "http:admin",
        "MINE": "yes",
        "SDLISTEN_CONTROL": running.control,
        "SDLISTEN_FDSTORE": "1000",
        "SDLISTEN_GENERATION": "1",
        "SDLISTEN_LIFELINE_FD": "5",
        "WATCHDOG_USEC": "9000000",
        "own": True,
    }


def test_strangers_are_reaped(tmp_path: Path) -> None:
    """Fault 38: children that it never started, ended before it began or later, leave no zombies."""
    app_file = tmp_path / "app.py"
    app_file.write_text(app())
    words = [sys.executable, "-m", "sdlisten", "run", "--", sys.executable, "-I", "-S", str(app_file)]
    script = f"for i in 0 0 0 0.1 1; do sleep $i & done; exec {' '.join(words)}"
    with activate(["sh", "-c", script], ["http=127.0.0.1:0"]) as daemon:
        daemon.wait_ready(SECONDS)
        deadline = time.monotonic() + SECONDS
        while len(children(daemon.pid)) > 1 and time.monotonic() < deadline:
            select.select([], [], [], 0.01)
        assert len(children(daemon.pid)) == 1


def test_a_manager_that_is_gone(run: Callable[..., Running]) -> None:
    """Fault 42: a NOTIFY_SOCKET that nobody reads, or that has vanished, stops nothing."""
    running = run()
    assert running.daemon._receiver
    running.daemon._receiver.close()

    assert running.roll()["code"] == 0
    running.settled()
    assert running.get()[1] == 2


def test_a_full_manager(run: Callable[..., Running], rounds: Callable[[int], int]) -> None:
    """Fault 42: a queue that nobody empties stops nothing."""
    running = run()

    assert [running.roll()["code"] for _ in range(rounds(20))] == [0] * rounds(20)
    running.settled()
    assert running.get()[1] == rounds(20) + 1


def test_words_of_one_worker_stay_here(run: Callable[..., Running]) -> None:
    """A child's RELOADING and STOPPING are noted, and never forwarded."""
    running = run(text=app(ready="say('RELOADING=1'); say('STOPPING=1')"))
    running.until(lambda facts: facts["generations"][0]["workers"][0]["says"] == "STOPPING")

    said = {word for message in running.daemon.messages for word in message}
    assert said & {"READY", "RELOADING", "STOPPING"} == {"READY"}


def test_a_reload_is_told_whatever_becomes_of_it(run: Callable[..., Running]) -> None:
    """Around each roll stand RELOADING=1, with its time, and READY=1; the status says how it went."""
    running = run()
    running.roll()
    running.deploy(app(BAD["raises"]))
    running.roll()
    running.says_status("the roll to generation 3 was refused")
    messages = running.daemon.messages

    words = [word for message in messages for word in message if word in {"READY", "RELOADING"}]
    assert words == ["READY", "RELOADING", "READY", "RELOADING", "READY"]
    assert all("MONOTONIC_USEC" in message for message in messages if "RELOADING" in message)
    assert "EXTEND_TIMEOUT_USEC" in {word for message in messages for word in message}


def test_our_own_watchdog_is_fed(run: Callable[..., Running]) -> None:
    """With WATCHDOG_USEC the supervisor shows life, also while nothing happens."""
    running = run(env={"WATCHDOG_USEC": "300000"})

    running.says("WATCHDOG", 3)


def test_a_worker_that_hangs_is_replaced(run: Callable[..., Running]) -> None:
    """A worker that stops sending WATCHDOG=1 is killed and replaced; one may also ask for it."""
    running = run("--watchdog", "0.5", text=app(ready="say('WATCHDOG=1'); signal.pause()"))
    (first,) = running.pids()
    gone(first)
    running.deploy(app(ready="say('WATCHDOG_USEC=60000000\\nWATCHDOG=1'); say('WATCHDOG=trigger')"))

    running.until(lambda facts: facts["killed"] > 2)
    assert "no sign of life (WATCHDOG=1)" in running.daemon.output


def test_a_worker_that_needs_more_time(run: Callable[..., Running], tmp_path: Path) -> None:
    """EXTEND_TIMEOUT_USEC prolongs the start."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    running = run("--ready-timeout", "1")
    wait = f"print('at the gate', flush=True); open({str(gate)!r}).read()"
    running.deploy(app(f"say('EXTEND_TIMEOUT_USEC=60000000'); {wait}"))
    running.ask("roll")
    running.reads("at the gate")
    started = running.until(lambda facts: facts["phase"] == "rolling")["uptime"]
    running.until(lambda facts: facts["uptime"] > started + 1)  # the limit without it
    gate.write_text("")

    assert running.until(lambda facts: facts["rolls"] == 1)["refused"] == 0


def test_descriptors_are_kept_over_generations(run: Callable[..., Running]) -> None:
    """FDSTORE=1 gives a descriptor to all who start later; FDSTOREREMOVE=1 and a hang-up take it away."""
    show = "print(os.environ['SDLISTEN_GENERATION'], os.environ['LISTEN_FDNAMES'], flush=True)"
    mine = "a, b = os.pipe(); say('FDSTORE=1\\nFDNAME=mine\\nFDPOLL=0', [a])"
    running = run(text=app(f"{show}; {mine}; c, d = os.pipe(); say('FDSTORE=1', [c])"))
    running.reads("1 http")
    running.until(lambda facts: facts["stored"] == 2)
    running.deploy(app(f"{show}; say('FDSTOREREMOVE=1\\nFDNAME=mine')"))
    running.roll()
    running.reads("2 http:mine:stored")
    running.until(lambda facts: facts["stored"] == 0)
    running.deploy(app(show))
    running.roll()

    running.reads("3 http\n")


def test_the_environment_file_is_read_at_each_roll(run: Callable[..., Running], tmp_path: Path) -> None:
    """A changed file counts from the next roll on; a bad one refuses it."""
    file = tmp_path / "environment"
    file.write_text("# a comment\n\nVALUE='one'\n")
    running = run("--env-file", str(file), text=app("print(os.environ['VALUE'], flush=True)"))
    running.reads("one")
    file.write_text("VALUE=two")
    running.roll()
    running.reads("two")
    file.write_text("VALUE")

    answer = running.roll()
    assert (answer["code"], "'VALUE' is no assignment" in answer["stderr"]) == (3, True)


def test_the_pid_file(run: Callable[..., Running], tmp_path: Path) -> None:
    """It names the supervisor while that runs."""
    file = tmp_path / "pid"
    running = run("--pid-file", str(file))

    assert file.read_text() == f"{running.daemon.pid}\n"
    running.daemon.terminate()
    assert not file.exists()


def test_a_pid_file_that_cannot_be(run: Callable[..., Running], tmp_path: Path) -> None:
    """It says so, ends with 1, and leaves nothing behind."""
    directory = tmp_path / "pids"
    (directory / "pid").mkdir(parents=True)
    running = run("--pid-file", str(directory / "pid"), ready=False)

    running.reads("Is a directory")
    assert running.daemon.terminate() == 1
    assert os.listdir(directory) == ["pid"]


def test_usr1_writes_the_status(run: Callable[..., Running]) -> None:
    """SIGUSR1 writes, in lines of ours, what ctl status says."""
    running = run()
    os.kill(running.daemon.pid, signal.SIGUSR1)

    running.reads("sdlisten: rolls 0")
    running.reads(f"sdlisten: listener http {running.word}, 0 of 4096 queued")
    running.reads("sdlisten:   worker ")
    running.reads(": at your service")


def test_a_program_that_never_notifies(run: Callable[..., Running]) -> None:
    """With --ready SECONDS it is taken for ready, and a line says loudly that this is a guess."""
    running = run("--ready", "0.2", text=app().replace('say("READY=1', 'say("X_NOTHING=1'))

    running.reads("a guess")
    assert running.get()[1] == 1


FIRST_FAILURES = [("os._exit(5)", 5), ("os._exit(0)", 1), ("os.kill(os.getpid(), 11)", 139)]


@pytest.mark.parametrize(("hook", "code"), FIRST_FAILURES)
def test_a_first_generation_that_fails(run: Callable[..., Running], hook: str, code: int) -> None:
    """The supervisor ends with the code of its first generation."""
    running = run(text=app(hook), ready=False)

    assert running.daemon._child
    assert running.daemon._child.wait(SECONDS) == code
    assert "sdlisten: generation 1 failed: a worker " in running.daemon.output


def test_the_stop_delay(run: Callable[..., Running]) -> None:
    """After the order to stop clients are still served, and the status says so; a second order ends that."""
    running = run("--stop-delay", "60")
    running.ask("stop")
    running.says("STOPPING")

    assert running.get()[1] == 1
    answer = running.ask("status")
    assert (answer["code"], answer["status"]["phase"]) == (1, "leaving")
    uptime = answer["status"]["uptime"]
    running.until(lambda facts: facts["uptime"] > uptime + 1)  # orders within a second are one
    assert running.ask("stop", wait=True)["code"] == 0


def test_stop_waits(run: Callable[..., Running]) -> None:
    """A stop that waits is answered when nobody is left; a roll that waits meanwhile is given up."""
    running = run("--soak", "60")
    with connected(running.control, {"do": "roll", "wait": True}) as roll:
        running.until(lambda facts: facts["phase"] == "soaking")
        assert running.ask("stop", wait=True) == {"code": 0, "text": "stopped"}
        answer = json.loads(read_all(roll))
    assert (answer["code"], answer["text"]) == (3, "the roll was given up: told to stop")


# A reload of a unit: what systemd executes knows its own pid.
RELOAD = """
SYSTEMD_EXEC_PID=$$ exec "$@"
"""


@pytest.mark.parametrize("order", ["first us", "first the command", "only the command"])
def test_a_stop_during_a_reload(run: Callable[..., Running], order: str) -> None:
    """`ctl roll --wait` as a unit's ExecReload= ends well when all is stopped, SIGTERM or not; else by it."""
    running = run()
    running.deploy(app("signal.pause()"))
    words = [sys.executable, "-m", "sdlisten", "ctl", "--control", running.control, "roll", "--wait"]
    shell = ["sh", "-c", RELOAD, "sh", *words]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        running.until(lambda facts: facts["phase"] == "rolling")
        if order == "first the command":
            os.kill(running.daemon.pid, signal.SIGSTOP)
        if order != "first us":
            command.terminate()
        if order != "only the command":
            os.kill(running.daemon.pid, signal.SIGTERM)
            os.kill(running.daemon.pid, signal.SIGCONT)
        output, _ = command.communicate(timeout=SECONDS)
    if order == "only the command":
        assert (command.returncode, output) == (-signal.SIGTERM, "")
        assert running.status()["phase"] == "rolling"
    else:
        assert command.returncode == 0
        assert "given up: told to stop" in output


@contextlib.contextmanager
def connected(path: str, question: object = None) -> Iterator[socket.socket]:
    """Connect to a control socket, and ask."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(path)
        if question is not None:
            sock.sendall(json.dumps(question).encode() + b"\n")
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Read to the end."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


BAD_QUESTIONS = [
    b"nonsense\n",
    b"[1]\n",
    b'{"do": "dance"}\n',
    b'{"do": "roll", "command": "sh"}\n',
    b"x" * 65537,
]


@pytest.mark.parametrize("question", BAD_QUESTIONS)
def test_bad_questions(run: Callable[..., Running], question: bytes) -> None:
    """What is no question is answered with 2, and changes nothing."""
    running = run()
    with connected(running.control) as sock:
        sock.sendall(question)
        answer = json.loads(read_all(sock))

    assert answer["code"] == 2
    assert running.status()["rolls"] == 0


def test_clients_that_hang(run: Callable[..., Running]) -> None:
    """Clients that do not ask, or go away, delay nobody and are let go after a while."""
    running = run("--soak", "0.5")
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(running.control)) for _ in range(5)]
        with connected(running.control, {"do": "roll", "wait": True}):
            running.until(lambda facts: facts["phase"] == "soaking")
        running.until(lambda facts: facts["rolls"] == 1)
        assert running.roll()["code"] == 0
        assert read_all(silent[0]) == b""


def test_too_many_clients(run: Callable[..., Running]) -> None:
    """More than 32 at a time are told to try again, which is not what nobody would say."""
    running = run()
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(connected(running.control))
        answer = ctl.ask(running.control, {"do": "status"})

    assert (answer["code"], answer["text"]) == (4, "32 others ask already, or wait: not asked, try again")


def test_a_slow_reader_of_our_stderr(tmp_path: Path) -> None:
    """A worker that writes much where nobody reads has to wait; the supervisor answers all the same."""
    program = tmp_path / "app.py"
    program.write_text(app(ready="sys.stderr.write('x' * 1_000_000)"))
    control = str(tmp_path / "control")
    words = [sys.executable, "-m", "sdlisten", "run", "--control", control, "-l", "127.0.0.1:0", "--"]
    process = subprocess.Popen([*words, sys.executable, "-I", "-S", str(program)], stderr=subprocess.PIPE)
    with process:
        assert process.stderr
        received = b""
        while b"x" not in received:
            received += os.read(process.stderr.fileno(), 65536)
        assert ctl.ask(control, {"do": "status"})["code"] == 0
        while received.count(b"x") < 1_000_000:
            received += os.read(process.stderr.fileno(), 65536)
        process.terminate()
        process.stderr.read()
    assert process.returncode == 0


@pytest.mark.skipif(not nice.can_return(), reason="needs CAP_SYS_NICE or RLIMIT_NICE to come back")
def test_a_nice_start(run: Callable[..., Running]) -> None:
    """Workers start with a lower priority, and serve with ours."""
    running = run("--nice-start", "7", text=app("print('nice', os.nice(0), flush=True)"))

    running.reads(f"nice {os.nice(0) + 7}")
    (pid,) = running.pids()
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.nice(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has what can be given up here")
def test_no_nice_start_without_a_way_back(tmp_path: Path) -> None:
    """Where the priority could not be given back it is left alone, and a line says so."""
    program = tmp_path / "app.py"
    program.write_text(app("print('nice', os.nice(0), flush=True)"))
    run = [sys.executable, "-m", "sdlisten", "run", "--nice-start", "7", "--"]
    drop = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", "--"]
    with activate([*drop, *run, sys.executable, "-I", "-S", str(program)], ["127.0.0.1:0"]) as daemon:
        daemon.wait_ready(SECONDS)
        daemon.wait_output(f"nice {os.nice(0)}")
        assert "--nice-start is left out" in daemon.output


def test_it_binds_for_itself(tmp_path: Path) -> None:
    """With -l it binds, passes names, and removes a unix path that it made."""
    path = tmp_path / "socket"
    file = tmp_path / "app.py"
    file.write_text(app("print(os.environ['LISTEN_FDNAMES'], flush=True)"))
    words = [sys.executable, "-m", "sdlisten", "run", "-l", f"http={path}", "-l", "127.0.0.1:0", "--"]
    with activate([*words, sys.executable, "-I", "-S", str(file)], []) as daemon:
        daemon.wait_ready(SECONDS)
        daemon.wait_output("http:unknown")
        assert path.exists()
        assert daemon.terminate() == 0
    assert not path.exists()


def test_what_cannot_be_bound(tmp_path: Path) -> None:
    """A port in use ends it with 1, a word that is no address with 78; what was bound before is closed."""
    run = [sys.executable, "-m", "sdlisten", "run"]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        words = [f"-l{tmp_path}/socket", f"-l127.0.0.1:{sock.getsockname()[1]}", "--", "true"]
        done = subprocess.run([*run, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, "in use" in done.stderr) == (1, True)
    assert not (tmp_path / "socket").exists()
    done = subprocess.run([*run, "-lnonsense", "--", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 78


HEAVY = {
    "argparse",
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "inspect",
    "logging",
    "subprocess",
    "typing",
}


def test_the_image_that_stays_is_small() -> None:
    """Neither asyncio, nor what only the command line needs, is in its memory."""
    home = Path(sdlisten.__file__).parent.parent
    code = (
        f"import sys; sys.path.append({str(home)!r}); import sdlisten.supervisor.start; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )

    assert HEAVY & set(done.stdout.split()) == set()
