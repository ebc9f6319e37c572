"""Where a merged folder comes from: the sha256 of its files, and an in-toto statement of the merge, to be signed.

The statement is what sigstore's model-signing signs and verifies (its predicate v1.0, whose verifiers ignore other
fields), with the recipe of the merge beside the digests. It holds no time and no name of the folder: the same merge
gives the same statement.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.json_files import parse_json, read_small
from ..common.messages import shown
from ..errors import VerifyError
from ..options.recipe import STATEMENT_FILE

PIECE = 1 << 20  # bytes
# What a verifier leaves out of account: the statement itself, what signs it, and git's files.
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", STATEMENT_FILE, "model.sig")


def file_digests(
    folder: Path, names: Collection[str], *, workers: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Return the sha256 of files in a folder, in hexadecimal, by name; tell `advance` of each file's bytes.

    Names are sorted as paths, part by part. Raises OSError.
    """

    def digest(name: str) -> tuple[str, int]:
        found, size = hashlib.sha256(), 0
        with (folder / name).open("rb", buffering=0) as file, memoryview(bytearray(PIECE)) as buffer:
            while count := file.readinto(buffer):
                found.update(buffer[:count])
                size += count
            if hasattr(os, "posix_fadvise"):  # nobody reads it next: leave the page cache to the inputs
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return found.hexdigest(), size

    digests, ordered = {}, sorted(names, key=PurePosixPath)
    with ThreadPoolExecutor(workers) as pool:
        for name, (found, size) in zip(ordered, pool.map(digest, ordered), strict=True):
            digests[name] = found
            advance(size)
    return digests


def statement(recipe: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto statement of a merge: its subject is the sha256 of the digests of all files, in order."""
    root = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values())))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": ".", "digest": {"sha256": root.hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(IGNORED),
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": each} for name, each in digests.items()],
            "merge": dict(recipe),
        },
    }


def stated_digests(folder: Path) -> dict[str, str] | None:
    """Return the digests in a folder's statement by file name; None if it has none. Raises VerifyError."""
    path = folder / STATEMENT_FILE
    try:
        if not path.exists():
            return None
        return {each["name"]: each["digest"] for each in parse_json(read_small(path))["predicate"]["resources"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VerifyError(f"{shown(path)} is not the statement of a merge; remove it, or restore it") from error
