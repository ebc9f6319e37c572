"""FP8 models, quantised and dequantised by transformers, and dequantised naively."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from checkpoints import State, read_model, write_model
from models import load
from refused import CONFIG

Block = tuple[int, int] | None
SMALL = (16, 16)
LINEAR = re.compile(r"_proj\.weight$")


class Quantiser:
    """The part of a quantiser that transformers' operations need."""

    def __init__(self, block: Block) -> None:
        self.quantization_config = transformers.FineGrainedFP8Config(weight_block_size=block)


def fp8_state(state: State, block: Block) -> State:
    """Quantise a model's linear layers with transformers; return its tensors."""
    quantiser = Fp8Quantize(Quantiser(block))
    found: State = {}
    for name, tensor in state.items():
        found |= quantiser.convert({name: tensor}) if LINEAR.search(name) else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_fp8(source: Path, folder: Path, block: Block, **said: Any) -> Path:
    """Quantise a model on disk, keeping its shards."""
    state = fp8_state(read_model(source), block)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"],
        **said,
    }
    names = list(state)
    return write_model(folder, state, config=config, shards=[names[0::2], names[1::2]])


def theirs(folder: Path, layout: str, block: Block) -> State:
    """Dequantise an FP8 model with transformers."""
    config = transformers.FineGrainedFP8Config(weight_block_size=block, dequantize=True)
    model = load(folder, layout, dtype=torch.bfloat16, quantization_config=config)
    state: State = model.state_dict()
    return state


def float32_of(state: State, block: tuple[int, int] = (128, 128)) -> State:
    """Dequantise an FP8 model to float32 naively, multiplying each element by its block's scale."""
    found: State = {}
    for name, tensor in state.items():
        scale = next((state[name + end] for end in ("_scale_inv", "_scale") if name + end in state), None)
        if scale is None:
            found[name] = tensor
        elif scale.numel() == 1:
            found[name] = tensor.float() * scale.float()
        else:
            (rows, columns), (down, across) = tensor.shape[-2:], scale.shape[-2:]
            i, j = torch.arange(rows), torch.arange(columns)
            if down % 2 == 0 and name.endswith("gate_up_proj"):  # each half has its own scales
                down_of = i % (rows // 2) // block[0] + i // (rows // 2) * (down // 2)
            else:
                down_of = i // block[0] if down not in (1, rows) else i if down == rows else i * 0
            across_of = j // block[1] if across not in (1, columns) else j if across == columns else j * 0
            found[name] = tensor.float() * scale.float()[..., down_of[:, None], across_of]
    return {name: tensor for name, tensor in found.items() if not name.endswith(("_scale_inv", "_scale"))}


RAGGED = {
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 200),
    "model.layers.0.self_attn.q_a_proj.weight": (7, 300),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 2 * 160, 130),
    "model.layers.0.mlp.experts.down_proj": (3, 130, 96),
    "model.layers.1.self_attn.o_proj.weight": (128, 1),
    "model.norm.weight": (40,),
}


def ragged_state(seed: int, *, scales: torch.dtype = torch.float32, fp8: torch.dtype = torch.float8_e4m3fn) -> State:
    """FP8 tensors as in DeepSeek, with a grid of ceil(rows / 128) x ceil(columns / 128) scales."""
    draw = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in RAGGED.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            state[name] = values.to(torch.bfloat16)
            continue
        rows = 4 if "gate_up" in name else -(-shape[-2] // 128)
        grid = (*shape[:-2], rows, -(-shape[-1] // 128))
        state[name] = (values * 50).to(fp8)
        state[f"{name}_scale_inv"] = (torch.rand(grid, generator=draw) * 1e-3 + 1e-4).to(scales)
    return state


FP8 = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def compressed(form: str = "float-quantized", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {"group_0": {"weights": weights, "input_activations": None, "targets": ["Linear"]}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "sparsity_config": {"format": "dense"},
        **more,
    }


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}
