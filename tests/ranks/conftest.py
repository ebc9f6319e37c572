"""One merge by many processes: the same bytes, whoever ends when."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_imm import merge_checkpoints
from merging_ranks import write_pair


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, sft, and what one process makes of them, `one`."""
    folder = write_pair(tmp_path_factory.mktemp("pair"))
    # With the paths that the commands are given, since they stand in the recipe.
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        merge_checkpoints("base", "sft", "one", drop=0.9)
    return folder


@pytest.fixture
def case(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own, with links to base and sft."""
    for role in ("base", "sft"):
        (tmp_path / role).symlink_to(pair / role)
    monkeypatch.chdir(tmp_path)
    return tmp_path
