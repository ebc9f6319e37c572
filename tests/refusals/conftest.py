"""Refusals: one line with what was found, where, and a cure; nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints import random_state, write_model
from refused import (
    CONFIG,
    SHAPES,
    SIDE,
    Models,
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    made = Models(tmp_path, tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    for role in ("base", "sft"):
        write_model(getattr(made, role), random_state(SHAPES, seed=len(role)), config=CONFIG, side=SIDE)
    return made
