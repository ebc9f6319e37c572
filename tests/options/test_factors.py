"""Layer factors (lines, groups, files, shrink, clip) against their formulas, in every way to merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import random_state, read_model, same_bits, write_model
from mergekit_imm import (
    dare_merge,
    group_factors,
    importance_factors,
    iter_merged,
    lines_factors,
    merge_checkpoints,
    merge_into,
)
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.errors import ArgumentError, MergeError
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import Settings
from mergekit_imm.options.layer_factors import resolve_factors

NAMES = ["embed.weight", *(f"model.layers.{n}.w" for n in range(12)), "norm.weight"]
LAYERS = [f"model.layers.{n}" for n in range(12)]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    base = random_state(dict.fromkeys(NAMES, (40, 30)), seed=0)
    sft = {name: each + random_state({name: (40, 30)}, seed=1, scale=0.005)[name] for name, each in base.items()}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", sft)
    return tmp_path


def test_a_line_is_lines() -> None:
    """LiNeS: alpha + beta * (l - 1) / (L - 1) for l = 1..L, and alpha outside the layers."""
    alpha, beta = 0.3, 0.7
    found = lines_factors(NAMES, alpha, alpha + beta)
    for number, layer in enumerate(LAYERS, 1):
        assert found[layer] == pytest.approx(alpha + beta * (number - 1) / 11)
    assert found["outside"] == alpha
    assert lines_factors(["h.0.w"], 0.25, 0.75) == {"h.0": 0.75, "outside": 0.25}


def test_each_stack_has_its_own_line() -> None:
    names = [f"{stack}.{n}.w" for stack, count in (("text.layers", 3), ("vision.blocks", 11)) for n in range(count)]
    found = lines_factors(names, 0, 1)
    assert [found[f"text.layers.{n}"] for n in range(3)] == [0, 0.5, 1]
    assert found["vision.blocks.10"] == 1  # layers are ordered by number, not as strings


@given(st.integers(1, 200))
def test_groups_are_thirds(count: int) -> None:
    found = group_factors([f"h.{n}" for n in range(count)], 1, 2, 3)
    values = list(found.values())
    assert values == sorted(values)
    sizes = [values.count(each) for each in (1, 2, 3)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_shrink_and_clip_follow_their_formulas() -> None:
    importance = {"h.0": 1.0, "h.1": 2.0, "h.2": 9.0}
    assert importance_factors(importance, shrink=0.5) == {"h.0": 0.625, "h.1": 0.75, "h.2": 1.625}
    assert importance_factors(importance, clip=(0.4, 2)) == {"h.0": 0.4, "h.1": 0.5, "h.2": 2}
    assert importance_factors(importance, shrink=0) == dict.fromkeys(importance, 1.0)
    for wrong in ({"shrink": 1.5}, {"shrink": -0.1}, {"clip": (2, 1)}, {"clip": (-1, 1)}, {"clip": (0, float("inf"))}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            importance_factors(importance, **wrong)


def expected(folders: Path, factors: dict[str, float]) -> dict[str, torch.Tensor]:
    """Merge each tensor alone, with its factor."""
    base, sft = read_model(folders / "base"), read_model(folders / "sft")
    return {
        name: dare_merge(
            each,
            sft[name],
            alpha=0.4,
            drop=0.3,
            name=name,
            factor=factors.get(name.removesuffix(".w"), factors.get("outside", 1.0)),
        )
        for name, each in base.items()
    }


RULES: list[tuple[Any, dict[str, float]]] = [
    ("lines:0.2,1", lines_factors(LAYERS, 0.2, 1)),
    ("groups:0.5,1,0", group_factors(LAYERS, 0.5, 1, 0)),
    ({str(n): n / 8 for n in range(12)}, {f"model.layers.{n}": n / 8 for n in range(12)}),
    (dict.fromkeys(LAYERS, 1.5) | {"outside": 0.0}, dict.fromkeys(LAYERS, 1.5) | {"outside": 0.0}),
]


@pytest.mark.parametrize(("given", "factors"), RULES, ids=["lines", "groups", "indices", "mapping"])
def test_every_way_to_merge_takes_them(folders: Path, given: Any, factors: dict[str, float]) -> None:
    wanted = expected(folders, factors)
    options: dict[str, Any] = {"alpha": 0.4, "drop": 0.3, "layer_factors": given}
    merge_checkpoints(folders / "base", folders / "sft", folders / "out", **options)
    streamed = dict(iter_merged(folders / "base", folders / "sft", **options))
    model = torch.nn.Module()
    for name, each in read_model(folders / "sft").items():
        *parents, last = name.split(".")
        at = model
        for part in parents:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, torch.nn.Parameter(each))
    merge_into(model, folders / "base", **options)
    live = {name: parameter.data for name, parameter in model.named_parameters()}
    in_memory = (
        {}
        if isinstance(given, str)
        else dare_merge(read_model(folders / "base"), read_model(folders / "sft"), **options)
    )
    for found in (read_model(folders / "out"), streamed, live, in_memory):
        assert all(same_bits(wanted[name], each) for name, each in found.items())
    recipe = json.loads((folders / "out" / "imm_recipe.json").read_text())
    assert recipe["parameters"]["layer_factors"] == given
    assert "--layer-factors" in (folders / "out" / "README.md").read_text()


def test_files_hold_them_too(folders: Path) -> None:
    for number, content in enumerate(({"0": 0.5} | {str(n): 1 for n in range(1, 12)}, None)):
        layers = content or dict.fromkeys(LAYERS, 0.5)
        text = json.dumps(layers if content else {"layers": layers, "outside": 0.25})
        (folders / "factors.json").write_text(text)
        out = folders / f"out-{number}"
        merge_checkpoints(
            folders / "base", folders / "sft", out, alpha=0.4, drop=0.3, layer_factors=folders / "factors.json"
        )
        full = {f"model.layers.{key}" if key.isdigit() else key: value for key, value in layers.items()}
        wanted = expected(folders, full | ({} if content else {"outside": 0.25}))
        assert all(same_bits(wanted[name], each) for name, each in read_model(out).items())


def test_an_importance_shrunk_and_clipped_is_its_factors(folders: Path) -> None:
    importance = {layer: float(number + 1) for number, layer in enumerate(LAYERS)}
    options: dict[str, Any] = {"alpha": 0.4, "drop": 0.3}
    shaped: dict[str, Any] = {"shrink": 0.5, "clip": (0.7, 1.2)}
    merge_checkpoints(folders / "base", folders / "sft", folders / "one", importance=importance, **shaped, **options)
    merge_checkpoints(
        folders / "base",
        folders / "sft",
        folders / "two",
        layer_factors=importance_factors(importance, **shaped),
        **options,
    )
    one, other = read_model(folders / "one"), read_model(folders / "two")
    assert all(same_bits(one[name], other[name]) for name in one)
    again = merge_checkpoints(
        folders / "base", folders / "sft", folders / "one", importance=importance, **shaped, **options
    )
    assert again.status == "already merged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_factors": "lines:0.5"}, "lines:FIRST,LAST"),
        ({"layer_factors": "groups:1,2"}, "groups:EARLY"),
        ({"layer_factors": "lines:-1,2"}, "factors >= 0"),
        ({"layer_factors": "lines:0,nan"}, "factors >= 0"),
        ({"layer_factors": "nowhere.json"}, "layer factors file nowhere.json cannot be read"),
        ({"layer_factors": "line:0.3,1"}, "rules are lines:FIRST,LAST and groups:EARLY"),
        ({"importance": {"0": 1.7e308} | {str(n): 0 for n in range(1, 12)}}, "too large"),
        ({"layer_factors": {"model.layers.0": 1.0}}, "for 1 of 12"),
        ({"layer_factors": {"model.layers.0": "x"}}, "factor of layer 'model.layers.0'"),
        ({"layer_factors": {}}, "give a mapping"),
        ({"layer_factors": "lines:0,1", "importance": {"model.layers.0": 1.0}}, "both given"),
        ({"shrink": 0.5}, "none is given"),
        ({"layer_factors": "lines:0,1", "clip": (0.5, 2)}, "none is given"),
        ({"layer_factors": {str(n): 10**400 for n in range(12)}}, "a finite number >= 0"),
        ({"clip": (0.5, 2)}, "none is given"),
    ],
)
def test_what_cannot_be_is_refused(folders: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        merge_checkpoints(folders / "base", folders / "sft", folders / "out", **options)
    assert not (folders / "out").exists()


def test_a_file_of_importances_is_not_taken_for_factors(folders: Path) -> None:
    content = {"format": "mergekit_imm importance", "layers": dict.fromkeys(LAYERS, 3.0)}
    (folders / "importance.json").write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="give it as importance"):
        merge_checkpoints(folders / "base", folders / "sft", folders / "out", layer_factors=folders / "importance.json")


def test_a_rule_needs_layers() -> None:
    with pytest.raises(ArgumentError, match="the model has none"):
        resolve_factors("lines:0,1", ["embed.weight"])


def test_a_loop_refuses_factors_of_another_model_before_it_trains(folders: Path) -> None:
    (folders / "wrong.json").write_text(json.dumps({"model.layers.0": 1.0}))
    train = f"touch {folders / 'trained'}; cp -r {{model}} {{output}}"
    for options in (
        {"importance": str(folders / "wrong.json")},
        {"layer_factors": str(folders / "wrong.json")},
        {"layer_factors": "lines:2"},
        {"layer_factors": "lines:1e39,1"},
        {"sparsify": "della:0.5"},
        {"shrink": 0.5},
    ):
        with pytest.raises(MergeError):
            run_loop(Settings(base=str(folders / "base"), train=train, options=options), folders / "run")
    assert not (folders / "trained").exists()


def test_a_loop_merges_with_them(folders: Path) -> None:
    settings = Settings(
        base=str(folders / "base"),
        train=f"cp -r {folders / 'sft'} {{output}}",
        rounds=1,
        alpha="0.4",
        drop="0.3",
        options={"layer_factors": "lines:0.2,1", "sparsify": "trim"},
    )
    state = run_loop(settings, folders / "run")
    merge_checkpoints(
        folders / "base",
        folders / "sft",
        folders / "out",
        alpha=0.4,
        drop=0.3,
        layer_factors="lines:0.2,1",
        sparsify="trim",
    )
    one, other = read_model(Path(state.model)), read_model(folders / "out")
    assert all(same_bits(one[name], other[name]) for name in one)


def test_what_stands_beside_layers_is_not_passed_over(folders: Path) -> None:
    content = {"layers": dict.fromkeys(LAYERS, 1.0), "Outside": 0.0}
    (folders / "factors.json").write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="has 'Outside' beside its layers"):
        merge_checkpoints(folders / "base", folders / "sft", folders / "out", layer_factors=folders / "factors.json")


def test_whole_numbers_are_keys_too(folders: Path) -> None:
    base, sft = read_model(folders / "base"), read_model(folders / "sft")
    given: Any = dict.fromkeys(range(12), 0.5)
    merged = dare_merge(base, sft, drop=0.0, layer_factors=given)
    assert same_bits(merged[NAMES[1]], dare_merge(base[NAMES[1]], sft[NAMES[1]], drop=0.0, factor=0.5))
    with pytest.raises(ArgumentError, match="give a mapping"):
        dare_merge(base, sft, layer_factors={})


def test_the_command_takes_them(folders: Path) -> None:
    importance = {layer: float(number + 1) for number, layer in enumerate(LAYERS)}
    (folders / "importance.json").write_text(json.dumps({"layers": importance}))
    arguments = [str(folders / "base"), str(folders / "sft"), "--importance", str(folders / "importance.json")]
    arguments += ["--shrink", "0.5", "--clip", "0.7", "1.2", "-q", "-o", str(folders / "out")]
    CliRunner().invoke(merge_command, arguments, catch_exceptions=False, standalone_mode=False)
    merge_checkpoints(
        folders / "base", folders / "sft", folders / "two", importance=importance, shrink=0.5, clip=(0.7, 1.2)
    )
    one, other = read_model(folders / "out"), read_model(folders / "two")
    assert all(same_bits(one[name], other[name]) for name in one)
    assert "--clip 0.7 1.2" in (folders / "out" / "README.md").read_text()
