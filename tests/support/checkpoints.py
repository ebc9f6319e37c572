"""Small checkpoints on disk, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: Sequence[Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
    side: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder: one model.safetensors, or shards with the given names and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards is None:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for path, content in (side or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return folder


def read_model(folder: Path) -> State:
    """Read all tensors of a model folder."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def random_state(
    shapes: Mapping[str, Sequence[int]], *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02
) -> State:
    """Make Gaussian tensors of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(list(s), generator=generator) * scale).to(dtype) for n, s in shapes.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder: path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.numel() == 0:
        return True
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
