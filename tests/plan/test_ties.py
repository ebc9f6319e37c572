"""Ties under other names than in language models: refusals give good advice, the rest is merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from encoders import SMALL, T5
from followed import Inputs, endings, looks_right
from models import fine_tuned, model_of

MASKED, SEQUENCE = transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM


def bert() -> Any:
    return model_of(transformers.BertConfig(**SMALL), MASKED)


def t5() -> Any:
    return model_of(transformers.T5Config(**T5, decoder_start_token_id=0), SEQUENCE)


def whole(model: Any, folder: Path) -> None:
    """Save a model in a .bin file, with tied tensors under all their names."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")


def once(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize("base", [whole, once])
@pytest.mark.parametrize("sft", [whole, once])
@pytest.mark.parametrize(("make", "auto"), [(bert, MASKED), (t5, SEQUENCE)])
def test_tied_tensors_are_one_however_they_are_stored(
    tmp_path: Path,
    base: Callable[[Any, Path], None],
    sft: Callable[[Any, Path], None],
    make: Callable[[], Any],
    auto: Any,
) -> None:
    base(make(), tmp_path / "base")
    sft(fine_tuned(make(), seed=2), tmp_path / "sft")
    inputs = Inputs(tmp_path / "base", tmp_path / "sft", auto)
    for each in endings(inputs, tmp_path):
        assert each.out is not None, each.messages
        looks_right(inputs, each)
