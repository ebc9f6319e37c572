"""Folders and files of results: written whole or not at all, and only over earlier ones of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.json_files import parse_json, plain_size, read_small
from ..common.messages import shown
from ..errors import OutputError
from .direct_io import make_folder, replace_file
from .paths import expanded, output_errors


def is_result(path: Path, form: str) -> bool:
    """Whether a file is JSON that says it is of this format."""
    try:
        plain_size(path)
        content = parse_json(read_small(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == form


def check_folder(typed: str, names: Sequence[str], form: str) -> Path:
    """Return the folder that results go to, the first of the names JSON that says its format.

    Raises OutputError for what is no folder, and for files of these names that are not of earlier results.
    """
    folder = expanded(typed)
    with output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {shown(typed)} is no folder; give another")
        there = [name for name in names if (folder / name).exists()]
        other = next((name for name in there if not (folder / name).is_file()), None)
        if there and (other or not is_result(folder / names[0], form)):
            raise OutputError(
                f"{shown(folder / (other or there[0]))} is there, and not of this command; give another folder with -o"
            )
    return folder


def write_folder(folder: Path, files: Mapping[str, bytes], names: Sequence[str]) -> list[Path]:
    """Write results, and remove those of earlier ones that these have not; return the files' paths."""
    with output_errors(folder):
        make_folder(folder)
        for name, content in files.items():
            replace_file(folder / name, content)
        for name in set(names) - set(files):
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]
