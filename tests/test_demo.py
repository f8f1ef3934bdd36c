"""The demo: what it prints when all is as promised, and that it tells when something is not."""

from __future__ import annotations

import shutil

import pytest

from sdlisten import cli, demo


def test_demo_shows_every_path(capsys: pytest.CaptureFixture[str]) -> None:
    """Every path answers every request on listeners that are as promised."""
    assert cli.main(["demo"]) == 0

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[-1:] == [str(demo.REQUESTS)]]
    paths = ["activated", "bound"] + (["systemd"] if shutil.which("systemd-socket-activate") else [])
    assert sorted(2 * paths) == sorted(row[0] for row in rows)
    for row in rows:
        assert row[4:6] == ["yes", "yes"]
    loads = {line[0]: line for line in lines if line[2:4] == ["requests", "answered,"]}
    assert loads.keys() == {"short", "slow", "keep"}
    for line in loads.values():
        assert line[4:6] == ["0", "failed,"]
        assert 1 < int(line[-2]) <= demo.ROLLS + 1  # processes that answered


def test_demo_without_systemd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd-socket-activate is not installed the demo says so and shows the rest."""
    monkeypatch.setattr(shutil, "which", lambda _name: None)

    assert demo.run() == 0
    assert "systemd-socket-activate is not installed here" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("false",), ("sleep", "60")])
def test_demo_tells_when_a_promise_is_broken(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that does not do its job makes the demo end with 1 and say so."""
    monkeypatch.setattr(demo, "_HELLO", command)
    monkeypatch.setattr(demo, "_START_TIMEOUT", 0.3)

    assert demo.run() == 1
    assert "NOT as promised" in capsys.readouterr().out
