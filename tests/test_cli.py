"""The sdlisten command: words in, exit code out."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import sdlisten
from sdlisten import cli
from sdlisten.testing import activate

if TYPE_CHECKING:
    from pathlib import Path

SEES = "import os; print(os.getpid(), os.environ.get('LISTEN_PID'), os.environ.get('LISTEN_FDS'))"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version of the package and ends with 0."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])

    assert (0, f"sdlisten {sdlisten.__version__}\n") == (caught.value.code, capsys.readouterr().out)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["demo", "--nonsense"], ["load"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Words that are no command end with 2 and say what is expected."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)

    assert caught.value.code == 2
    assert "usage: sdlisten" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [(["exec"], 2), (["exec", "--"], 2), (["exec", "--help"], 0)])
def test_exec_usage(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Exec without a command says how it is used."""
    assert code == cli.main(words)
    assert "usage: sdlisten exec -- COMMAND" in capsys.readouterr().err


def test_load_says_that_nothing_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Load is the load: with nobody listening it ends with 1."""
    assert cli.main(["load", str(tmp_path / "nobody.sock"), "--seconds", "0.1", "--clients", "1"]) == 1
    assert "refused" in capsys.readouterr().out


def test_exec_rewrites_the_pid() -> None:
    """A program behind a wrapper that does not exec finds LISTEN_PID to be its own."""
    program = f'{sys.executable} -m sdlisten exec -- {sys.executable} -c "{SEES}"; true'
    with activate(["sh", "-c", program], ["http=127.0.0.1:0"], notify=False) as wrapper:
        wrapper.wait_output("\n")

        own, listen_pid, count = wrapper.output.split()
        assert (own, "1") == (listen_pid, count)
        assert str(wrapper.pid) != own


def test_exec_of_a_missing_program() -> None:
    """Exec ends as a shell does: 127 and a line that says why."""
    command = [sys.executable, "-m", "sdlisten", "exec", "--", "/nonexistent/program"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})

    assert ended.returncode == 127
    assert "cannot execute '/nonexistent/program'" in ended.stderr
