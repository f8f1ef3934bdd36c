"""sdlisten.message: the text of sd_notify(3), both ways."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlisten.errors import MessageError, SdlistenError
from sdlisten.message import (
    FDNAME_MAX,
    FDS_MAX,
    MESSAGE_MAX,
    STATUS_MAX,
    assignment,
    check_fdname,
    decode_message,
    encode_message,
    value_of,
)

USEC = st.integers(0, 2**64 - 2)
LINE = st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), max_size=200)
FDNAME = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=":"), max_size=FDNAME_MAX
)
DOTTED = st.from_regex(r"(?:[A-Za-z0-9_-]{1,20}(?:\.[A-Za-z0-9_-]{1,20}){1,5})?", fullmatch=True)
FLAGS = (
    "READY",
    "RELOADING",
    "STOPPING",
    "RESTART_RESET",
    "FDSTORE",
    "FDSTOREREMOVE",
    "MAINPIDFD",
    "BARRIER",
)
FIELDS: dict[str, st.SearchStrategy[int | str]] = {
    **dict.fromkeys(FLAGS, st.just("1")),
    "FDPOLL": st.just("0"),
    "MONOTONIC_USEC": USEC,
    "WATCHDOG_USEC": USEC,
    "EXTEND_TIMEOUT_USEC": USEC,
    "STATUS": st.text(st.characters(categories=("L", "N", "P", "S")), max_size=STATUS_MAX // 4),
    "ERRNO": st.integers(0, 4095),
    "EXIT_STATUS": st.integers(0, 255),
    "BUSERROR": DOTTED,
    "VARLINKERROR": DOTTED,
    "NOTIFYACCESS": st.sampled_from(["none", "main", "exec", "all"]),
    "MAINPID": st.integers(1, 2**31 - 1),
    "MAINPIDFDID": st.integers(1, 2**64 - 1),
    "WATCHDOG": st.sampled_from(["1", "trigger"]),
    "FDNAME": FDNAME,
    "X_MINE": LINE,
    "X_1": LINE,
}
NAME_AND_VALUE = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name]))


@given(NAME_AND_VALUE)
def test_every_field_reads_back_as_it_was_written(field: tuple[str, int | str]) -> None:
    """For each field of sd_notify(3), what `assignment` writes `value_of` reads: same value, same type."""
    name, value = field
    written_name, equals, text = assignment(name, value).partition("=")
    assert (written_name, equals) == (name, "=")
    assert value_of(name, text) == value


@given(
    st.dictionaries(
        st.sampled_from(["READY", "STATUS", "ERRNO", "MAINPID", "X_MINE", "X_1"]), st.none(), min_size=1
    ),
    st.data(),
)
def test_a_message_reads_back_as_it_was_written(names: dict[str, None], data: st.DataObject) -> None:
    """A message of any fields that go together decodes to the same fields in the same order."""
    lines = [assignment(name, data.draw(FIELDS[name])) for name in names]
    decoded = decode_message(encode_message(*lines))
    assert [f"{name}={value}" for name, value in decoded.items()] == lines


@given(st.binary(max_size=300) | st.binary(min_size=MESSAGE_MAX - 1, max_size=MESSAGE_MAX + 2))
def test_any_bytes_decode_or_raise_the_typed_error(data: bytes) -> None:
    """Whatever arrives is a message or a MessageError, and its values have no line breaks or NULs."""
    with contextlib.suppress(MessageError):
        for name, value in decode_message(data).items():
            assert name
            assert not {"\n", "\r"} & set(name + value)


@given(st.text(max_size=40), st.text(max_size=3000))
def test_any_text_is_a_field_or_raises_the_typed_error(name: str, value: str) -> None:
    """Any name and value make one line within a message's limit or a MessageError, never two lines."""
    with contextlib.suppress(MessageError):
        data = encode_message(f"{name}={value}")
        assert len(data) <= MESSAGE_MAX
        assert data.count(b"\n") == 0


@given(st.text())
def test_any_text_is_a_status(text: str) -> None:
    """STATUS takes any text, also one with lone surrogates, and what is sent is one line that reads back."""
    line = assignment("STATUS", text)
    assert decode_message(encode_message(line)) == {"STATUS": line.removeprefix("STATUS=")}
    assert value_of("STATUS", line.removeprefix("STATUS=")) == line.removeprefix("STATUS=")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("up", "up"),
        ("", ""),
        ("one\ntwo\r\tthree\u2028four", "one two  three four"),
        ("nul\0 escape\x1b[2J delete\x7f c1\x9b", "nul\ufffd escape\ufffd[2J delete\ufffd c1\ufffd"),
        ("\udc80 \ufdd0 \ufffe \U0010ffff", "\ufffd \ufffd \ufffd \ufffd"),
        ("no-break\u00a0and a zero-width\u200djoiner", "no-break\u00a0and a zero-width\u200djoiner"),
    ],
)
def test_status_is_made_one_line_that_systemd_shows(text: str, shown: str) -> None:
    """Line ends become spaces, what would cost the whole STATUS becomes U+FFFD, all else stays."""
    assert assignment("STATUS", text) == f"STATUS={shown}"


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_a_long_status_is_cut_between_characters(character: str) -> None:
    """A STATUS over STATUS_MAX bytes is cut to it and marked, and READY=1 beside it still goes out."""
    data = encode_message("READY=1", f"STATUS={character * (STATUS_MAX + 1)}")
    ready, status = data.decode().split("\n")
    assert ready == "READY=1"
    assert STATUS_MAX - 4 < len(status.removeprefix("STATUS=").encode()) <= STATUS_MAX
    assert status.removeprefix("STATUS=").rstrip("…").strip(character) == ""
    assert status.endswith("…")


def test_a_status_of_just_the_limit_is_not_cut() -> None:
    """STATUS_MAX bytes go out whole."""
    assert assignment("STATUS", "x" * STATUS_MAX) == "STATUS=" + "x" * STATUS_MAX


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("READY", "0", "expected 1"),
        ("READY", "", "expected 1"),
        ("READY", "1\nSTOPPING=1", "expected 1"),
        ("FDPOLL", "1", "expected 0"),
        ("WATCHDOG", "2", "expected 1 or trigger"),
        ("NOTIFYACCESS", "everybody", "expected none or main or exec or all"),
        ("ERRNO", "4096", "from 0 to 4095"),
        ("ERRNO", "-1", "from 0 to 4095"),
        ("ERRNO", "ENOENT", "from 0 to 4095"),
        ("ERRNO", "²", "from 0 to 4095"),
        ("EXIT_STATUS", 256, "from 0 to 255"),
        ("MAINPID", 0, "from 1 to 2147483647"),
        ("MAINPID", " 7", "from 1 to"),
        ("MAINPID", "1" * 5000, "from 1 to"),
        ("MAINPIDFDID", 2**64, "from 1 to 18446744073709551615"),
        ("WATCHDOG_USEC", 2**64 - 1, "from 0 to 18446744073709551614"),
        ("BUSERROR", "Failed", "a dotted name"),
        ("BUSERROR", "org..Failed", "a dotted name"),
        ("VARLINKERROR", "org.exämple.Failed", "a dotted name"),
        ("FDNAME", "a:b", "no ':'"),
        ("FDNAME", "é", "ASCII"),
        ("FDNAME", "a\n", "no control characters"),
        ("FDNAME", "\x7f", "no control characters"),
        ("FDNAME", "x" * 256, "at most 255"),
        ("X_MINE", "a\nREADY=1", "one line of UTF-8"),
        ("X_MINE", "a\rREADY=1", "one line of UTF-8"),
        ("X_MINE", "a\0", "one line of UTF-8"),
        ("X_MINE", "\udc80", "one line of UTF-8"),
        ("REDAY", "1", "no field of sd_notify(3)"),
        ("ready", "1", "no field of sd_notify(3)"),
        ("X_", "1", "no field of sd_notify(3)"),
        ("X_Ä", "1", "no field of sd_notify(3)"),
        ("", "1", "no field of sd_notify(3)"),
    ],
)
def test_an_invalid_field_is_refused_by_name_value_and_expectation(
    name: str, value: int | str, wanted: str
) -> None:
    """The error names the field, the value and what was expected, is a ValueError, and says so both ways."""
    with pytest.raises(MessageError) as caught:
        assignment(name, value)
    assert isinstance(caught.value, SdlistenError)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.field, caught.value.value) == (name, str(value))
    assert wanted in str(caught.value)
    assert repr(name) in str(caught.value) or f"{name}={str(value)!r}" in str(caught.value)
    with pytest.raises(MessageError):
        value_of(name, str(value))


@given(FDNAME)
def test_valid_fdnames_pass(name: str) -> None:
    """Printable ASCII without a colon, also nothing at all, is a name."""
    check_fdname(name)


def test_the_longest_fdname_passes() -> None:
    """255 characters are allowed, 256 are not."""
    check_fdname("x" * FDNAME_MAX)
    with pytest.raises(MessageError):
        check_fdname("x" * (FDNAME_MAX + 1))


@pytest.mark.parametrize(
    ("lines", "fd_count", "data"),
    [
        (["READY=1"], 0, b"READY=1"),
        (["READY=1", "STATUS=ünder way"], 0, "READY=1\nSTATUS=ünder way".encode()),
        (["RELOADING=1", "MONOTONIC_USEC=12"], 0, b"RELOADING=1\nMONOTONIC_USEC=12"),
        (["FDSTORE=1", "FDNAME=a b", "FDPOLL=0"], 253, b"FDSTORE=1\nFDNAME=a b\nFDPOLL=0"),
        (["FDSTOREREMOVE=1", "FDNAME="], 0, b"FDSTOREREMOVE=1\nFDNAME="),
        (["MAINPID=4711", "MAINPIDFDID=17"], 0, b"MAINPID=4711\nMAINPIDFDID=17"),
        (["MAINPID=4711", "MAINPIDFD=1"], 1, b"MAINPID=4711\nMAINPIDFD=1"),
        (["BARRIER=1"], 1, b"BARRIER=1"),
        (["X_MINE=a=b"], 2, b"X_MINE=a=b"),
    ],
)
def test_fields_that_go_together_make_a_message(lines: list[str], fd_count: int, data: bytes) -> None:
    """The datagram is the lines joined by newlines, without one at the end."""
    assert encode_message(*lines, fd_count=fd_count) == data


@pytest.mark.parametrize(
    ("lines", "fd_count", "why"),
    [
        ([], 0, "without a field"),
        (["READY"], 0, "'READY' is no assignment"),
        (["READY=1", "READY=1"], 0, "READY= twice"),
        (["READY=1", "FDNAME=x"], 0, "FDNAME= needs FDSTORE= or FDSTOREREMOVE="),
        (["FDSTOREREMOVE=1"], 0, "FDSTOREREMOVE= needs FDNAME="),
        (["FDPOLL=0", "READY=1"], 0, "FDPOLL= needs FDSTORE="),
        (["MAINPIDFDID=1"], 0, "MAINPIDFDID= needs MAINPID="),
        (["FDSTORE=1"], 254, "at most 253"),
        (["FDSTORE=1"], 0, "without a descriptor"),
        (["FDSTORE=1", "FDSTOREREMOVE=1", "FDNAME=x"], 1, "would only remove"),
        (["BARRIER=1", "READY=1"], 1, "goes alone"),
        (["BARRIER=1"], 0, "exactly one"),
        (["BARRIER=1"], 2, "exactly one"),
        (["MAINPID=1", "MAINPIDFD=1"], 0, "exactly one"),
        (["READY=1"], 1, "no field takes"),
        (["X_MINE=" + "x" * MESSAGE_MAX], 0, "drops what is longer than 4096"),
    ],
)
def test_a_message_that_systemd_would_misread_is_refused(lines: list[str], fd_count: int, why: str) -> None:
    """What sd_notify(3) forbids or ignores silently is an error that says why."""
    with pytest.raises(MessageError) as caught:
        encode_message(*lines, fd_count=fd_count)
    assert why in str(caught.value)


def test_the_longest_message_goes_out_whole() -> None:
    """MESSAGE_MAX bytes are allowed and read back."""
    data = encode_message("X_MINE=" + "x" * (MESSAGE_MAX - len("X_MINE=")), fd_count=FDS_MAX)
    assert len(data) == MESSAGE_MAX
    assert decode_message(data).keys() == {"X_MINE"}


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (b"READY=1\n", {"READY": "1"}),
        (b"READY=1\0", {"READY": "1"}),
        (b"\n\nREADY=1\r\nSTATUS=a=b\n", {"READY": "1", "STATUS": "a=b"}),
        (b"STATUS=first\nSTATUS=second", {"STATUS": "first"}),
        (b"READY=1\ngarbage\n=nothing", {"READY": "1"}),
        (b"STATUS=\xff", {"STATUS": "\ufffd"}),
        (b"TOMORROW=1", {"TOMORROW": "1"}),
    ],
)
def test_a_message_is_read_as_systemd_reads_it(data: bytes, fields: dict[str, str]) -> None:
    """CR and LF end lines, the first of two counts, non-assignments are skipped, unknown names kept."""
    assert decode_message(data) == fields


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes"),
        (b"A=" + b"x" * MESSAGE_MAX, "4098 bytes"),
        (b"READY=1\0STATUS=x", "a NUL inside"),
        (b"hello", "no assignment"),
        (b"\0", "no assignment"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, why: str) -> None:
    """An empty, overlong, NUL-ridden or assignment-free datagram is a MessageError without a field."""
    with pytest.raises(MessageError) as caught:
        decode_message(data)
    assert why in str(caught.value)
    assert caught.value.field is None
