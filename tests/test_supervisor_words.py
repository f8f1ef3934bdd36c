"""The words of `sdlisten run` and `sdlisten ctl`: what they become, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sdlisten
from sdlisten import cli
from sdlisten.supervisor import ctl, words
from sdlisten.supervisor.control import Control
from sdlisten.supervisor.loop import SIGNALS, Loop
from sdlisten.supervisor.options import Options
from sdlisten.supervisor.surroundings import EnvFileError, inherited_environ, parse_env_file, read_env_file

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no variable of the caller speak, and leave no signal blocked."""
    monkeypatch.delenv("SDLISTEN_CONTROL", raising=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def image(*given: str) -> list[str]:
    """Return the command line that ``sdlisten run`` becomes."""
    became: list[list[str]] = []
    assert words.run_command(given, execv=lambda _path, argv: became.append(argv)) == 0
    (argv,) = became
    return argv


def after(argv: list[str]) -> list[str]:
    """Return what follows the module."""
    return argv[argv.index("sdlisten.supervisor") + 1 :]


def options(*given: str) -> dict[str, Any]:
    """Return what the supervisor reads of it."""
    return vars(Options.from_words(after(image(*given))))


def test_everything_arrives() -> None:
    """Every option, and the command with its own options, arrives in the image that stays."""
    given = (
        "-l http=8080 --listen /run/x --workers 3 --ready 2 --ready-timeout 4 --drain-timeout 5 --soak 6 "
        "--stop-delay 7 --control /c --env-file /e --pid-file /p --nice-start 9 --non-blocking --watchdog 8 "
        "--stop-signal quit -- program -l --workers -- more"
    )

    assert options(*given.split()) == {
        "listen": ["http=8080", "/run/x"],
        "workers": 3,
        "guess": 2.0,
        "ready_timeout": 4.0,
        "drain_timeout": 5.0,
        "soak": 6.0,
        "stop_delay": 7.0,
        "watchdog": 8.0,
        "control": "/c",
        "env_file": "/e",
        "pid_file": "/p",
        "nice_start": 9,
        "stop_signal": signal.SIGQUIT,
        "non_blocking": True,
        "command": ["program", "-l", "--workers", "--", "more"],
    }


def test_defaults() -> None:
    """What is not said is not written, and is as the class has it."""
    argv = image("--ready", "notify", "--", "program")

    assert after(argv) == ["--", "program"]
    assert options("--", "program") == {**vars(Options()), "command": ["program"]}
    assert Options().guess == math.inf


def test_the_control_socket_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDLISTEN_CONTROL says where it is, for run and for ctl, unless an option does."""
    monkeypatch.setenv("SDLISTEN_CONTROL", "/from/environment")

    assert options("--", "program")["control"] == "/from/environment"
    assert options("--control=/other", "--", "program")["control"] == "/other"


def test_the_control_socket_of_an_outer_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside SDLISTEN_GENERATION it is a gift of the supervisor that started us: ours would be in its way."""
    monkeypatch.setenv("SDLISTEN_CONTROL", "/of/the/outer")
    monkeypatch.setenv("SDLISTEN_GENERATION", "3")

    assert options("--", "program")["control"] == ""
    assert options("--control=/other", "--", "program")["control"] == "/other"


def test_signals_wait_for_the_image_that_stays() -> None:
    """From here on no order is lost: what the supervisor will handle is blocked until it does."""
    image("--", "program")

    assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_isolated_interpreter_stays_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that stays looks for modules where the first one does, never where it happens to be."""

    class Flags:
        isolated = 1
        safe_path = False
        ignore_environment = 1  # argparse of 3.14 asks, for its colours

    with monkeypatch.context() as patch:
        patch.setattr(sys, "flags", Flags)
        patch.setattr(sys, "path", ["/usr/bin", *sys.path])
        assert image("--", "program")[1] == "-I"
        Flags.isolated = 0
        assert image("--", "program")[1] == "-P"
        patch.chdir(Path(sdlisten.__file__).parent.parent)
        patch.setattr(sys, "path", ["", *sys.path])
        assert image("--", "program")[1] == "-m"


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--"],
        ["program"],
        ["--workers", "0", "--", "x"],
        ["--workers", "many", "--", "x"],
        ["--soak", "-1", "--", "x"],
        ["--soak", "inf", "--", "x"],
        ["--ready", "soon", "--", "x"],
        ["--nice-start", "20", "--", "x"],
        ["--stop-signal", "NONE", "--", "x"],
        ["--stop-signal", "0", "--", "x"],
        ["--stop-signal", "", "--", "x"],
    ],
)
def test_usage_of_run(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Words that make no supervisor end with 2 and say what is expected."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", *given])

    assert caught.value.code == 2
    assert "usage: sdlisten run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--watchdog", "0"], "--watchdog: '0': expected seconds, a microsecond or more"),
        (["--watchdog", "0.0000001"], "--watchdog: '0.0000001': expected seconds"),
        (["--watchdog", "1e300"], "--watchdog: '1e300': expected seconds"),
        (["--stop-signal", "KILL"], "--stop-signal: 'KILL': expected a signal that a program can handle"),
        (["--stop-signal", "sigstop"], "--stop-signal: 'sigstop': expected a signal that"),
    ],
)
def test_what_would_kill_every_worker(
    given: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A watchdog that nobody can satisfy, and a signal that nobody survives, are refused with the reason."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", *given, "--", "x"])

    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["dance"],
        ["status"],
        ["--control", "/c", "stop", "--", "command"],
        ["--control", "/c", "roll", "--timeout", "x"],
    ],
)
def test_usage_of_ctl(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Words that are no question end with 2 and say what is expected."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["ctl", *given])

    assert caught.value.code == 2
    assert "usage: sdlisten ctl" in capsys.readouterr().err


def test_no_supervisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody listens ctl ends with 5."""
    assert cli.main(["ctl", "--control", str(tmp_path / "control"), "status"]) == 5
    assert "no supervisor at" in capsys.readouterr().err


def test_a_supervisor_that_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that does not answer in time makes ctl end with 4."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control"))
        sock.listen()
        given = ["ctl", "--control", str(tmp_path / "control"), "--timeout", "0.05", "roll", "--wait"]
        assert cli.main(given) == 4
    assert "no answer within 0.05 s" in capsys.readouterr().err


class Answering:
    """A process that gives one answer, like a supervisor."""

    def __init__(self, path: Path, line: bytes) -> None:
        self.path = str(path)
        self.line = line

    def ask(self, *given: str) -> tuple[int, object]:
        """Let ctl ask; returns its exit code and the question."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
            sock.listen()
            child = os.fork()
            if not child:
                try:
                    connection, _ = sock.accept()
                    question = connection.recv(65536)
                    connection.sendall(self.line)
                    with open(self.path + ".question", "wb") as file:
                        file.write(question)
                finally:
                    os._exit(0)
            code = cli.main(["ctl", "--control", self.path, *given])
            os.waitpid(child, 0)
        with open(self.path + ".question", "rb") as file:
            return code, json.loads(file.read())


@contextlib.contextmanager
def supervising(path: Path) -> Iterator[str]:
    """Answer questions at a real control socket, in a thread."""
    loop = Loop()
    ours, theirs = socket.socketpair()
    over: list[int] = []

    def serve() -> None:
        while not over:
            loop.wait(math.inf)

    control = Control(str(path), loop, lambda question, client: client.answer(0, str(question["do"])))
    loop.watch(theirs.fileno(), over.append)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield str(path)
    finally:
        ours.send(b".")
        thread.join()
        control.close()
        ours.close()
        theirs.close()


@pytest.mark.parametrize("timeout", [None, 1e300, sys.float_info.max, 20.0])
def test_limits_of_any_length(tmp_path: Path, timeout: float | None) -> None:
    """A limit beyond what the kernel can wait is as good as none."""
    with supervising(tmp_path / "control") as path:
        assert ctl.ask(path, {"do": "status"}, timeout=timeout) == {"code": 0, "text": "status"}


def test_no_time_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a limit of 0 the question is asked, and only the answer may come too late."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control"))
        sock.listen()
        assert cli.main(["ctl", "--control", str(tmp_path / "control"), "--timeout", "0", "stop"]) == 4
        with sock.accept()[0] as connection:
            assert json.loads(connection.recv(65536)) == {"do": "stop", "wait": False}
    assert capsys.readouterr().err == "no answer within 0 s; what was asked for goes on\n"


def test_a_question_that_is_too_long(tmp_path: Path) -> None:
    """The answer to it is read, though the supervisor has gone before all was said."""
    with supervising(tmp_path / "control") as path:
        question = {"do": "roll", "command": ["x" * 10_000_000]}
        assert ctl.ask(path, question) == {"code": 2, "text": "a question of more than 65536 bytes"}


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[socket.socket]:
    """Give a listener whose queue is full: one connection, and one more, is what a backlog of 0 holds."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "control"))
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "control"))
        yield listener


def test_a_queue_that_stays_full(crowded: socket.socket) -> None:
    """There is a supervisor, and it has not been asked: 4."""
    answer = ctl.ask(crowded.getsockname(), {"do": "roll"}, timeout=0.05)

    assert answer == {"code": 4, "text": "the supervisor is busy: not asked within 0.05 s, try again"}


def test_a_queue_that_empties(crowded: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds the queue full waits for room."""
    served: list[bytes] = []
    threads: list[threading.Thread] = []

    def serve() -> None:
        with crowded.accept()[0] as connection:
            served.append(connection.recv(65536))
            connection.sendall(b'{"code": 0, "text": "asked"}\n')

    def sleep(_seconds: float) -> None:
        crowded.accept()[0].close()
        threads.append(threading.Thread(target=serve))
        threads[0].start()

    monkeypatch.setattr(time, "sleep", sleep)
    assert ctl.ask(crowded.getsockname(), {"do": "status"}, timeout=20) == {"code": 0, "text": "asked"}
    threads[0].join()
    assert served == [b'{"do": "status"}\n']


def test_the_question_and_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A roll goes with its command; a refusal shows why, on stderr, and what the program wrote last."""
    line = json.dumps({"code": 3, "text": "refused", "stderr": "last words"}).encode() + b"\n"

    code, question = Answering(tmp_path / "control", line).ask("roll", "--wait", "--", "new", "--wait")
    assert (code, question) == (3, {"do": "roll", "wait": True, "command": ["new", "--wait"]})
    assert capsys.readouterr() == ("", "refused\nIt wrote last:\nlast words\n")


def test_words_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stdout cannot write is written with backslashes, be it strict or not."""
    line = json.dumps({"code": 0, "text": "serving: \udcff.py \N{SNOWMAN}"}).encode() + b"\n"
    for encoding, text in (("utf-8", "\\udcff.py \N{SNOWMAN}\n"), ("ascii", "\\udcff.py \\u2603\n")):
        out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", out)
        assert Answering(tmp_path / encoding, line).ask("status")[0] == 0
        out.seek(0)
        assert out.read() == f"serving: {text}"
    text_alone = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text_alone)
    assert Answering(tmp_path / "none", line).ask("status")[0] == 0
    assert text_alone.getvalue() == "serving: \\udcff.py \N{SNOWMAN}\n"


def test_the_answer_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json status prints the facts and nothing else."""
    line = json.dumps({"code": 0, "text": "fine", "status": {"pid": 7}}).encode() + b"\n"

    assert Answering(tmp_path / "control", line).ask("status", "--json")[0] == 0
    assert json.loads(capsys.readouterr().out) == {"pid": 7}


@pytest.fixture
def _reloading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process be the ExecReload= of a unit that is being stopped."""
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_reloading")
@pytest.mark.parametrize(
    ("second", "given_up"),
    [
        (b'{"code": 1, "text": "", "status": {"phase": "stopping"}}', True),
        (b"no answer", True),
        (b'{"code": 0, "text": "", "status": {"phase": "serving"}}', False),
        (b'{"code": 0, "text": "", "status": {}}', False),
        (b'{"code": 0, "text": "", "status": ["?"]}', False),
        (b'{"code": 2, "text": "?"}', False),
        (b"", False),
    ],
)
def test_told_to_end_in_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bytes, *, given_up: bool
) -> None:
    """SIGTERM ends a reload with 0 if the supervisor ends too; if it goes on, or cannot say, as ever."""
    monkeypatch.setattr(ctl, "_ANSWER_SECONDS", 20 if second else 0.05)
    raised: list[int] = []

    def supervise(sock: socket.socket, over: socket.socket) -> None:
        with sock.accept()[0] as first:
            first.recv(65536)
            os.kill(os.getpid(), signal.SIGTERM)
            with sock.accept()[0] as asked:
                asked.recv(65536)
                asked.sendall(second)
                if not second:
                    over.recv(1)

    class Ended(BaseException):
        """Stands for the end of this process."""

    def raise_signal(number: int) -> None:
        raised.append(number)
        raise Ended

    monkeypatch.setattr(signal, "raise_signal", raise_signal)
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control"))
        sock.listen()
        supervisor = threading.Thread(target=supervise, args=(sock, theirs))
        supervisor.start()
        with contextlib.nullcontext() if given_up else pytest.raises(Ended):
            answer = ctl.ask_as_command(str(tmp_path / "control"), {"do": "roll", "wait": True})
            assert answer == {"code": 0, "text": "given up: told to stop"}
        ours.send(b".")
        supervisor.join()
    assert raised == [signal.SIGTERM] * (not given_up)


@pytest.mark.parametrize("line", [b"", b"nonsense\n", b"[]\n", b'{"code": "0", "text": ""}\n', b"{}\n"])
def test_answers_that_are_none(tmp_path: Path, line: bytes) -> None:
    """Whoever ends without an answer is no supervisor: 5."""
    assert Answering(tmp_path / "control", line).ask("stop")[0] == 5


def test_a_long_wait_has_an_end(tmp_path: Path) -> None:
    """The limit is for the whole answer, not for each part of it."""
    line = json.dumps({"code": 0, "text": "x"}).encode() + b"\n"
    answering = Answering(tmp_path / "control", line)

    assert answering.ask("stop", "--wait", "--timeout", "20")[0] == 0
    assert ctl.ask(str(tmp_path / "other"), {"do": "stop", "wait": True})["code"] == 5


def test_what_children_inherit() -> None:
    """All but what a manager, or an outer supervisor, said to us alone."""
    environ = {"PATH": "/bin", "LISTEN_PID": "1", "NOTIFY_SOCKET": "@x", "SDLISTEN_LIFELINE_FD": "9"}

    assert inherited_environ({**environ, "SDLISTEN_REQUIRE": "1"}) == {
        "PATH": "/bin",
        "SDLISTEN_REQUIRE": "1",
    }


def test_environment_file_as_bytes(tmp_path: Path) -> None:
    """Only newlines end a line, and values may be any bytes; a FIFO is an error, and not waited for."""
    file = tmp_path / "env"
    file.write_bytes("A=one\N{LINE SEPARATOR}line\n".encode() + b"B=\xff\r\nC=")

    assert read_env_file(str(file)) == {"A": "one\N{LINE SEPARATOR}line", "B": "\udcff", "C": ""}

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(EnvFileError, match="fifo is a FIFO: expected a file"):
        read_env_file(str(tmp_path / "fifo"))


def test_environment_files() -> None:
    """Assignments, comments, empty lines, a pair of quotes; everything else is an error with its line."""
    lines = ["# comment", "; too", "", " A=1 ", "B='two words'", 'C="', "D==x"]

    assert parse_env_file(lines, "file") == {"A": "1", "B": "two words", "C": '"', "D": "=x"}
    for line in ("A", "=1", "A B=1", "export A=1", "A=\0"):
        with pytest.raises(EnvFileError, match=r"^file:2: "):
            parse_env_file(["A=1", line], "file")
