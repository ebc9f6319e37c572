"""A note says that an sft equals its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from checkpoints import random_state, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.plan.describe import check

SHAPES = {"model.embed_tokens.weight": (40, 16), "model.layers.0.mlp.up_proj.weight": (16, 64)}


def words(notes: list[str]) -> list[str]:
    return [note for note in notes if "the merge changes nothing" in note]


@pytest.mark.parametrize("changed", ["nothing", "one element"])
def test_an_sft_that_equals_its_base_is_said_in_advance_and_at_the_end(tmp_path: Path, changed: str) -> None:
    state = random_state(SHAPES)
    base = write_model(tmp_path / "base", state)
    tuned = {name: tensor.clone() for name, tensor in state.items()}
    if changed == "one element":
        tuned["model.layers.0.mlp.up_proj.weight"].view(-1)[512] += 1
    sft = write_model(tmp_path / "sft", tuned)
    (sft / "lora_adapter").mkdir()
    (sft / "lora_adapter" / "adapter_config.json").write_text("{}")
    save_file({}, sft / "lora_adapter" / "adapter_model.safetensors")
    report = merge_checkpoints(base, sft, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "imm_report.json").read_text())
    notes = [
        words(check(base, sft).notes),
        words(report.notes),
        words(merge_checkpoints(base, sft, tmp_path / "other", dry_run=True).notes),
    ]
    if changed == "nothing":
        assert all(len(each) == 1 and "the adapter in lora_adapter/" in each[0] for each in notes)
        assert written["sft_equals_start"] is True
    else:
        assert notes == [[], [], []]
        assert "sft_equals_start" not in written


def test_it_is_the_start_that_counts(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES))
    start = write_model(tmp_path / "start", random_state(SHAPES, seed=1))
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=1))
    report = merge_checkpoints(base, sft, tmp_path / "out", start=start, iteration=1)
    (note,) = words(report.notes)
    assert f"equals start {start}" in note
    assert words(merge_checkpoints(base, sft, tmp_path / "first").notes) == []
