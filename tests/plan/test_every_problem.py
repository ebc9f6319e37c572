"""`check` reports every problem beside the others, wherever it is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import State, random_state, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.errors import ArgumentError
from mergekit_imm.numerics.sparsifiers import Sparsifier
from mergekit_imm.options.options import MergeOptions
from mergekit_imm.plan import decide
from mergekit_imm.plan.describe import _input_description, check

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
SHAPES = {EMBED: (8, 16), UP: (16, 32), "norm.weight": (16,)}
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}


def adapter(folder: Path, state: State, **settings: object) -> Path:
    """An adapter that holds tensors of the model under `state`'s names."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in state.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_options_that_name_nothing_hide_no_tensor_that_differs(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES))
    sft = write_model(tmp_path / "sft", random_state({**SHAPES, UP: (16, 33)}, seed=1))
    options = MergeOptions(keep=("kepe",), no_drop=("nrom", "norm"), layer_factors={"model.layers.7": 0.5})
    report = check(base, sft, options)
    starts = [
        'keep=[r"kepe"] matches none',
        'no_drop=[r"nrom"] matches none',
        "layer 'model.layers.7'",
        f"tensor '{UP}'",
    ]
    assert len(report.problems) == len(starts)
    for start, problem in zip(starts, report.problems, strict=True):
        assert start in problem
    assert [each["role"] for each in report.inputs] == ["base", "sft"]
    assert {kind["name"]: kind["action"] for kind in report.kinds} == {
        EMBED: "merge",
        "norm.weight": "merge",
        "model.layers.*.mlp.up_proj.weight": "refused",
    }


def test_tensors_both_kept_and_taken_are_refused_once(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES))
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=1))
    report = check(base, sft, MergeOptions(keep=("weight",), take=("norm", "up_proj"), no_drop=("nrom",)))
    assert ["both kept and taken" in problem for problem in report.problems] == [False, True]
    assert sum(kind["tensors"] for kind in report.kinds if kind["action"] == "refused") == 2


def test_ties_in_doubt_hide_no_pattern(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES), config=CONFIG)
    state = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 8),
        "model.embed_tokens.lora_embedding_B": torch.ones(16, 2),
        "lm_head.lora_A.weight": torch.ones(2, 16),
        "lm_head.lora_B.weight": torch.ones(8, 2),
    }
    sft = adapter(tmp_path / "sft", state, target_modules=["embed_tokens", "lm_head"])
    report = check(base, sft, MergeOptions(no_drop=("nrom",)))
    assert len(report.problems) == 2
    assert "which are one tensor" in report.problems[0]
    assert 'no_drop=[r"nrom"] matches none' in report.problems[1]
    assert len(report.inputs) == 2


def test_a_head_without_an_embedding_hides_no_other_tensor(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state({**SHAPES, EMBED: (8, 12), UP: (16, 33)}), config=CONFIG)
    start = write_model(tmp_path / "start", random_state(SHAPES), config=CONFIG)
    sft = adapter(tmp_path / "sft", {HEAD: torch.ones(10, 16)}, modules_to_save=["lm_head"])
    problems = check(base, sft, start=start).problems
    assert len(problems) == 3
    for text in (f"'{HEAD}' is not in base", f"'{EMBED}' is BF16 [8, 12]", f"'{UP}' is BF16 [16, 33]"):
        assert sum(text in problem for problem in problems) == 1, text


def test_what_the_plan_refuses_stands_beside_the_inputs(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES), side={"notes": "x"})
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=1), side={"notes/more.json": "{}"})
    report = check(base, sft)
    assert ["but a folder in" in problem for problem in report.problems] == [True]
    assert len(report.inputs) == 2
    assert sum(kind["tensors"] for kind in report.kinds) == 3


def test_a_sparsifier_without_a_form_for_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base", random_state(SHAPES))
    sft = write_model(tmp_path / "sft", random_state(SHAPES, seed=1))
    monkeypatch.setattr(decide, "parse_sparsify", lambda *_: Sparsifier("magnitude"))
    with pytest.raises(ArgumentError, match="magnitude is not implemented for checkpoints"):
        merge_checkpoints(base, sft, tmp_path / "out", sparsify="trim", drop=0.5)


def test_a_form_without_a_name_is_told_by_its_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", random_state(SHAPES))
    base = open_checkpoint(folder, "base")
    (file,) = base.files.values()
    assert _input_description(base)["form"] == "safetensors"
    assert _input_description(replace(base, files={"model.gguf": file}))["form"] == ".gguf files"
