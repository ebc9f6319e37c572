"""A merge as a stream of tensors: its order, its bits, how far it runs ahead, and that it can be left at any time."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

from checkpoints import random_state, same_bits, write_model
from mergekit_imm import ArgumentError, NonFiniteError, dare_merge, iter_merged, merge_checkpoints
from mergekit_imm.engine import workers
from mergekit_imm.plan.plan import Plan
from models import fine_tuned, load, new_model

LAYERED = [
    "model.embed_tokens.weight",
    *(f"model.layers.{number}.{name}" for number in range(12) for name in ("mlp.w", "norm.weight")),
    "lm_head.weight",
    "model.norm.weight",
]
SIZES = {"lm_head.weight": (40, 8), "model.embed_tokens.weight": (40, 8)}


def models(root: Path, names: Sequence[str]) -> tuple[Path, Path]:
    shapes = {name: SIZES.get(name, (64, 65)) for name in names}
    base = write_model(root / "base", random_state(shapes), shards=[names[::2], names[1::2]])
    return base, write_model(root / "sft", random_state(shapes, seed=1))


@pytest.mark.parametrize("workers", [1, 3])
def test_layer_by_layer(workers: int, tmp_path: Path) -> None:
    """Whatever the order of the files is; layer 10 comes after layer 9."""
    names = random.Random(workers).sample(LAYERED, len(LAYERED))
    base, sft = models(tmp_path, names)
    shapes = {name: SIZES.get(name, (64, 65)) for name in names}
    expected = dare_merge(random_state(shapes), random_state(shapes, seed=1), drop=0.5)
    found = list(iter_merged(base, sft, drop=0.5, order="layers", workers=workers))
    stored = sorted(names[::2]) + sorted(names[1::2])  # save_file sorts
    in_layers = sorted(LAYERED[1:-2], key=lambda name: (int(name.split(".")[2]), stored.index(name)))
    ends = sorted(LAYERED[-2:], key=stored.index)
    assert [name for name, _ in found] == [LAYERED[0], *in_layers, *ends]
    assert all(same_bits(tensor, expected[name]) for name, tensor in found)


def test_a_tied_head_comes_with_its_embedding(tmp_path: Path) -> None:
    names = ["a.layers.0.w", "lm_head.weight", "model.embed_tokens.weight"]
    base, sft = (random_state({name: SIZES.get(name, (64, 65)) for name in names}, seed=seed) for seed in (0, 1))
    for state in (base, sft):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    there = [write_model(tmp_path / name, state) for name, state in (("base", base), ("sft", sft))]
    found = [name for name, _ in iter_merged(*there, order="layers")]
    assert (set(found[:2]), found[2]) == ({"lm_head.weight", "model.embed_tokens.weight"}, "a.layers.0.w")


def test_other_orders_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^order is 'size'; it must be 'files' or 'layers'$"):
        iter_merged("nowhere", "nowhere", order="size")


def open_files(folder: Path) -> list[str]:
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return [str(link) for link in links if folder in link.parents]


def merging() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("merge-")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="shows open files on Linux")
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_caller_that_stops_early_leaves_no_thread_and_no_open_file(taken: int, tmp_path: Path) -> None:
    base, sft = models(tmp_path, LAYERED)
    with patch("mergekit_imm.engine.merge.AHEAD", 0):  # workers wait for the caller
        tensors: Any = iter_merged(base, sft, order="layers", workers=3)
        for _ in range(taken):
            next(tensors)
            assert open_files(tmp_path)
        tensors.close()
    assert (merging(), open_files(tmp_path)) == ([], [])


def test_workers_run_ahead_of_the_caller_and_not_too_far(tmp_path: Path) -> None:
    base, sft = models(tmp_path, LAYERED)
    size, process = 64 * 65 * 2, workers._process
    taken, begun = 0, threading.Event()

    def checked(plans: Sequence[Plan], task: workers.Task, *rest: Any) -> workers.Done:
        ahead = task[0].item - taken
        assert ahead <= 4, "three tensors wait, and a fourth is begun"
        if ahead == 4:
            begun.set()
        return process(plans, task, *rest)

    with patch("mergekit_imm.engine.merge.AHEAD", 3 * size), patch("mergekit_imm.engine.workers._process", checked):
        for number, _ in enumerate(iter_merged(base, sft, order="layers", workers=2)):
            if number == 3:
                assert begun.wait(60)
            taken = number + 1


def test_failures_of_later_tensors_are_raised(tmp_path: Path) -> None:
    state = random_state({f"layers.{number}.w": (64, 65) for number in range(4)})
    base = write_model(tmp_path / "base", state)
    state["layers.3.w"] = torch.full((64, 65), torch.nan, dtype=torch.bfloat16)
    sft = write_model(tmp_path / "sft", state)
    with pytest.raises(NonFiniteError, match=r"'layers\.3\.w' of sft .* has 4160 NaN"):
        list(iter_merged(base, sft, order="layers", workers=1))
    assert merging() == []


@pytest.mark.parametrize("layout", ["qwen2", "qwen3_moe", "gemma3"])
def test_transformers_loads_what_it_yields(layout: str, tmp_path: Path) -> None:
    """As docs/python.md does, tied and fused: the model is the one that is loaded from a merged folder."""
    base = new_model(layout)
    base.save_pretrained(tmp_path / "base")
    fine_tuned(base, seed=2).save_pretrained(tmp_path / "sft")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.3, drop=0.5)
    expected = load(tmp_path / "out", layout, dtype="auto").state_dict()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sft")
    merged = dict(iter_merged(tmp_path / "base", tmp_path / "sft", alpha=0.3, drop=0.5))
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(None, config=config, state_dict=merged, output_loading_info=True)
    assert not any(info.values()), info
    found = model.state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
