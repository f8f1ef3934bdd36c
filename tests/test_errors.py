"""The types that a program can catch."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from sdlisten import errors
from sdlisten.errors import (
    ActivationError,
    AddressError,
    BarrierTimeoutError,
    DescriptorError,
    ListenEnvironmentError,
    MessageError,
    NotActivatedError,
    NotifyError,
    SdlistenError,
    StateError,
    StoreRefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OWN = [getattr(errors, name) for name in errors.__all__]


def drawn_tree() -> dict[str, tuple[str, set[str]]]:
    """Return what the docstring draws: for each type its parent and the types in parentheses behind it."""
    tree: dict[str, tuple[str, set[str]]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name, _, rest = line.lstrip(" │├└─").partition(" ")
        if not name.endswith("Error") or ("──" not in line and name != "SdlistenError"):
            continue
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4 - 1
        del above[depth:]
        also = rest.lstrip()[1:].partition(")")[0] if rest.lstrip().startswith("(") else ""
        tree[name] = (above[-1] if above else "Exception", {also} - {""})
        above.append(name)
    return tree


def test_tree_is_as_drawn() -> None:
    """The tree in the docstring shows every type, its parent and what else it is."""
    real = {kind.__name__: {base.__name__ for base in kind.__bases__} for kind in OWN}

    assert {name: {parent} | also for name, (parent, also) in drawn_tree().items()} == real


@pytest.mark.parametrize("kind", OWN)
def test_one_base_catches_all(kind: type[Exception]) -> None:
    """Whatever sdlisten itself raises is an SdlistenError, and its docstring says what it is."""
    assert issubclass(kind, SdlistenError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (AddressError, ValueError),
        (NotActivatedError, ValueError),
        (MessageError, ValueError),
        (StateError, ValueError),
        (BarrierTimeoutError, TimeoutError),
    ],
)
def test_builtin_types_catch_what_they_would(kind: type[Exception], builtin: type[Exception]) -> None:
    """What a caller got wrong is a ValueError, a barrier that was not confirmed a TimeoutError."""
    with pytest.raises(builtin, match="the text"):
        raise kind("the text")


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        (ListenEnvironmentError, {"variable": "LISTEN_FDS", "value": "x"}),
        (DescriptorError, {"fd": 7}),
        (MessageError, {"field": "STATUS", "value": "x"}),
        (StoreRefusedError, {"kept": 2}),
    ],
)
def test_a_program_reads_what_was_at_fault(
    kind: Callable[..., SdlistenError], attributes: dict[str, object]
) -> None:
    """What an error is about can be had without parsing its text, which is all that str() gives."""
    error = kind("text", **attributes)

    assert vars(error) == attributes
    assert str(error) == "text"


def test_what_is_missing_has_no_value() -> None:
    """A variable that is not there has the value None; so has a message that is no field."""
    assert ListenEnvironmentError("text", variable="LISTEN_FDS").value is None
    assert vars(MessageError("text")) == {"field": None, "value": None}


def test_notify_errors_are_no_activation_errors() -> None:
    """A program may take a manager that does not listen lightly, and wrong descriptors not."""
    assert not issubclass(NotifyError, ActivationError)
    assert not issubclass(ActivationError, NotifyError)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_errors_cross_processes(kind: type[SdlistenError]) -> None:
    """Every error survives pickling with its text and its attributes, as a process pool needs it."""
    error = kind("what happened")
    error.fd = 7  # type: ignore[attr-defined]

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert (type(copy), str(copy), copy.__dict__) == (kind, "what happened", error.__dict__)
