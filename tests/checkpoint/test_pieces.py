"""Tensors that several ranks stored in pieces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import read_model, write_model
from mergekit_imm import CheckpointError, merge_checkpoints, verify
from mergekit_imm.checkpoint.lazy_tensor import Pieces
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.safetensors_file import TensorInfo
from mergekit_imm.checkpoint.sharded import joined_pieces
from mergekit_imm.testing import check_input
from other_forms import BASE, CONFIG, FLOATS, SFT, held, raw, save_bin, save_dcp, weights


@pytest.mark.parametrize("layout", ["flat", "shard0", "shard1", "hf0", "hf1"])
def test_pieces_of_ranks_are_merged_as_the_whole(tmp_path: Path, ranks: Path, layout: str) -> None:
    assert sum(isinstance(each, Pieces) for each in open_checkpoint(ranks / layout, "sft").tensors.values()) >= 4
    check_input(ranks / layout, SFT)


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp2",
        "accelerate SHARDED_STATE_DICT",
        "accelerate FULL_STATE_DICT",
        "consolidated0",
        "consolidated1",
    ],
)
def test_so_are_those_of_fsdp_and_what_torch_joined(tmp_path: Path, ranks: Path, layout: str) -> None:
    check_input(ranks / layout, FLOATS)


def test_what_is_no_model_is_listed(ranks: Path) -> None:
    left = open_checkpoint(ranks / "fsdp2", "sft").left_out
    assert left == (f"optimizer.* ({3 * len(FLOATS) + 12} entries)", "rng_state", "step")


def test_the_folder_of_a_trainer_gives_its_config(tmp_path: Path, ranks: Path) -> None:
    sft = tmp_path / "checkpoint-9"
    shutil.copytree(ranks / "shard0", sft / "pytorch_model_fsdp_0")
    shutil.copytree(ranks / "fsdp2", sft / "optimizer_0")
    (sft / "config.json").write_text(json.dumps(CONFIG | {"told": "by the sft"}))
    (sft / "tokenizer.json").write_text("{}")
    check_input(sft, SFT)
    merge_checkpoints(write_model(tmp_path / "base", BASE, config=CONFIG), sft, tmp_path / "out-1", drop=0.5)
    assert json.loads((tmp_path / "out-1" / "config.json").read_text())["told"] == "by the sft"
    assert (tmp_path / "out-1" / "tokenizer.json").exists()
    recipe = json.loads((tmp_path / "out-1" / "imm_recipe.json").read_text())
    assert set(recipe["inputs"]["sft"]["files"]) == {
        f"pytorch_model_fsdp_0/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
    }


@pytest.mark.parametrize("layout", ["shard0", "shard1", "hf0"])
def test_a_base_in_pieces_gives_safetensors(tmp_path: Path, ranks: Path, layout: str) -> None:
    sft = write_model(tmp_path / "sft", BASE)
    plain = write_model(tmp_path / "plain", SFT)
    merge_checkpoints(ranks / layout, sft, tmp_path / "out", drop=0.5)
    merge_checkpoints(plain, sft, tmp_path / "expected", drop=0.5)
    assert raw(read_model(tmp_path / "out")) == raw(read_model(tmp_path / "expected"))
    assert sorted(weights(tmp_path / "out")) == ["model.safetensors"]
    assert b"DCP_SHARDING_INFO" not in (tmp_path / "out" / "model.safetensors").read_bytes()
    verify(tmp_path / "out")


def test_what_wraps_modules_is_taken_from_names(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    wrapped: Any = torch.compile(module, backend="eager")
    save_dcp({"model": torch.nn.DataParallel(wrapped).state_dict()}, tmp_path / "sft")
    assert held(open_checkpoint(tmp_path / "sft", "sft")) == raw(module.state_dict())
    save_dcp({"app": {"model": module.state_dict(), "optim": {"a": torch.ones(3)}}}, tmp_path / "deeper")
    assert held(open_checkpoint(tmp_path / "deeper", "sft")) == raw(module.state_dict())
    save_dcp({**module.state_dict(), "0.state": {1: 2}, "optim": {"a": torch.ones(3)}}, tmp_path / "beside")
    assert held(open_checkpoint(tmp_path / "beside", "sft")) == raw(module.state_dict())
    assert open_checkpoint(tmp_path / "beside", "sft").left_out == ("0.state.1", "optim.*")
    save_dcp({"a.b": torch.ones(2), "a._orig_mod.b": torch.ones(2)}, tmp_path / "twice")
    with pytest.raises(CheckpointError, match=r"holds tensor 'a\.b' twice, as 'a\.b' and as 'a\._orig_mod\.b'"):
        open_checkpoint(tmp_path / "twice", "sft")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_that_fill_a_tensor_and_no_others_are_joined(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    cuts = [sorted(data.draw(st.sets(st.integers(0, size))) | {0, size}) for size in shape]
    grid: list[tuple[tuple[int, int], ...]] = [()]
    for edges in cuts:
        grid = [(*box, edge) for box in grid for edge in pairwise(edges)]
    boxes = data.draw(st.permutations(grid))
    if data.draw(st.booleans()):
        boxes = [*boxes[1:], *data.draw(st.lists(st.sampled_from(grid), max_size=2))]
    covered = np.zeros(shape, int)
    parts = []
    for box in dict.fromkeys(boxes):
        covered[tuple(slice(*edge) for edge in box)] += 1
    for box in boxes:
        sizes = tuple(high - low for low, high in box)
        parts.append((TensorInfo("a", "F32", sizes, "f", 0, int(np.prod(sizes)) * 4), tuple(low for low, _ in box)))
    if (covered == 1).all():
        assert joined_pieces("a", shape, parts, "sft", "x").shape == shape
    else:
        with pytest.raises(CheckpointError, match="do not fill it or overlap"):
            joined_pieces("a", shape, parts, "sft", "x")


def test_no_torch_is_needed(tmp_path: Path, ranks: Path) -> None:
    base = save_bin(BASE, tmp_path / "base")
    code = (
        "import sys; from mergekit_imm import merge_checkpoints\n"
        f"merge_checkpoints({str(base)!r}, {str(ranks / 'shard0')!r}, {str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
