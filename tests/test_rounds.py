"""Rounds of a loop of one's own: a checkpoint, tensors or a model each round, against the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import ArgumentError, CheckpointError, Rounds, dare_merge
from mergekit_imm.schedules import linear
from models import fine_tuned, load, new_model

SHAPES = {"model.embed.weight": (8, 4), "model.layers.0.w": (16, 16), "model.layers.1.w": (16, 16)}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.chdir(tmp_path)
    state = random_state(SHAPES)
    write_model(tmp_path / "base", state)
    return state


def tuned(state: State, number: int) -> State:
    return {name: (tensor.float() + 0.01 * (number + 1)).to(tensor.dtype) for name, tensor in state.items()}


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("form", ["checkpoint", "tensors", "module"])
def test_each_round_is_that_of_the_formula(base: State, form: str) -> None:
    rounds = Rounds("base", alpha=linear(0.2, 0.8, 3), drop=0.5, seed=4, options={"no_drop": ["embed"]})
    start = base
    for number, alpha in enumerate((0.2, 0.5, 0.8)):
        sft = tuned(start, number)
        expected = {
            name: dare_merge(
                base[name], sft[name], start=start[name], name=name, alpha=alpha, iteration=number, seed=4,
                drop=0.0 if "embed" in name else 0.5,
            )
            for name in base
        }  # fmt: skip
        given: Any = sft
        saved: dict[str, Any] = {}
        if form == "checkpoint":
            given = write_model(Path(f"sft-{number}"), sft)
        elif form == "module":
            given = torch.nn.Module()
            for name, tensor in sft.items():
                given.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
            given.state_dict = lambda given=given, **_: {n: given.get_parameter(n.replace(".", "_")) for n in SHAPES}

            def save(model: Any, out: Path) -> None:
                write_model(out, {name: tensor.detach() for name, tensor in model.state_dict().items()})

            saved = {"save": save}
        before = rounds
        rounds = rounds.merge(given, f"merged-{number}", **saved)
        assert (before.iteration, rounds.iteration, rounds.start) == (number, number + 1, f"merged-{number}")
        assert_same(read_model(Path(f"merged-{number}")), expected)
        if form == "tensors":
            assert_same(given, expected)  # in place
        start = expected


def test_a_model_of_transformers_is_merged_in_place_and_saved(tmp_path: Path) -> None:
    model = new_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    sft = fine_tuned(model, seed=2)
    sft.save_pretrained(tmp_path / "sft")
    rounds = Rounds(tmp_path / "base", alpha=0.3, drop=0.5)
    after = rounds.merge(sft, tmp_path / "live")
    rounds.merge(tmp_path / "sft", tmp_path / "streamed")
    assert_same(read_model(tmp_path / "live"), read_model(tmp_path / "streamed"))
    live = load(tmp_path / "live", "qwen3_moe").state_dict()
    state: dict[str, Tensor] = sft.state_dict()
    assert_same(state, live)
    assert after.start == tmp_path / "live"


def test_a_model_that_cannot_save_itself_is_refused_before_it_is_merged(base: State) -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ArgumentError, match="Linear has no save_pretrained; give `save`"):
        Rounds("base").merge(module, "out")
    assert same_bits(module.weight.detach(), before)


def test_they_are_saved_and_restored(base: State) -> None:
    rounds = Rounds("base", seed=3)
    assert rounds.restored("rounds.json") == rounds
    rounds = rounds.merge(write_model(Path("sft"), tuned(base, 0)), "merged")
    rounds.save("rounds.json")
    assert Rounds("base", seed=3, alpha=0.7).restored("rounds.json") == Rounds(
        "base", "merged", 0.7, seed=3, iteration=1
    )
    assert sorted(path.name for path in Path().glob("rounds*")) == ["rounds.json"]
    with pytest.raises(ArgumentError, match="is of base base and seed 3, and these rounds are of base and 0"):
        Rounds("base").restored("rounds.json")
    content = json.loads(Path("rounds.json").read_text())
    for damage in ("{", "[]", json.dumps(content | {"iteration": -1}), json.dumps(content | {"version": 2})):
        Path("rounds.json").write_text(damage)
        with pytest.raises(CheckpointError, match="is damaged"):
            Rounds("base", seed=3).restored("rounds.json")
