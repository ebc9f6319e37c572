"""Pairs of models in the current folder, and mounted filesystems."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from checkpoints import random_state, write_model
from commands import CONFIG, SIDE, write_pair


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_pair(tmp_path))
    return tmp_path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with options, or remount it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        ended = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if ended.returncode != 0:
            pytest.skip(f"no filesystem can be mounted here: {ended.stderr.strip()}")
        return place

    yield mount
    with suppress(OSError):
        subprocess.run(["umount", place], capture_output=True)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base and sft of 20 MB each."""
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("base", "sft")):
        state = random_state({f"layers.{i}.weight": (1 << 10, 1 << 10) for i in range(10)}, seed=seed)
        write_model(tmp_path / role, state, config=CONFIG, side=SIDE)
    return tmp_path
