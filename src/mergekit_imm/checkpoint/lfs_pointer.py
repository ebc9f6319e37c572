"""Pointers of Git LFS, which lie in a clone in place of large files that were not downloaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..common.messages import shown
from ..errors import CheckpointError

_BEGIN = b"version https://git-lfs"


def check_no_pointer(path: Path, content: bytes | None = None) -> None:
    """Raise CheckpointError if a file, whose `content` may be known, is a pointer. One that cannot be read is none."""
    if content is None:
        with suppress(OSError), path.open("rb") as file:
            content = file.read(len(_BEGIN))
    if content is not None and content.startswith(_BEGIN):
        raise CheckpointError(
            f"{shown(path)} is a Git LFS pointer, not the file itself; run `git lfs pull` in {shown(path.parent)}, or"
            " download the model again"
        )
