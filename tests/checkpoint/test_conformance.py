"""`check_input` finds a form that is read wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import State, random_state, write_model
from mergekit_imm.errors import MismatchError
from mergekit_imm.testing import check_input

STATE = random_state({"model.layers.0.w": (64, 31), "model.layers.0.b": (7,)}) | {"steps": torch.arange(3)}


def stored(folder: Path, **changes: torch.Tensor) -> Path:
    state: State = STATE | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return write_model(folder, {n: t for n, t in state.items() if t.numel()}, config={"model_type": "tiny"})


def test_a_form_with_the_same_tensors_passes_and_nothing_stays(tmp_path: Path) -> None:
    before = set(tmp_path.parent.iterdir())
    check_input(stored(tmp_path / "form"), STATE)
    assert set(tmp_path.iterdir()) == {tmp_path / "form"}
    assert set(tmp_path.parent.iterdir()) == before


def test_other_values_are_found(tmp_path: Path) -> None:
    value = STATE["model.layers.0.b"].clone()
    value[3] += 1
    with pytest.raises(AssertionError, match=r"^as sft: model\.layers\.0\.b has other bits than from safetensors$"):
        check_input(stored(tmp_path / "form", model__layers__0__b=value), STATE)


@pytest.mark.thorough
def test_another_dtype_is_found(tmp_path: Path) -> None:
    wide = STATE["model.layers.0.w"].float()
    with pytest.raises(AssertionError, match=r"^as base: model.layers.0.w is torch.float32 .*should be torch.bfloat16"):
        check_input(stored(tmp_path / "form", model__layers__0__w=wide), STATE)


def test_a_tensor_too_few_is_refused_by_the_merge(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"model\.layers\.0\.b"):
        check_input(stored(tmp_path / "form", model__layers__0__b=torch.empty(0)), STATE)
