"""A base and an sft in forms other than safetensors, and reading them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_saver

from checkpoints import State, files_of, random_state
from mergekit_imm.checkpoint.checkpoint import Checkpoint
from mergekit_imm.checkpoint.lazy_tensor import Tensor as Held
from mergekit_imm.checkpoint.reader import Files

SHAPES = {
    "model.embed_tokens.weight": (97, 33),
    "model.layers.0.w.weight": (64, 31),
    "model.layers.0.w.bias": (7,),
    "model.layers.0.conv": (5, 6, 7),
    "model.layers.1.w.weight": (1, 3),
    "model.norm.weight": (1,),
}
CONFIG = {"architectures": ["Tiny"], "model_type": "tiny", "dtype": "bfloat16", "tie_word_embeddings": False}
STEPS = "model.steps"


def states() -> tuple[State, State]:
    """Make the tensors of a base and an sft, including integers."""
    base = random_state(SHAPES) | {STEPS: torch.arange(5)}
    tuned = random_state(SHAPES, seed=1, scale=0.001)
    return base, {name: tensor + tuned[name] if name in tuned else tensor for name, tensor in base.items()}


BASE, SFT = states()
FLOATS = {name: tensor for name, tensor in SFT.items() if name != STEPS}


def save_dcp(state: Any, folder: Path) -> Path:
    """Save with torch.distributed.checkpoint in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about a single process
        state_dict_saver.save(state, checkpoint_id=folder)
    return folder


def save_bin(state: Any, folder: Path, name: str = "pytorch_model.bin") -> Path:
    """Save with torch.save."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    return folder


def save_shards(state: State, folder: Path) -> Path:
    """Save a model as transformers 4 did: torch.save shards and an index."""
    folder.mkdir()
    names = list(state)
    weight_map: dict[str, str] = {}
    for number, some in enumerate((names[:2], names[2:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if "safetensors" in name}


def held(found: Checkpoint) -> dict[str, bytes]:
    """Read the bytes of all tensors of an input."""
    with Files({found.role: found}) as files:

        def content(tensor: Held) -> bytes:
            raw = np.empty(tensor.nbytes, np.uint8)
            files.read(found.role, tensor, 0, raw)
            return raw.tobytes()

        return {name: content(tensor) for name, tensor in found.tensors.items()}


def raw(state: State) -> dict[str, bytes]:
    """Return the bytes of all tensors."""
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


class Evil:
    """An object that runs a command when unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"mkdir {self.trap}",)
