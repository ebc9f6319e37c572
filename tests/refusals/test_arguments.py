"""Invalid arguments."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from checkpoints import random_state, write_model
from mergekit_imm import dare_merge
from mergekit_imm.errors import ArgumentError, CheckpointError
from refused import (
    CONFIG,
    SHAPES,
    Models,
)

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, r"alpha is -0\.1; .*weight of the base.*0 <= alpha <= 1"),
    ({"alpha": 1.1}, r"alpha is 1\.1"),
    ({"alpha": float("nan")}, r"alpha is nan"),
    ({"alpha": "0.5"}, r"alpha is '0\.5'"),
    ({"alpha": True}, r"alpha is True"),
    ({"drop": 1}, r"drop is 1; .*0 <= drop < 1.*--alpha 1"),
    ({"drop": -0.1}, r"drop is -0\.1"),
    ({"drop": float("nan")}, r"drop is nan"),
    ({"seed": 1.0}, r"seed is 1\.0; it must be an integer"),
    ({"seed": None}, r"seed is None"),
    ({"iteration": -1}, r"iteration is -1; it must be an integer >= 0"),
    ({"iteration": 0.5}, r"iteration is 0\.5"),
    ({"iteration": 0.0}, r"iteration is 0\.0"),
    ({"iteration": "1"}, r"iteration is '1'"),
    ({"workers": 0}, r"workers is 0; .*at least 1"),
    ({"workers": -1}, r"workers is -1"),
    ({"workers": 1.5}, r"workers is 1\.5"),
    ({"dtype": "float8"}, r"dtype is 'float8'; it must be one of base, start, bfloat16, float16, float32"),
    ({"dtype": torch.float8_e4m3fn}, r"dtype is 'float8_e4m3fn'; it must be one of"),
    ({"reference": "sft"}, r"reference is 'sft'; it must be one of start, base"),
    ({"vocab": "larger"}, r"vocab is 'larger'; it must be one of strict, base, sft"),
    ({"max_shard_size": "5 XB"}, r"size '5 XB' is not understood; write it as 5GB"),
    ({"max_shard_size": "5GB or so"}, r"size '5GB or so' is not understood"),
    ({"max_shard_size": 0}, r"size 0 must be at least one byte"),
    ({"max_shard_size": -5}, r"size -5 is not understood"),
    ({"max_shard_size": "0.5B"}, r"size '0\.5B' must be at least one byte"),
    ({"device": "tpu"}, r"device is 'tpu'; it must be 'cpu' or 'cuda', or 'cuda:1' for the second GPU"),
    ({"keep": "norm"}, r"keep is a string; give a list of patterns, \['norm'\]"),
    ({"keep": [3]}, r"--keep 3 is not a regular expression: give a string"),
    ({"keep": [re.compile("norm")]}, r"--keep .*norm.* is not a regular expression: give a string"),
    ({"keep": ["(norm"]}, r"--keep '\(norm' is not a regular expression: .*"),
    ({"take": ["*"]}, r"--take '\*' is not a regular expression: .*"),
    ({"no_drop": ["["]}, r"--no-drop '\[' is not a regular expression: .*"),
    ({"keep": ["nrom"]}, r"--keep 'nrom' matches none of the 5 tensor names, such as 'lm_head\.weight'"),
    ({"take": ["^norm"]}, r"--take '\^norm' matches none of the 5"),
    ({"no_drop": ["norm", "nrom"]}, r"--no-drop 'nrom' matches none of the 5"),
    ({"keep": ["norm"], "take": ["model"]}, r"'model\.norm\.weight' is both kept and taken; change --keep or --take"),
]


@pytest.mark.parametrize(("options", "match"), ARGUMENTS, ids=[str(options) for options, _ in ARGUMENTS])
def test_arguments_out_of_range_are_refused(models: Models, options: dict[str, Any], match: str) -> None:
    models.refused(ArgumentError, match, **options)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "2"])
def test_layer_factors_out_of_range_are_refused(factor: float) -> None:
    with pytest.raises(ArgumentError, match=r"factor is .*finite number >= 0"):
        dare_merge(torch.zeros(2), torch.ones(2), drop=0, factor=factor)


def test_a_factor_that_overflows_the_rescale_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"factor 1e\+38 / \(1 - drop 0\.999\) does not fit in float32"):
        dare_merge(torch.zeros(2), torch.ones(2), drop=0.999, factor=1e38, name="a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(models: Models) -> None:
    models.refused(
        ArgumentError, r"device is 'cuda', which torch .* cannot use here.*--device cpu", streaming=True, device="cuda"
    )


L0, L1 = "model.layers.0", "model.layers.1"
IMPORTANCES: list[tuple[object, str]] = [
    ({L0: 1.0}, rf"layers model\.layers\.\* are given for 1 of 2: missing {L1}; name every layer of a stack or none"),
    ({L0: 1.0, L1: 1.0, "model.layers.7": 1.0}, rf"no tensor .* layer 'model\.layers\.7'.*its layers are {L0}, {L1}"),
    ({"0": 1.0, "1": 1.0, "2": 1.0}, r"no tensor of the model lies in layer 'model\.layers\.2'"),
    ({L0: -1.0, L1: 1.0}, rf"importance of layer '{L0}' is -1\.0; it must be .*finite.* >= 0"),
    ({L0: float("nan"), L1: 1.0}, rf"importance of layer '{L0}' is nan"),
    ({L0: float("inf"), L1: 1.0}, rf"importance of layer '{L0}' is inf"),
    ({L0: "much", L1: 1.0}, rf"importance of layer '{L0}' is 'much'"),
    ({L0: None, L1: 1.0}, rf"importance of layer '{L0}' is None"),
    ({L0: True, L1: 1.0}, rf"importance of layer '{L0}' is True"),
    ({L0: 10**400, L1: 1.0}, rf"importance of layer '{L0}' is 1000"),
    ({L0: 0.0, L1: 0.0}, r"importances sum to 0\.0; at least one must be > 0"),
    ({}, r"importance is empty; give one value for each layer"),
]


@pytest.mark.parametrize(("importance", "match"), IMPORTANCES, ids=[match[:30] for _, match in IMPORTANCES])
@pytest.mark.parametrize("form", ["mapping", "file", "file with layers"])
def test_importances_out_of_range_are_refused(models: Models, importance: object, match: str, form: str) -> None:
    given: Any = importance
    if form != "mapping":
        given = models.folder / "importance.json"
        given.write_text(json.dumps({"layers": importance} if form == "file with layers" else importance))
    models.refused(ArgumentError, match, importance=given)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[1.0, 2.0]", r"must hold a mapping"),
        (b'{"layers": [1.0, 2.0]}', r"must hold a mapping"),
        (b"1", r"must hold a mapping"),
        (b"", r"is not JSON"),
        (b"layer,importance", r"is not JSON"),
        (b"\xff\xfe", r"is not JSON"),
        (None, r"cannot be read: No such file"),
    ],
)
def test_importance_files_that_are_none_are_refused(models: Models, content: bytes | None, match: str) -> None:
    path = models.folder / "importance.json"
    if content is not None:
        path.write_bytes(content)
    models.refused(ArgumentError, rf"importance file .*importance\.json {match}", importance=path)


def test_an_importance_that_is_a_list_is_refused(models: Models) -> None:
    models.refused(ArgumentError, r"importance.*mapping", importance=[1.0, 2.0])


def test_plain_indices_need_a_single_stack_of_layers(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {"vision.blocks.0.weight": torch.zeros(2)})
    models.refused(
        ArgumentError,
        r"plain indices, .*2 stacks of layers \(model\.layers, vision\.blocks\); use full keys",
        importance={"0": 1.0, "1": 2.0},
    )


def test_a_start_without_a_recipe_needs_the_round(models: Models) -> None:
    start = write_model(models.folder / "start", random_state(SHAPES), config=CONFIG)
    models.refused(ArgumentError, r"start \S+ has no imm_recipe\.json.*--iteration N \(counted from 0\)", start=start)
    assert models.merge(start=start, iteration=3).parameters["iteration"] == 3


def test_a_start_that_was_merged_tells_the_round(models: Models) -> None:
    models.merge(out=models.folder / "start", iteration=4)
    assert models.merge(start=models.folder / "start").parameters["iteration"] == 5


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"version": 1', '"version": 2', r"imm_recipe\.json has version 2, this program reads 1; upgrade"),
        ('"format": "mergekit_imm recipe"', '"format": "other"', r"imm_recipe\.json is damaged: its format is"),
        ('"iteration": 0', '"iteration": -1', r"imm_recipe\.json is damaged: iteration is -1"),
        ('"iteration": 0', '"round": 0', r"imm_recipe\.json is damaged"),
        ('"history": []', '"history": {}', r"imm_recipe\.json is damaged: .*history"),
        ("{", "[", r"imm_recipe\.json is damaged"),
    ],
)
def test_a_start_with_a_recipe_that_cannot_be_read_is_refused(models: Models, old: str, new: str, match: str) -> None:
    start = models.folder / "start"
    models.merge(out=start)
    recipe = (start / "imm_recipe.json").read_text()
    assert old in recipe
    (start / "imm_recipe.json").write_text(recipe.replace(old, new, 1))
    models.refused(CheckpointError, match, start=start)
