"""A stream of tensors is merged to what a merge of the saved model writes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import merge_checkpoints, merged_stream
from models import LAYOUTS, fine_tuned, new_model
from modules import OPTIONS, SFT, naive, write_models


def collected(stream: Iterable[tuple[str, Tensor]]) -> State:
    """Return what a stream yields; no name twice."""
    found: State = {}
    for name, tensor in stream:
        assert name not in found
        found[name] = tensor
    return found


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def one_buffer(state: State) -> Iterator[tuple[str, Tensor]]:
    """Give tensors as a hook does that gathers each into the same memory; what was yielded is overwritten."""
    room = torch.empty(max(tensor.nbytes for tensor in state.values()), dtype=torch.uint8)
    for name, tensor in state.items():
        view = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        yield name, view
        room.fill_(0xA5)


def shuffled(state: State, seed: int) -> State:
    names = random.Random(seed).sample(sorted(state), len(state))
    return {name: state[name] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and start on disk."""
    return write_models(tmp_path_factory.mktemp("stream"))


def test_stream_is_what_the_formulas_say(folder: Path) -> None:
    merged = merged_stream(one_buffer(SFT), folder / "base", start=folder / "start", **OPTIONS)
    assert_same(collected(merged), naive(SFT))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_streamed_is_saved(layout: str, tmp_path: Path) -> None:
    """With the names and the fused tensors of transformers, in any order, from one buffer."""
    base = new_model(layout)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    live = fine_tuned(base, seed=2)
    live.save_pretrained(tmp_path / "sft")
    options: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 3, "no_drop": ["norm|ln_"]}
    options["keep"] = [r"\.1\..*(norm|ln_)"]
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", **options)
    expected = read_model(tmp_path / "out")
    for seed in range(4):
        state = shuffled(dict(live.state_dict()), seed)
        assert_same(collected(merged_stream(one_buffer(state), tmp_path / "base", **options)), expected)
    persistent = [(name, buffer) for name, buffer in live.named_buffers() if name in live.state_dict()]
    named = [*live.named_parameters(), *persistent]  # a tied tensor once
    assert_same(collected(merged_stream(named, tmp_path / "base", **options)), expected)
