"""Vocabularies of different sizes: resized by transformers, merged, loaded, and compared with the formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocabularies import write_pair


@pytest.fixture(scope="package", params=["llama", "qwen2"])
def resized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base of 96 rows and 90 tokens; an sft with ten more tokens and 100 rows."""
    return request.param, write_pair(request.param, tmp_path_factory.mktemp(request.param))
