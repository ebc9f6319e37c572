"""A model folder on disk: list it, read its JSON, and find what is missing or linked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import CheckpointError
from ..options.recipe import RECIPE_FILE
from .model_files import READ, Part, is_aside, is_side_file, leave_out_option, matches
from .safetensors_file import ADAPTER_CONFIG, INDEX, Stamp, stamp

_DEPTH = 64  # of folders in a model


def walk(folder: Path, outs: Sequence[Path], prefix: str = "") -> list[str]:
    """Return the relative paths of all files in a folder and below, with forward slashes.

    Other merges and `outs` are skipped. Hidden and linked folders are not entered; they are listed with a trailing
    slash.
    """
    if prefix.count("/") > _DEPTH:
        raise CheckpointError(f"{shown(folder)} is more than {_DEPTH} folders deep in a model; move it away")
    found = []
    for entry in folder.iterdir():
        if not entry.is_dir():
            found.append(prefix + entry.name)
        elif entry.is_symlink() or entry.name.startswith("."):
            found.append(f"{prefix}{entry.name}/")
        elif not (
            entry.name.endswith(".partial")
            or (entry / RECIPE_FILE).exists()
            or any(out.exists() and entry.samefile(out) for out in outs)
        ):
            found += walk(entry, outs, f"{prefix}{entry.name}/")
    return found


def check_links(folder: Path, everything: Sequence[str], label: str) -> None:
    """Raise CheckpointError for a link to a folder of weights elsewhere: links to folders are not followed."""
    for name in everything:
        if not name.endswith("/") or is_aside(name.rstrip("/")):
            continue
        linked = (folder / name).resolve()
        if linked.is_relative_to(folder.resolve()):  # its target is listed anyway
            continue
        with suppress(OSError):
            weights = next((each.name for each in linked.iterdir() if each.name.endswith(READ)), None)
            if weights is not None:
                raise CheckpointError(
                    f"{label} holds weights, {shown(weights)}, in {shown(name)}, a link to another folder, which is not"
                    f" followed: put a copy in its place, or leave it out: {leave_out_option(name)}"
                )


def check_complete(folder: Path, part: Part, label: str, leave_out: Sequence[str]) -> None:
    """Raise CheckpointError if a file that an index names is missing or named by --leave-out."""
    shard = next((name for name in part.files if matches(name, leave_out)), None)
    if shard is not None:
        raise CheckpointError(
            f"--leave-out names {shown(shard)} of {label}, a shard in {part.index or INDEX}; leave out no shard, or all"
            " of them and the index"
        )
    missing = [name for name in part.files if not (folder / name).exists()]
    if missing and (folder / missing[0]).is_symlink():
        raise CheckpointError(f"{label}: {shown(missing[0])} is a broken link; copy or download the model again")
    if missing:
        raise CheckpointError(
            f"{label} lacks {shown(missing[0])} ({len(missing)} of {len(part.files)} files), which its"
            f" {part.index or INDEX} names; copy or download it again"
        )


def stamps_of(folder: Path, everything: list[str], copy_code: bool) -> dict[Path, Stamp]:
    """Return stamps of the small files, taken before they are read."""
    small = [
        name
        for name in everything
        if name in (RECIPE_FILE, ADAPTER_CONFIG) or ".index." in name or is_side_file(name, copy_code=copy_code)
    ]
    found = {}
    for path in (folder / name for name in small):
        with suppress(OSError):  # reported when the file is read
            found[path] = stamp(path)
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError."""
    try:
        content = read_small(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}; copy or download it again") from error
    return parse_json_object(content, str(path))


def parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError."""
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{shown(where)} is not JSON: {shown(error, 200)}; copy or download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{shown(where)} is not a JSON object; copy or download it again")
    return parsed
