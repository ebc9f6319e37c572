"""Refusals: one line with what was found, where, and a cure; nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refused import Models, write_models


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return write_models(tmp_path)
