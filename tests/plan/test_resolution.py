"""A note says that the stored dtype cannot hold the change of a merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_model
from mergekit_imm import merge_checkpoints, merge_into
from models import new_model

NAMES = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(3) for kind in ("up", "gate")]


def shares(notes: list[str]) -> list[int]:
    """Percentages of the notes about rounding."""
    return [int(found[1]) for note in notes if (found := re.search(r"make (\d+)% of the change", note))]


def state(step: float, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights around 0.1 on the grid of bfloat16, moved by normal changes of so many of its steps."""
    chance = torch.Generator().manual_seed(0)
    moves = torch.Generator().manual_seed(seed)
    found = {}
    for name in NAMES:
        base = (0.1 * torch.randn(64, 64, generator=chance)).bfloat16().float()
        found[name] = (base + step * 0.0005 * torch.randn(64, 64, generator=moves)).to(dtype)
    return found


def expected(sft: dict[str, torch.Tensor], alpha: float, drop: float, dtype: torch.dtype) -> float:
    """The share that is left, by the formula, over all elements and with another mask."""
    asked = made = 0.0
    torch.manual_seed(1)
    for name, base in state(0, torch.float64).items():
        kept = torch.rand_like(base) >= drop
        exact = alpha * base + (1 - alpha) * (base + kept * (sft[name].double() - base) / (1 - drop))
        asked += float((exact - base).square().sum())
        made += float(((exact.float().to(dtype).double() - base) * (exact - base)).sum())
    return 100 * made / asked


@pytest.mark.parametrize(
    ("stored", "alpha", "drop"),
    [
        (torch.float32, 0.5, 0.2),
        (torch.float32, 0.8, 0.2),
        (torch.float32, 0.5, 0.0),
        (torch.bfloat16, 0.5, 0.2),
        (torch.bfloat16, 0.8, 0.2),
    ],
)
def test_it_says_how_much_is_left(tmp_path: Path, stored: torch.dtype, alpha: float, drop: float) -> None:
    base = write_model(tmp_path / "base", state(0, torch.bfloat16))
    sft = write_model(tmp_path / "sft", tuned := state(0.4, stored))
    for dry_run in (True, False):
        report = merge_checkpoints(base, sft, tmp_path / "out", alpha=alpha, drop=drop, dry_run=dry_run)
        share = expected(tuned, alpha, drop, torch.bfloat16)
        assert abs(share - 100) > 15
        # A sample of 6 x 1024 elements of 24576; ten seeds of `expected` differ by up to 3 points.
        assert shares(report.notes) == [pytest.approx(share, abs=8)]
        assert "dtype=float32" in "".join(report.notes).replace('"', "")


@pytest.mark.parametrize(
    ("step", "stored", "options"),
    [
        (50, torch.float32, {}),  # far above the steps
        (0.4, torch.float32, {"dtype": "float32"}),  # the cure
        (0.4, torch.bfloat16, {"drop": 0.5}),  # drop = alpha: each weight is the base's or the sft's
        (0.4, torch.float32, {"alpha": 1.0}),  # nothing is asked for
    ],
)
def test_what_holds_the_change_has_no_note(tmp_path: Path, step: float, stored: torch.dtype, options: Any) -> None:
    base = write_model(tmp_path / "base", state(0, torch.bfloat16))
    sft = write_model(tmp_path / "sft", state(step, stored))
    assert shares(merge_checkpoints(base, sft, tmp_path / "out", **options).notes) == []


def test_from_a_start_it_is_the_change_from_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", state(0, torch.bfloat16))
    start = write_model(tmp_path / "start", state(50, torch.bfloat16, seed=1))
    sft = write_model(tmp_path / "sft", state(50, torch.bfloat16, seed=2))
    near = write_model(tmp_path / "near", state(0.3, torch.bfloat16, seed=3))
    assert shares(merge_checkpoints(base, sft, tmp_path / "a", start=start, iteration=1).notes) == []
    assert shares(merge_checkpoints(base, near, tmp_path / "b", start=near, iteration=1, alpha=0.8).notes) != []


def test_weights_that_are_not_finite_are_refused_as_ever(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", state(0, torch.bfloat16))
    broken = state(0.4, torch.float32)
    broken[NAMES[0]][32] = float("nan")
    sft = write_model(tmp_path / "sft", broken)
    with pytest.raises(Exception, match="NaN"):
        merge_checkpoints(base, sft, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    model = new_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model.to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((weight.abs() / 200 * torch.randn_like(weight)).to(dtype))
    report = merge_into(model, tmp_path / "base", alpha=0.8)
    assert (shares(report.notes) != []) == (dtype == torch.bfloat16)
    assert dtype == torch.float32 or "load the model in float32" in "".join(report.notes)
