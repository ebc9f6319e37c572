"""Fixtures of the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import random_state, write_model
from loops import CONFIG


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shapes = {"model.embed.weight": (8, 4), "model.layers.0.w": (16, 16), "model.layers.1.w": (16, 16)}
    state = random_state(shapes, dtype=torch.float32)
    write_model(tmp_path / "base", state, config=CONFIG, side={"tokenizer.json": "{}"})
    return "base"
