"""Fixtures of merges by many processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_imm import merge_checkpoints
from merging_ranks import write_pair


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, sft, and `one`, their merge by one process."""
    folder = write_pair(tmp_path_factory.mktemp("pair"))
    # The same relative paths as in the commands: the recipe holds them.
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        merge_checkpoints("base", "sft", "one", drop=0.9)
    return folder


@pytest.fixture
def case(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder with links to base and sft."""
    for role in ("base", "sft"):
        (tmp_path / role).symlink_to(pair / role)
    monkeypatch.chdir(tmp_path)
    return tmp_path
