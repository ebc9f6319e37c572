"""Folders of results, for commands other than a merge: each file is whole or absent, and replaces only its own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.json_files import parse_json, plain_size, read_small
from ..common.messages import shown
from ..errors import OutputError
from .direct_io import make_folder, replace_file
from .paths import expanded
from .write_errors import output_errors


def is_result(path: Path, form: str) -> bool:
    """Return whether a file is a JSON object with this `format`."""
    try:
        plain_size(path)
        content = parse_json(read_small(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == form


def check_folder(typed: str, names: Sequence[str], form: str) -> Path:
    """Return the folder for results. The first of the names is JSON that states its format.

    Raises OutputError for anything but a folder, and for files of these names that are not earlier results.
    """
    folder = expanded(typed)
    with output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {shown(typed)} is not a folder; give another")
        there = [name for name in names if (folder / name).exists()]
        other = next((name for name in there if not (folder / name).is_file()), None)
        if there and (other or not is_result(folder / names[0], form)):
            raise OutputError(
                f"{shown(folder / (other or there[0]))} exists and is not of this command; give another folder with -o"
            )
    return folder


def write_folder(folder: Path, files: Mapping[str, bytes], names: Sequence[str]) -> list[Path]:
    """Write results, remove earlier files of these names that they lack, and return the paths of what was written."""
    with output_errors(folder):
        make_folder(folder)
        for name, content in files.items():
            replace_file(folder / name, content)
        for name in set(names) - set(files):
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]
