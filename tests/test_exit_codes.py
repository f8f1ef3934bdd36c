"""Exit codes are those that others use too, and tell everything apart."""

from __future__ import annotations

import argparse
import os

import pytest

from sdlisten import exit_codes
from sdlisten.supervisor.words import ctl_command


def test_codes_of_others() -> None:
    """Usage is what argparse ends with, configuration what sysexits.h says."""
    with pytest.raises(SystemExit) as end:
        argparse.ArgumentParser(prog="none").parse_args(["--unknown"])

    assert end.value.code == exit_codes.USAGE
    assert os.EX_CONFIG == exit_codes.CONFIGURATION


def test_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The help of `sdlisten ctl` names each code that it can end with, once."""
    with pytest.raises(SystemExit):
        ctl_command(["--help"])

    told = capsys.readouterr().out.partition("Exit codes: ")[2].split()
    numbers = [int(word) for word in told if word.isdecimal()]
    assert numbers == sorted(
        {0, *(getattr(exit_codes, name) for name in exit_codes.__all__)} - {os.EX_CONFIG}
    )
