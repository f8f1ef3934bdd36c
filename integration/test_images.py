"""Images are made once from their inputs, replaced when these change, and come from where the user says."""

from __future__ import annotations

import math
import os
import socket
from typing import TYPE_CHECKING

import pytest

from . import images as module
from .images import RELEASES, ImageError, _build, _made, base, image

if TYPE_CHECKING:
    from collections.abc import Callable

    import docker

TRIXIE = RELEASES[1]


def test_image_is_made_once(engine: docker.DockerClient, images: Callable[..., str]) -> None:
    """The second call for an image finds what the first one made, and neither builds nor tags anything."""
    tag = images(TRIXIE)
    made = engine.images.get(tag)
    assert image(TRIXIE) == tag
    found = engine.images.get(tag)
    assert (found.id, found.attrs["Metadata"]) == (made.id, made.attrs["Metadata"])


def test_image_gives_way_to_its_successor(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its inputs change an image is made anew, and the one that it replaces is removed."""
    monkeypatch.setattr(module, "KEEP_SECONDS", -60)

    def make(tag: str) -> None:
        _build(engine, tag, "FROM scratch\nCOPY word /\n", {"word": tag.encode()})

    name = f"sdlisten-probe:{os.getpid()}"
    first = _made(engine, name, ["one"], make)
    second = _made(engine, name, ["two"], make)
    tags = [tag for found in engine.images.list("sdlisten-probe") for tag in found.tags]
    engine.images.remove(second)
    assert first != second
    assert [tag for tag in tags if tag.startswith(name)] == [second]


def test_named_base_image(engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDLISTEN_BASE_IMAGE replaces the base of the release that it is, or with {suite} of every release."""
    # The base made from `usual` would count as its successor, and `usual` may be old enough to be removed.
    monkeypatch.setattr(module, "KEEP_SECONDS", math.inf)
    usual = base(engine, TRIXIE)
    repository, _, rest = usual.partition(":")
    bookworm = base(engine, RELEASES[0])
    monkeypatch.setenv("SDLISTEN_BASE_IMAGE", usual)
    named = base(engine, TRIXIE)
    assert named != usual
    assert base(engine, RELEASES[0]) == bookworm
    monkeypatch.setenv("SDLISTEN_BASE_IMAGE", f"{repository}:{{suite}}{rest.removeprefix(TRIXIE.suite)}")
    assert base(engine, TRIXIE) == named
    engine.images.remove(named)


def test_named_base_image_that_cannot_be_had(
    engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that is silent counts as absent, and the error names variable and value."""
    monkeypatch.setattr(module, "PULL_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}/none"
        monkeypatch.setenv("SDLISTEN_BASE_IMAGE", name)
        with pytest.raises(
            ImageError, match=f"SDLISTEN_BASE_IMAGE={name}: neither the engine nor a registry"
        ):
            base(engine, TRIXIE)
