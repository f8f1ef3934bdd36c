"""The types that a program can catch."""

from __future__ import annotations

import pytest

from sdlisten import errors
from sdlisten.errors import (
    ActivationError,
    AddressError,
    BarrierTimeoutError,
    DescriptorError,
    ListenEnvironmentError,
    NotActivatedError,
    NotifyError,
    SdlistenError,
)

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
    [(AddressError, ValueError), (NotActivatedError, ValueError), (BarrierTimeoutError, TimeoutError)],
)
def test_builtin_types_catch_what_they_would(kind: type[Exception], builtin: type[Exception]) -> None:
    """A wrong word and nothing to bind are ValueErrors, an unconfirmed barrier is a TimeoutError."""
    with pytest.raises(builtin, match="the text"):
        raise kind("the text")


def test_listen_environment_error_names_the_variable() -> None:
    """The variable and its value can be read from the error, a missing one as None."""
    error = ListenEnvironmentError("text", variable="LISTEN_FDS", value="x")
    missing = ListenEnvironmentError("text", variable="LISTEN_FDS")

    assert (str(error), error.variable, error.value) == ("text", "LISTEN_FDS", "x")
    assert missing.value is None
    assert isinstance(error, ActivationError)


def test_descriptor_error_names_the_descriptor() -> None:
    """The number of the descriptor can be read from the error."""
    error = DescriptorError("text", fd=7)

    assert (str(error), error.fd) == ("text", 7)
    assert isinstance(error, ActivationError)


def test_notify_errors_are_no_activation_errors() -> None:
    """A program may take a manager that does not listen lightly, and wrong descriptors not."""
    assert not issubclass(NotifyError, ActivationError)
    assert not issubclass(ActivationError, NotifyError)
