"""dtype="start": the merged model takes the start's dtypes, tensor by tensor (loops with a float32 anchor)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import State, random_state, read_model, write_model
from commands import subprocess_of
from mergekit_imm import iter_merged, merge_checkpoints, verify

SHAPES = {"model.embed.weight": (8, 4), "model.layers.0.w": (8, 8), "model.norm": (8,), "kept": (4,), "steps": (3,)}
DTYPES = {"model.norm": torch.float32, "kept": torch.float16, "steps": torch.int64}


def state_of(seed: int, dtypes: dict[str, torch.dtype], rest: torch.dtype) -> State:
    state = random_state(SHAPES, seed=seed, dtype=torch.float32, scale=1.0)
    state["steps"] = torch.arange(3)
    return {name: tensor.to(dtypes.get(name, rest)) for name, tensor in state.items()}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    monkeypatch.chdir(tmp_path)
    steps = {"steps": torch.int64}
    states = {
        "base": state_of(0, steps, torch.float32),
        "start": state_of(1, DTYPES, torch.bfloat16),
        "sft": state_of(2, steps, torch.float16),
    }
    for role, state in states.items():
        write_model(tmp_path / role, state, config={"model_type": "tiny", "dtype": "float16"})
    return states


@pytest.mark.parametrize("reference", ["start", "base"])
def test_the_output_has_the_dtypes_of_the_start(models: dict[str, State], reference: str) -> None:
    options: dict[str, Any] = {"start": "start", "iteration": 1, "alpha": 0.25, "drop": 0, "dtype": "start"}
    options |= {"keep": ["kept"], "reference": reference}
    report = merge_checkpoints("base", "sft", "out", **options)
    merged = read_model(Path("out"))
    for name, start in models["start"].items():
        base, sft = models["base"][name].double(), models["sft"][name].double()
        exact = base if name in ("kept", "steps") else 0.25 * base + 0.75 * sft
        assert merged[name].dtype == start.dtype
        tolerance = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(start.dtype, 0)
        torch.testing.assert_close(merged[name].double(), exact, rtol=tolerance, atol=tolerance)
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert report.parameters["dtype"] == "start"
    assert verify("out").files_compared
    streamed = dict(iter_merged("base", "sft", **options))
    assert all(torch.equal(merged[name], tensor) for name, tensor in streamed.items())


def test_the_start_is_the_base_where_there_is_none(models: dict[str, State]) -> None:
    merge_checkpoints("base", "sft", "out", dtype="start")
    assert {name: tensor.dtype for name, tensor in read_model(Path("out")).items()} == {
        name: tensor.dtype for name, tensor in models["base"].items()
    }


def test_the_command_takes_it_and_the_card_says_it(models: dict[str, State]) -> None:
    arguments = ["merge", "base", "sft", "--start", "start", "--iteration", "1", "--dtype", "start", "-o", "out"]
    assert subprocess_of(*arguments).status == 0
    assert read_model(Path("out"))["model.embed.weight"].dtype == torch.bfloat16
    assert "--dtype start" in Path("out/README.md").read_text()
