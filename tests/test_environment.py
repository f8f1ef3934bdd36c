"""The text of LISTEN_*, written and read. What libsystemd makes of the same text: test_conformance.py."""

from __future__ import annotations

import contextlib
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten.environment import (
    VARIABLES,
    check_name,
    read_listen_environment,
    write_listen_environment,
)
from sdlisten.errors import ListenEnvironmentError

NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=":"), max_size=255)
PIDS = st.integers(1, 2**31 - 1)
PIDFDIDS = st.integers(0, 2**64 - 1)


@given(st.lists(NAMES, min_size=1, max_size=8), PIDS, st.none() | PIDFDIDS)
def test_reads_what_it_writes(names: list[str], pid: int, pidfdid: int | None) -> None:
    """The process that the variables are written for finds the names again, whatever characters they have."""
    environ = MappingProxyType(write_listen_environment(names, pid=pid, pidfdid=pidfdid))

    found = read_listen_environment(environ, pid=pid, pidfdid=pidfdid)

    assert [found.name(fd) for fd in range(3, 3 + found.count)] == names
    assert found.absent == ""


@given(NAMES, PIDS, PIDS, PIDFDIDS, PIDFDIDS)
def test_is_for_one_process(name: str, pid: int, other: int, pidfdid: int, other_pidfdid: int) -> None:
    """Another pid, or another process with the same pid, finds nothing and is told for whom it is."""
    environ = write_listen_environment([name], pid=pid, pidfdid=pidfdid)

    for_other = read_listen_environment(environ, pid=other, pidfdid=pidfdid)
    for_later = read_listen_environment(environ, pid=pid, pidfdid=other_pidfdid)

    assert for_other.count == (1 if other == pid else 0)
    assert for_later.count == (1 if other_pidfdid == pidfdid else 0)
    assert (f"is meant for pid {pid}, this is {other}" in for_other.absent) == (other != pid)


@given(st.dictionaries(st.sampled_from(VARIABLES), st.text("0123456789:\\-+ xa\udcff", max_size=6)))
def test_refuses_only_with_its_own_error(environ: dict[str, str]) -> None:
    """Whatever the variables say, it is read, or a ListenEnvironmentError that names one of them."""
    try:
        found = read_listen_environment(environ, pid=1, pidfdid=1)
    except ListenEnvironmentError as error:
        refused = error
    else:
        assert bool(found.count) != bool(found.absent)
        return

    assert refused.variable in VARIABLES
    assert refused.value == environ[refused.variable]
    assert refused.variable in str(refused)


OWN = {"LISTEN_PID": "41", "LISTEN_FDS": "2"}
ABSENT = {
    "nothing": ({}, "LISTEN_FDS is not set"),
    "a foreign pid": (
        {**OWN, "LISTEN_PID": "7"},
        "LISTEN_FDS=2 is meant for pid 7, this is 41: a wrapper started us without exec",
    ),
    "a foreign pid alone": (
        {"LISTEN_PID": "7"},
        "LISTEN_FDS is not set, only LISTEN_PID=7",
    ),
    "no pid": ({"LISTEN_FDS": "2"}, "LISTEN_FDS=2 came without LISTEN_PID"),
    "no pid, with names": (
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        "LISTEN_FDS=2 came without LISTEN_PID",
    ),
    "our pid alone": ({"LISTEN_PID": "41"}, "LISTEN_FDS is not set, only LISTEN_PID=41"),
    "a foreign process with our pid": (
        {**OWN, "LISTEN_PIDFDID": "8"},
        "LISTEN_PIDFDID=8 is meant for another process with our pid; ours is 9",
    ),
    "a foreign pidfdid alone": ({"LISTEN_PIDFDID": "8"}, "LISTEN_FDS is not set"),
    "garbage for a foreign pid": (
        {"LISTEN_PID": "7", "LISTEN_FDS": "x", "LISTEN_PIDFDID": "x", "LISTEN_FDNAMES": "\\"},
        "LISTEN_FDS=x is meant for pid 7, this is 41: a wrapper started us without exec",
    ),
}


@pytest.mark.parametrize(("environ", "why"), ABSENT.values(), ids=ABSENT)
def test_says_why_nothing_was_passed(environ: dict[str, str], why: str) -> None:
    """If nothing is passed to us, the reason can be quoted."""
    found = read_listen_environment(environ, pid=41, pidfdid=9)

    assert (found.count, found.absent) == (0, why)


def test_pidfdid_is_not_compared_where_it_means_nothing() -> None:
    """Before Linux 6.9 the inodes of pidfds identify nothing, and any number is right."""
    assert read_listen_environment({**OWN, "LISTEN_PIDFDID": "8"}, pid=41, pidfdid=None).count == 2


def test_everything_is_unknown_without_names() -> None:
    """Without LISTEN_FDNAMES each descriptor is called "unknown", as in libsystemd."""
    found = read_listen_environment(OWN, pid=41)

    assert [found.name(3), found.name(4)] == ["unknown", "unknown"]


NUMBERS = {"LISTEN_PID": (1, 2**31 - 1), "LISTEN_FDS": (1, 2**31 - 4), "LISTEN_PIDFDID": (0, 2**64 - 1)}
NO_NUMBERS = ["", "x", "-1", "+1", " 1", "1 ", "0x1", "01", "1_0", "1.0", "\u0661", "\udcff", "9" * 5000]


@pytest.mark.parametrize("variable", NUMBERS)
@pytest.mark.parametrize("value", [*NO_NUMBERS, "too small", "too large"], ids=lambda value: value[:10])
def test_refuses_numbers(variable: str, value: str) -> None:
    """Only a plain decimal number in its range passes; the text says variable, value and range."""
    lowest, highest = NUMBERS[variable]
    value = {"too small": str(lowest - 1), "too large": str(highest + 1)}.get(value, value)

    with pytest.raises(ListenEnvironmentError) as caught:
        read_listen_environment({**OWN, variable: value}, pid=41, pidfdid=9)

    assert str(caught.value) == f"{variable}={value!r}: expected a decimal number from {lowest} to {highest}"
    assert (caught.value.variable, caught.value.value) == (variable, value)


@pytest.mark.parametrize(
    ("names", "count"), [("", 1), ("a", 1), ("a:b:c", 3), ("a:", 2), ("::", 3), (r"a\:b", 1)]
)
def test_counts_names(names: str, count: int) -> None:
    """As many names as descriptors, or an error that says how many there are."""
    environ = {"LISTEN_PID": "41", "LISTEN_FDS": str(count + 1), "LISTEN_FDNAMES": names}

    with pytest.raises(ListenEnvironmentError) as caught:
        read_listen_environment(environ, pid=41)

    assert str(caught.value) == f"LISTEN_FDNAMES={names!r} has {count} names, but LISTEN_FDS={count + 1}"
    assert (caught.value.variable, caught.value.value) == ("LISTEN_FDNAMES", names)


def test_a_backslash_quotes_something() -> None:
    """A backslash at the end of LISTEN_FDNAMES is an error, as in libsystemd."""
    with pytest.raises(ListenEnvironmentError) as caught:
        read_listen_environment({**OWN, "LISTEN_FDNAMES": "a:b\\"}, pid=41)

    assert str(caught.value) == r"LISTEN_FDNAMES='a:b\\' ends in a backslash that quotes nothing"


@pytest.mark.parametrize(
    ("environ", "variable"),
    [({"LISTEN_FDNAMES": "web"}, "LISTEN_FDNAMES=web"), ({"LISTEN_PIDFDID": "9"}, "LISTEN_PIDFDID=9")],
)
def test_notices_who_read_before(environ: dict[str, str], variable: str) -> None:
    """Names, or our own pidfd's number, without the rest mean that other code was faster, and say so."""
    with pytest.raises(ListenEnvironmentError) as caught:
        read_listen_environment(environ, pid=41, pidfdid=9)

    assert str(caught.value) == (
        f"{variable} is set, but LISTEN_FDS and LISTEN_PID are gone: other code in this process has read "
        f"them already (importing twisted.internet.endpoints does). Call sdlisten before that code."
    )


@pytest.mark.parametrize("name", ["a:b", "a\n", "\x7f", "ä", "\udcff", "a" * 256])
def test_refuses_names(name: str) -> None:
    """A name that systemd would not take is refused before anything is written."""
    with pytest.raises(ListenEnvironmentError) as caught:
        write_listen_environment(["web", name], pid=41)

    assert str(caught.value) == (
        f"{name!r} cannot be a FileDescriptorName: expected at most 255 ASCII characters, "
        f"no control characters, no ':'"
    )
    assert (caught.value.variable, caught.value.value) == ("LISTEN_FDNAMES", name)


@given(st.text(max_size=300))
def test_checks_names_as_it_writes_them(name: str) -> None:
    """Whatever check_name() lets through is read as one name again."""
    with contextlib.suppress(ListenEnvironmentError):
        check_name(name)

        environ = write_listen_environment([name], pid=41)
        assert read_listen_environment(environ, pid=41).name(3) == name


def test_writes_nothing_for_nothing() -> None:
    """Without descriptors there are no variables: LISTEN_FDS=0 is an error for libsystemd."""
    assert write_listen_environment([], pid=41, pidfdid=9) == {}


def test_writes_what_managers_write() -> None:
    """The variables are those of systemd 259, LISTEN_PIDFDID only where there is one."""
    assert write_listen_environment(["web", ""], pid=41) == {
        "LISTEN_FDS": "2",
        "LISTEN_PID": "41",
        "LISTEN_FDNAMES": "web:",
    }
    assert write_listen_environment(["web"], pid=41, pidfdid=9)["LISTEN_PIDFDID"] == "9"
