"""Merges of real, small models, built and loaded back with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import random_state, read_model
from loading import (
    EMBED,
    HEAD,
    Pair,
    Tied,
    config_of,
    write_pair,
)
from mergekit_imm import merge_checkpoints
from models import LAYOUTS, fine_tuned, new_model, save


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair merged without dropping."""
    out = tmp_path_factory.mktemp("plain") / "out"
    merge_checkpoints(pair.base, pair.sft, out, alpha=0.3, drop=0.0)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A bfloat16 base and a float32 sft, also in their nested configs."""
    folder, model = tmp_path_factory.mktemp("wide"), new_model(request.param)
    base = save(model, folder / "base", "base")
    sft = save(fine_tuned(model, seed=2, dtype=torch.float32), folder / "sft", "sft")
    config = config_of(sft)
    for place, key in (("text_config", "dtype"), ("vision_config", "torch_dtype")):
        if place in config:
            config[place][key] = "float32"
    (sft / "config.json").write_text(json.dumps(config))
    return Pair(request.param, base, sft)


@pytest.fixture(scope="module")
def tied(qwen2: Pair) -> Tied:
    states = {"base": read_model(qwen2.base), "start": read_model(qwen2.sft)}
    states["sft"] = {name: tensor + torch.full_like(tensor, 0.01) for name, tensor in states["start"].items()}
    for number, state in enumerate(states.values()):
        state.update(random_state({HEAD: state[EMBED].shape}, seed=number))
    return Tied(config_of(qwen2.base), states)
