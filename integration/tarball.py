"""Files in memory as a tar archive: what the engine takes as a build context and as files for a container."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("tarball",)


def tarball(files: Mapping[str, str | bytes | Path]) -> bytes:
    """Return a tar archive of `files`: text, bytes, or a path on the host whose file or tree is read.

    Everything belongs to root. Text and bytes that begin with ``#!`` become executable (0755), others 0644.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            inside = name.lstrip("/")
            if isinstance(content, Path):
                tar.add(content, inside, filter=_owned_by_root)
                continue
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(inside)
            entry.size = len(data)
            entry.mtime = time.time()
            entry.mode = 0o755 if data.startswith(b"#!") else 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what Python wrote for itself; the rest belongs to root."""
    if Path(entry.name).name == "__pycache__":
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
