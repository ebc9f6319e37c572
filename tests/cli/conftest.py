"""Commands as users run them."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from checkpoints import random_state, write_model
from commands import (
    CONFIG,
    NAMES,
    SHAPES,
    SIDE,
    Command,
    Ended,
    write_pair,
)
from mergekit_imm import merge_checkpoints
from mergekit_imm.cli import console
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with base and sft."""
    monkeypatch.chdir(write_pair(tmp_path))
    return tmp_path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, as its console script does."""

    def run(which: click.Command, *arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            console.run_and_exit(which, list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run


@pytest.fixture
def merge(command: Command) -> Command:
    return lambda *arguments: command(merge_command, *arguments)


@pytest.fixture
def check(command: Command) -> Command:
    return lambda *arguments: command(verify_command, *arguments)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base and sft of 50 MB each, and their merge."""
    folder = tmp_path_factory.mktemp("large")
    for seed, role in enumerate(("base", "sft")):
        row = random_state({"": (1 << 20,)}, seed=seed)[""]
        state = {f"layers.{i}.weight": row.roll(i).view(1 << 10, 1 << 10) for i in range(24)}
        write_model(folder / role, state, config=CONFIG, side=SIDE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        merge_checkpoints("base", "sft", "whole")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merges of two rounds, the second with a start, shards, a changed config and side files."""
    folder = write_pair(tmp_path_factory.mktemp("rounds"))
    (folder / "base" / "model.safetensors").unlink()
    write_model(folder / "base", random_state(SHAPES, seed=5), shards=[NAMES[:2], NAMES[2:]])
    merge_checkpoints(folder / "base", folder / "sft", folder / "first")
    merge_checkpoints(
        folder / "base", folder / "sft", folder / "second", start=folder / "first", dtype="float32", keep=["norm"]
    )
    return folder
