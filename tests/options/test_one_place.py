"""Every option is declared once; signatures, commands, recipes and loops agree with the declaration."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_state, write_model
from mergekit_imm import MergeError, iter_merged, merge_checkpoints, merge_into, merged_stream
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.engine.merge import _Keywords
from mergekit_imm.numerics.mask import arithmetic
from mergekit_imm.numerics.sparsifiers import parse_sparsify
from mergekit_imm.options.options import (
    LOOP_OPTIONS,
    MERGE_DEFAULTS,
    MergeOptions,
    RunOptions,
    as_arguments,
    options_from,
)
from mergekit_imm.options.recipe import make_recipe, options_in, parse_recipe, to_json

DECLARED = {each.name: each for each in (*fields(MergeOptions), *fields(RunOptions))}
SWEPT = {"alpha", "drop", "seed"}
RUN = {each.name for each in fields(RunOptions)}


def keywords_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {name: each for name, each in found.items() if each.kind is each.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "lacking", "own"),
    [
        (merge_checkpoints, set(), {"start", "ranks"}),
        (iter_merged, {"max_shard_size", "copy_code", "as_adapter", *RUN} - {"device", "workers"}, {"start", "order"}),
        (
            merge_into,
            {"sparsify", "dtype", "max_shard_size", "vocab", "copy_code", "as_adapter"}
            | {"device", "overwrite", "restart", "verify", "digests"},
            {"start"},
        ),
        (
            merged_stream,
            {"sparsify", "dtype", "max_shard_size", "vocab", "copy_code", "as_adapter", *RUN} - {"workers"},
            {"start"},
        ),
    ],
)
def test_functions_take_the_options_with_their_defaults(
    function: Callable[..., Any], lacking: set[str], own: set[str]
) -> None:
    found = keywords_of(function)
    assert set(found) == (set(DECLARED) - lacking) | own
    wrong = {name for name, each in found.items() if name not in own and each.default != DECLARED[name].default}
    assert not wrong


@pytest.mark.parametrize("name", DECLARED)
def test_a_default_is_what_its_own_check_returns(name: str) -> None:
    default, how = DECLARED[name].default, DECLARED[name].metadata
    if default is not None:  # None: not given
        checked = default if how["check"] is None else how["check"](default)
        assert (type(checked), checked) == (type(default), default)
        assert default in how.get("choices", [default])


def test_the_defaults_go_together() -> None:
    options = MergeOptions()
    assert parse_sparsify(options.sparsify, options.drop).kind == options.sparsify
    assert arithmetic(alpha=options.alpha, drop=options.drop).alpha == options.alpha


def test_so_do_the_types_of_keywords_and_the_commands() -> None:
    assert set(_Keywords.__annotations__) == set(keywords_of(merge_checkpoints)) - SWEPT
    typed = {each.name for each in merge_command.params}
    assert set(DECLARED) - {"progress"} <= typed
    assert set(LOOP_OPTIONS) <= {each.name for each in loop_command.params}
    helped = {each.name: getattr(each, "help", None) for each in merge_command.params}
    assert all(helped[name] == each.metadata["help"] for name, each in DECLARED.items() if name != "progress")


USED: dict[str, Any] = {
    "alpha": 0.25,
    "drop": 0.5,
    "seed": 3,
    "iteration": 2,
    "importance": {"0": 1.0},
    "shrink": 0.5,
    "clip": (0.5, 2.0),
    "layer_factors": "lines:0.5,1",
    "sparsify": "trim",
    "reference": "base",
    "dtype": "float32",
    "max_shard_size": 5_000,
    "keep": ("norm",),
    "take": ("a b",),
    "no_drop": ("bias",),
    "rename": ("^x=y",),
    "vocab": "sft",
    "dequantize": True,
    "allow_nonfinite": True,
    "copy_code": True,
    "leave_out": ("v.safetensors",),
    "as_adapter": True,
}
# What excludes each other: only a merge with the first has none of the second.
OF_AN_ADAPTER = {"as_adapter": True, "drop": 0.0, "iteration": 2, "layer_factors": "lines:0.5,1"}
OTHERS = {name: value for name, value in USED.items() if name not in ("as_adapter", "layer_factors")}


def test_a_recipe_holds_each_of_them_and_gives_it_back() -> None:
    assert set(USED) == set(MERGE_DEFAULTS)
    for values in (OTHERS, OF_AN_ADAPTER):
        options = MergeOptions(**values)
        inputs: dict[str, dict[str, Any]] = {role: {"path": role, "files": {}} for role in ("base", "sft")}
        recipe = make_recipe(options, inputs, {}, [])
        assert options_in(parse_recipe(to_json(recipe), "recipe")) == options
        assert {*values} <= {*recipe["parameters"]}
    plain = make_recipe(MergeOptions(), {}, {}, [])["parameters"]
    assert set(USED) - set(plain) == {"shrink", "clip", "layer_factors", "sparsify", "leave_out", "as_adapter"}
    assert json.loads(json.dumps(plain)) == plain


def test_the_words_of_a_command_mean_the_same_options() -> None:
    of_a_file = ("importance", "shrink", "clip")
    for values in ({name: value for name, value in OTHERS.items() if name not in of_a_file}, OF_AN_ADAPTER):
        options = MergeOptions(**values)
        words = as_arguments(options)
        parsed = merge_command.make_context("imm-merge", ["base", "sft", *shlex.split(shlex.join(words))]).params
        numbers = {name: type(USED[name])(parsed[name][0]) for name in SWEPT}
        assert options_from({**parsed, **numbers}, MergeOptions) == options


def test_options_stay_what_they_are_when_one_is_replaced() -> None:
    for values in (OTHERS, OF_AN_ADAPTER):
        assert replace(MergeOptions(**values), iteration=7) == MergeOptions(**{**values, "iteration": 7})


def test_a_bare_size_of_a_caller_is_refused_and_one_in_a_recipe_is_bytes(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="in bytes"):
        options_from({"max_shard_size": 5_000}, MergeOptions)
    state = random_state({"a": (64, 64), "b": (64, 64)})
    for seed, role in enumerate(("base", "sft")):
        write_model(tmp_path / role, random_state({n: tuple(t.shape) for n, t in state.items()}, seed=seed))
    for _ in range(2):
        report = merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", max_shard_size="10KB")
    assert (report.status, len(report.files)) == ("already merged", 2)


@pytest.mark.parametrize("epsilon", ["0.1", "0.12345678", "1e-08"])
def test_epsilon_is_kept_as_given(epsilon: str) -> None:
    options = MergeOptions(sparsify=f"della:{epsilon}", drop=0.5)
    assert options.sparsify == f"della:{epsilon}"
    assert replace(options) == options
