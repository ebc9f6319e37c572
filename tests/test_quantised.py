"""Quantised inputs: refused by their method with the cure; FP8 weights times their scales, as transformers has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

import reference
from checkpoints import State, files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import ArgumentError, CheckpointError, MismatchError, NonFiniteError, merge_checkpoints, verify
from mergekit_imm.checkpoint.quantised import _fit, _table
from mergekit_imm.checkpoint.tensorfile import TensorInfo
from mergekit_imm.products import dequantize
from models import LAYOUTS, fine_tuned, load, new_model
from refused import CONFIG, MODEL, SHAPES, SIDE, UP0, UP1, Models, shown_options, write_zeros
from test_adapters import adapted

Block = tuple[int, int] | None
SMALL = (16, 16)
LINEAR = re.compile(r"(_proj|\.mlp\.gate|c_attn|c_fc)\.weight$")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    made = Models(tmp_path, tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    for role in ("base", "sft"):
        write_model(getattr(made, role), random_state(SHAPES, seed=len(role)), config=CONFIG, side=SIDE)
    return made


# --- refused, by the method's name

UNQUANTISED = "merge the unquantised checkpoint it was made from, and quantise the result"
SAID: dict[str, tuple[Callable[[], Any], str]] = {
    "awq": (lambda: transformers.AwqConfig(bits=4), UNQUANTISED),
    "gptq": (lambda: transformers.GPTQConfig(bits=4), UNQUANTISED),
    "aqlm": (transformers.AqlmConfig, UNQUANTISED),
    "bitsandbytes": (
        lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
        f"{UNQUANTISED}; of a QLoRA run, BASE is the unquantised model and SFT the adapter",
    ),
    "mxfp4": (transformers.Mxfp4Config, r"Mxfp4Config\(dequantize=True\)`, then `save_pretrained`, and merge that"),
    "fp8": (transformers.FineGrainedFP8Config, "none of its tensors is FP8: if .* remove that entry"),
}  # fmt: skip


@pytest.mark.parametrize("method", SAID)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_says_so_is_refused(models: Models, method: str, nested: bool) -> None:
    config, cure = SAID[method]
    said = {"quantization_config": config().to_dict()}
    models.change("sft", {}, {**CONFIG, **({"text_config": said} if nested else said)})
    place = "text_config.quantization_config" if nested else "quantization_config"
    models.refused(CheckpointError, rf"sft .*is quantised \(config.json has a {place} of {method}\); .*{cure}")


def test_what_old_versions_and_damaged_configs_say_is_refused(models: Models) -> None:
    models.change("base", {}, {**CONFIG, "quantization_config": {"load_in_4bit": True}})
    models.refused(CheckpointError, "base .*quantization_config of bitsandbytes.*QLoRA")
    for said in ("yes", [1], {"bits": 4, "group_size": 64}, {"quant_method": [{}]}):
        models.change("base", {}, {**CONFIG, "quantization_config": said})
        models.refused(CheckpointError, "base .*is quantised .config.json has a quantization_config")
    models.change("base", {}, {**CONFIG, "quantization_config": None, "compression_config": {}})
    assert models.merge().status == "merged"


UP = UP0.removesuffix(".weight")
# The layouts of the writers: AutoGPTQ, AutoAWQ, bitsandbytes 0.50, gpt-oss, compressed-tensors, modelopt, MLX.
STORED: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], str]] = {
    "GPTQ": (
        {f"{UP}.qweight": ("I32", (1, 8)), f"{UP}.qzeros": ("I32", (1, 1)), f"{UP}.scales": ("F16", (1, 8)),
         f"{UP}.g_idx": ("I32", (8,))}, rf"as GPTQ or AWQ models have it\); {UNQUANTISED}"),
    "AWQ": (
        {f"{UP}.qweight": ("I32", (8, 1)), f"{UP}.qzeros": ("I32", (1, 1)), f"{UP}.scales": ("F16", (1, 8))},
        rf"as GPTQ or AWQ models have it\); {UNQUANTISED}"),
    "bitsandbytes, 4 bits": (
        {UP0: ("U8", (32, 1)), f"{UP0}.absmax": ("U8", (1,)), f"{UP0}.quant_map": ("F32", (16,)),
         f"{UP0}.quant_state.bitsandbytes__nf4": ("U8", (165,))}, "as bitsandbytes models have it.*QLoRA"),
    "bitsandbytes, 8 bits": (
        {UP0: ("I8", (8, 8)), f"{UP}.SCB": ("F32", (8,)), f"{UP}.weight_format": ("U8", ())},
        "as bitsandbytes models have it.*QLoRA"),
    "MXFP4": (
        {"e.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)), "e.gate_up_proj_scales": ("U8", (2, 8, 1))},
        "'e.gate_up_proj_blocks' is U8.*as MXFP4 models have it.*Mxfp4Config"),
    "compressed-tensors": (
        {f"{UP0}_packed": ("I32", (8, 1)), f"{UP0}_scale": ("BF16", (8, 1)), f"{UP0}_shape": ("I64", (2,))},
        "as compressed-tensors models have it"),
    "NVFP4": (
        {UP0: ("U8", (8, 4)), f"{UP0}_scale": ("F8_E4M3", (8, 1)), f"{UP0}_scale_2": ("F32", ())}, "is quantised"),
    "INT8": ({UP0: ("I8", (8, 8)), f"{UP0}_scale": ("F32", (8, 1))}, f"is I8, with '{UP0}_scale' beside it"),
    "MLX": (
        {UP0: ("U32", (8, 1)), f"{UP}.scales": ("BF16", (8, 1)), f"{UP}.biases": ("BF16", (8, 1))},
        "as MLX models have it"),
    "FP8": (
        {UP0: ("F8_E4M3", (8, 8)), f"{UP0}_scale_inv": ("F32", (1, 1))},
        f"is F8_E4M3, with '{UP0}_scale_inv' beside it, as FP8 models.*--dequantize multiplies"),
}  # fmt: skip


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("roles", ["sft", "base", "base sft"])
def test_where_no_config_says_so_names_and_dtypes_tell(models: Models, form: str, roles: str) -> None:
    stored, match = STORED[form]
    for role in ("base", "sft"):
        folder = write_model(getattr(models, role), random_state(SHAPES))
        (folder / "config.json").unlink()
        if role in roles.split():
            write_zeros(folder / MODEL, {**stored, "norm": ("BF16", (8,))})
    models.refused(CheckpointError, f"{roles.split()[0]} .*{match}")
    # Copied as they are, where names allow.
    if roles == "base sft":
        assert models.merge(keep=["gate_up_proj|up_proj"]).tensors["kept"] == len(stored)


def test_names_of_models_that_are_not_quantised_are_let_through(models: Models) -> None:
    """Such names mean what they say only beside tensors that are no floats."""
    same = {"a.scales": torch.ones(4), "a.weight_scale": torch.ones(4), "a.weight": torch.ones(4, 4),
            "b_blocks": torch.ones(3), "b_scales": torch.ones(3), "c.scale": torch.ones(2)}  # fmt: skip
    for role in ("base", "sft"):
        models.change(role, same)
    assert models.merge().tensors["merged"] == len(SHAPES) + len(same)


# --- FP8 times scales


class _Quantiser:
    """What transformers' operations need of a quantiser."""

    def __init__(self, block: Block) -> None:
        self.quantization_config = transformers.FineGrainedFP8Config(weight_block_size=block)


def fp8_state(state: State, block: Block) -> State:
    """A model's tensors with those of linear layers quantised by transformers."""
    quantiser = Fp8Quantize(_Quantiser(block))
    found: State = {}
    for name, tensor in state.items():
        found |= quantiser.convert({name: tensor}) if LINEAR.search(name) else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_fp8(source: Path, folder: Path, block: Block, **said: Any) -> Path:
    """Quantise a model on disk, sharded as it is."""
    state = fp8_state(read_model(source), block)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"], **said,
    }  # fmt: skip
    names = list(state)
    return write_model(folder, state, config=config, shards=[names[0::2], names[1::2]])


def theirs(folder: Path, layout: str, block: Block) -> State:
    """What transformers makes of an FP8 model."""
    config = transformers.FineGrainedFP8Config(weight_block_size=block, dequantize=True)
    model = load(folder, layout, dtype=torch.bfloat16, quantization_config=config)
    state: State = model.state_dict()
    return state


def float32_of(state: State, block: Block) -> State:
    """The tensors of an FP8 model in float32, naively: each scale repeated for every element of its block."""
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(("_scale_inv", "_scale")):
            continue
        scale = state.get(f"{name}_scale_inv", state.get(f"{name}_scale"))
        if scale is None:
            found[name] = tensor
            continue
        spread = scale.float()
        if spread.numel() > 1:
            for dim, size in ((-2, (block or (1, 1))[0]), (-1, (block or (1, 1))[1])):
                each = size if spread.shape[dim] != tensor.shape[dim] else 1
                spread = spread.repeat_interleave(each, dim) if spread.shape[dim] > 1 or each > 1 else spread
            spread = spread[..., : tensor.shape[-2], : tensor.shape[-1]]
        found[name] = tensor.float() * spread
    return found


@pytest.mark.parametrize("block", [SMALL, None], ids=["blocks", "one scale"])
@pytest.mark.parametrize("layout", ["llama", "qwen3_moe"])
def test_it_is_what_transformers_dequantises(tmp_path: Path, layout: str, block: Block) -> None:
    new_model(layout).save_pretrained(tmp_path / "bf16")
    fp8 = write_fp8(tmp_path / "bf16", tmp_path / "fp8", block)
    report = merge_checkpoints(
        tmp_path / "bf16", fp8, tmp_path / "out", alpha=0, drop=0, dequantize=True, verify=True
    )
    assert report.verified
    assert report.config_changes == {"quantization_config": None}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, expected = load(tmp_path / "out", layout).state_dict(), theirs(fp8, layout, block)
    assert sorted(ours) == sorted(expected)
    assert [name for name in expected if not same_bits(ours[name], expected[name])] == []
    base = read_model(tmp_path / "bf16")
    assert sum(not torch.equal(base[n], t) for n, t in read_model(tmp_path / "out").items()) > 10
    verify(tmp_path / "out")


RAGGED = {
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 200), "model.layers.0.self_attn.q_a_proj.weight": (7, 300),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 2 * 96, 130), "model.layers.0.mlp.experts.down_proj": (3, 130, 96),
    "model.layers.1.self_attn.o_proj.weight": (128, 1), "model.norm.weight": (40,),
}  # fmt: skip


def ragged_state(seed: int, *, scales: torch.dtype = torch.float32, fp8: torch.dtype = torch.float8_e4m3fn) -> State:
    """FP8 tensors as DeepSeek has them: a grid of ceil(rows / 128) x ceil(columns / 128)."""
    draw = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in RAGGED.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            state[name] = values.to(torch.bfloat16)
            continue
        rows = 2 if "gate_up" in name else -(-shape[-2] // 128)
        grid = (*shape[:-2], rows, -(-shape[-1] // 128))
        state[name] = (values * 50).to(fp8)
        state[f"{name}_scale_inv"] = (torch.rand(grid, generator=draw) * 1e-3 + 1e-4).to(scales)
    return state


FP8 = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def ragged_float32(state: State) -> State:
    """As transformers reads fused experts: each half of gate_up_proj has scales of its own."""
    return {
        name: tensor for name, tensor in float32_of(
            {n: t for n, t in state.items() if "gate_up" not in n}, (128, 128)
        ).items()
    } | {
        name: torch.cat([half.float() * scale.float().repeat_interleave(128, -1)[..., :130]
                         for half, scale in zip(state[name].float().chunk(2, -2),
                                                state[f"{name}_scale_inv"].chunk(2, -2), strict=True)], -2)
        for name in state if name.endswith("gate_up_proj")
    }  # fmt: skip


@pytest.mark.parametrize("parameters", [{"alpha": 0, "drop": 0}, {"alpha": 0.3, "drop": 0.4}], ids=str)
@pytest.mark.parametrize("roles", ["base", "sft", "base sft", "base sft start", "start"])
@pytest.mark.parametrize("dtype", ["base", "float32"])
def test_the_bits_are_those_of_the_formulas(
    tmp_path: Path, roles: str, parameters: dict[str, float], dtype: str
) -> None:
    """Ragged edges, fused experts, any input FP8 or not; never rounded before the merge."""
    inputs: dict[str, State] = {}
    for seed, role in enumerate(("base", "sft", "start")):
        state = ragged_state(seed)
        values = ragged_float32(state)
        if role in roles.split():
            write_model(tmp_path / role, state, config=FP8)
            inputs[role] = values
        else:
            inputs[role] = {name: tensor.to(torch.bfloat16) for name, tensor in values.items()}
            write_model(tmp_path / role, inputs[role], config=CONFIG)
    start = {"start": tmp_path / "start", "iteration": 1} if "start" in roles else {}
    merge_checkpoints(
        tmp_path / "base", tmp_path / "sft", tmp_path / "out", dequantize=True, dtype=dtype, **start, **parameters
    )
    out = read_model(tmp_path / "out")
    assert list(out) == sorted(RAGGED) or sorted(out) == sorted(RAGGED)
    for name, tensor in out.items():
        base, sft, begun = (inputs[r][name] for r in ("base", "sft", "start" if start else "base"))
        expected = reference.merge_tensors(
            base, sft, begun, torch.float32 if dtype == "float32" else torch.bfloat16, name=name,
            alpha=parameters["alpha"], drop=parameters["drop"], iteration=1 if start else 0,
        )  # fmt: skip
        assert same_bits(tensor, expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == ("float32" if dtype == "float32" else "bfloat16")


def test_fused_experts_are_as_transformers_has_them(tmp_path: Path) -> None:
    state = {n: t for n, t in ragged_state(1).items() if "experts" in n}
    values = ragged_float32(state)
    operation = Fp8Dequantize(_Quantiser((128, 128)))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = operation._dequantize_one(state[name], state[f"{name}_scale_inv"][..., :1], torch.bfloat16)
    one = {**state, f"{name}_scale_inv": state[f"{name}_scale_inv"][..., :1].contiguous()}
    write_model(tmp_path / "sft", one, config={**FP8, "quantization_config": {"quant_method": "fp8", "weight_block_size": None}})
