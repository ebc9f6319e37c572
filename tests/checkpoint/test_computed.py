"""Computed tensors (pieces, slices, products): any range of their elements, compared with numpy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reference
from adapters import train
from checkpoints import random_state, read_model, same_bits, write_model
from mergekit_imm import merge_checkpoints
from mergekit_imm.checkpoint.lazy_tensor import Piece, Pieces, Tensor, sliced
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.reader import Files

Array = npt.NDArray[Any]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A shape, and boxes (place, sizes) that tile it, cut along one dimension after another."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    found = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        place, sizes = found.pop(draw(st.integers(0, len(found) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        if cut in (0, sizes[dim]):
            found.append((place, sizes))
            continue
        for begin, end in ((0, cut), (cut, sizes[dim])):
            at = (*place[:dim], place[dim] + begin, *place[dim + 1 :])
            found.append((at, (*sizes[:dim], end - begin, *sizes[dim + 1 :])))
    return shape, draw(st.permutations(found))


def read(files: Files, tensor: Tensor, dtype: Any, first: int, end: int) -> Array:
    out = np.full((end - first) * np.dtype(dtype).itemsize, 0xEE, np.uint8)
    files.read("base", tensor, first * np.dtype(dtype).itemsize, out)
    return out.view(dtype)


@given(data=st.data(), layout=boxes(), mixed=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_range_of_boxes_is_that_of_the_whole(
    data: st.DataObject, layout: Any, mixed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, found = layout
    whole = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    state = {}
    for number, (place, sizes) in enumerate(found):
        box = whole[tuple(slice(p, p + s) for p, s in zip(place, sizes, strict=True))]
        stored = np.float32 if mixed and number % 2 else np.float16
        state[str(number)] = torch.from_numpy(np.ascontiguousarray(box.astype(stored)))
    folder = write_model(tmp_path_factory.mktemp("boxes"), state)
    checkpoint = open_checkpoint(folder, "base")
    pieces = tuple(Piece("base", checkpoint.tensors[str(n)], place) for n, (place, _) in enumerate(found))
    tensor = Pieces("whole", shape, pieces)
    dtype: Any = {"F16": np.float16, "F32": np.float32}[tensor.dtype]
    flat = whole.reshape(-1).astype(dtype)
    edges = sorted({0, len(flat), *data.draw(st.lists(st.integers(0, len(flat)), max_size=4))})
    with Files({"base": checkpoint}) as files:
        for first, end in pairwise(edges):
            assert read(files, tensor, dtype, first, end).tobytes() == flat[first:end].tobytes()
        first, end = edges[0], edges[-1]
        low = data.draw(st.integers(first, end - 1))
        part = sliced(tensor, "base", "part", low, (end - low,))
        again = sliced(part, "base", "again", 0, (end - low,))
        for each in (part, again):
            assert read(files, each, dtype, 0, end - low).tobytes() == flat[low:].tobytes()


def test_a_slice_of_what_is_stored_is_a_place_in_its_file(tmp_path: Path) -> None:
    state = random_state({"w": (6, 4)}, dtype=torch.float32)
    checkpoint = open_checkpoint(write_model(tmp_path, state), "base")
    part = sliced(checkpoint.tensors["w"], "base", "part", 8, (2, 4))
    with Files({"base": checkpoint}) as files:
        assert read(files, part, np.float32, 0, 8).tolist() == state["w"][2:4].reshape(-1).tolist()


@pytest.mark.parametrize("layout", ["qwen3_moe", "llama4", "gpt_oss"])
def test_the_delta_of_each_expert_is_that_of_the_formula(layout: str, tmp_path: Path) -> None:
    path = "feed_forward" if layout == "llama4" else "mlp"
    targets = [f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj"]
    train(tmp_path, layout, {"target_modules": ["q_proj"], "target_parameters": targets, "r": 3}, dtype=torch.bfloat16)
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0.3, drop=0.5, workers=3)
    base, merged = read_model(tmp_path / "base"), read_model(tmp_path / "out")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scaling = peft.LoraConfig.from_pretrained(tmp_path / "adapter").lora_alpha / 3
    count = 0
    for key, b in factors.items():
        if "experts" not in key or "lora_B" not in key:
            continue
        a = factors[key.replace("lora_B", "lora_A")].float().numpy()
        # PEFT wraps the parameter defined first, gate_up_proj, innermost.
        which = "gate_up_proj" if "base_layer" in key else "down_proj"
        module = key.split(".experts.")[0].removeprefix("base_model.model.") + ".experts"
        for expert in range(4):
            left, right = b[:, expert::4].float().numpy(), a[expert * 3 : expert * 3 + 3]
            if layout == "gpt_oss":  # stored as [experts, in, out], which PEFT knows
                left, right = right.T, left.T
            delta = torch.from_numpy(reference.product(left, right, scaling))
            names = {f"{module}.{which}": delta}
            if layout == "qwen3_moe":
                ends = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
                parts = delta.chunk(len(ends))
                names = {f"{module}.{expert}.{end}.weight": part for end, part in zip(ends, parts, strict=True)}
            for name, part in names.items():
                fused = name not in base or base[name].ndim == 3
                size = part.numel()
                whole = base[name].reshape(-1)[expert * size : (expert + 1) * size] if fused else base[name].reshape(-1)
                found = merged[name].reshape(-1)[expert * size : (expert + 1) * size] if fused else merged[name]
                expected = reference.merge_tensors(
                    whole,
                    part.reshape(-1),
                    whole,
                    torch.bfloat16,
                    name=name,
                    alpha=0.3,
                    drop=0.5,
                    is_delta=True,
                    **({"first": expert * size} if fused else {}),
                )
                assert same_bits(found.reshape(-1), expected), name
                count += 1
    assert count == 2 * 4 * (3 if layout == "qwen3_moe" else 2)
