"""Quantised inputs are refused by their method, with the cure; and what --dequantize does not read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import random_state, read_model, same_bits, write_model
from fp8 import FP8, compressed, fp8_state
from mergekit_imm.errors import ArgumentError, CheckpointError, MismatchError
from refused import CONFIG, MODEL, SHAPES, UP0, UP1, Models, shown_options, write_zeros

# --- refused, by the method's name

UNQUANTISED = "merge the unquantised checkpoint it was made from, and quantise the result"
SAID: dict[str, tuple[Callable[[], Any], str]] = {
    "awq": (lambda: transformers.AwqConfig(bits=4), UNQUANTISED),
    "gptq": (lambda: transformers.GPTQConfig(bits=4), UNQUANTISED),
    "aqlm": (transformers.AqlmConfig, UNQUANTISED),
    "bitsandbytes": (
        lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
        f"{UNQUANTISED}; for a QLoRA run, BASE is the unquantised model and SFT the adapter",
    ),
    "mxfp4": (transformers.Mxfp4Config, r"Mxfp4Config\(dequantize=True\)`, then `save_pretrained`, and merge that"),
    "fp8": (transformers.FineGrainedFP8Config, "none of its tensors is FP8: if .* remove that entry"),
}


@pytest.mark.parametrize("method", SAID)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_says_so_is_refused(models: Models, method: str, nested: bool) -> None:
    config, cure = SAID[method]
    said: dict[str, Any] = {"quantization_config": config().to_dict()}
    models.change("sft", {}, {**CONFIG, **({"text_config": said} if nested else said)})
    place = "text_config.quantization_config" if nested else "quantization_config"
    models.refused(CheckpointError, rf"sft .*is quantised \(config.json has a {place} of {method}\); .*{cure}")


def test_what_old_versions_and_damaged_configs_say_is_refused(models: Models) -> None:
    models.change("base", {}, {**CONFIG, "quantization_config": {"load_in_4bit": True}})
    models.refused(CheckpointError, "base .*quantization_config of bitsandbytes.*QLoRA")
    odd: list[Any] = ["yes", [1], {"bits": 4, "group_size": 64}, {"quant_method": [{}]}]
    for said in odd:
        models.change("base", {}, {**CONFIG, "quantization_config": said})
        models.refused(CheckpointError, "base .*is quantised .config.json has a quantization_config")
    models.change("base", {}, {**CONFIG, "quantization_config": None, "compression_config": {}})
    assert models.merge().status == "merged"


UP = UP0.removesuffix(".weight")
# The layouts of the writers: AutoGPTQ, AutoAWQ, bitsandbytes 0.50, gpt-oss, compressed-tensors, modelopt, MLX.
STORED: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], str]] = {
    "GPTQ": (
        {
            f"{UP}.qweight": ("I32", (1, 8)),
            f"{UP}.qzeros": ("I32", (1, 1)),
            f"{UP}.scales": ("F16", (1, 8)),
            f"{UP}.g_idx": ("I32", (8,)),
        },
        rf"as in GPTQ or AWQ models\); {UNQUANTISED}",
    ),
    "AWQ": (
        {f"{UP}.qweight": ("I32", (8, 1)), f"{UP}.qzeros": ("I32", (1, 1)), f"{UP}.scales": ("F16", (1, 8))},
        rf"as in GPTQ or AWQ models\); {UNQUANTISED}",
    ),
    "bitsandbytes, 4 bits": (
        {
            UP0: ("U8", (32, 1)),
            f"{UP0}.absmax": ("U8", (1,)),
            f"{UP0}.quant_map": ("F32", (16,)),
            f"{UP0}.quant_state.bitsandbytes__nf4": ("U8", (165,)),
        },
        "as in bitsandbytes models.*QLoRA",
    ),
    "bitsandbytes, 8 bits": (
        {UP0: ("I8", (8, 8)), f"{UP}.SCB": ("F32", (8,)), f"{UP}.weight_format": ("U8", ())},
        "as in bitsandbytes models.*QLoRA",
    ),
    "MXFP4": (
        {"e.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)), "e.gate_up_proj_scales": ("U8", (2, 8, 1))},
        "'e.gate_up_proj_blocks' is U8.*as in MXFP4 models.*Mxfp4Config",
    ),
    "compressed-tensors": (
        {f"{UP0}_packed": ("I32", (8, 1)), f"{UP0}_scale": ("BF16", (8, 1)), f"{UP0}_shape": ("I64", (2,))},
        "as in compressed-tensors models",
    ),
    "NVFP4": (
        {UP0: ("U8", (8, 4)), f"{UP0}_scale": ("F8_E4M3", (8, 1)), f"{UP0}_scale_2": ("F32", ())},
        "is quantised",
    ),
    "INT8": ({UP0: ("I8", (8, 8)), f"{UP0}_scale": ("F32", (8, 1))}, f"is I8, with '{UP0}_scale' beside it"),
    "MLX": (
        {UP0: ("U32", (8, 1)), f"{UP}.scales": ("BF16", (8, 1)), f"{UP}.biases": ("BF16", (8, 1))},
        "as in MLX models",
    ),
    "FP8": (
        {UP0: ("F8_E4M3", (8, 8)), f"{UP0}_scale_inv": ("F32", (1, 1))},
        f"is F8_E4M3, with '{UP0}_scale_inv' beside it, as in FP8 models.*--dequantize multiplies",
    ),
}


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
    same = {
        "a.scales": torch.ones(4),
        "a.weight_scale": torch.ones(4),
        "a.weight": torch.ones(4, 4),
        "b_blocks": torch.ones(3),
        "b_scales": torch.ones(3),
        "c.scale": torch.ones(2),
    }
    for role in ("base", "sft"):
        models.change(role, same)
    assert models.merge().tensors["merged"] == len(SHAPES) + len(same)


def test_an_adapter_on_a_quantised_base_is_refused_with_the_cure(models: Models) -> None:
    write_zeros(models.base / MODEL, {**STORED["bitsandbytes, 4 bits"][0], "norm": ("BF16", (8,))})
    (models.base / "config.json").unlink()
    (models.sft / MODEL).unlink()
    (models.sft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    factors = {f"base_model.model.{UP}.lora_{n}.weight": torch.ones(s) for n, s in (("A", (2, 8)), ("B", (8, 2)))}
    save_file(factors, models.sft / "adapter_model.safetensors")
    models.refused(CheckpointError, "base .* is quantised .*bitsandbytes.*BASE is the unquantised model and SFT the")


# --- --dequantize, refused


def test_where_nothing_is_fp8_it_is_an_error(models: Models) -> None:
    models.refused(
        ArgumentError, "--dequantize is given, but no tensor is FP8 in base .*, sft .*; leave", dequantize=True
    )
    models.change("sft", {}, {**CONFIG, "quantization_config": {"quant_method": "gptq"}})
    models.refused(CheckpointError, "sft .*quantization_config of gptq.*merge the unquantised", dequantize=True)


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "torchao"}, "by torchao"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "by modelopt's NVFP4"),
    (compressed("nvfp4-pack-quantized"), "by compressed-tensors' nvfp4-pack-quantized"),
    (compressed(transform_config={"config_groups": {"R1": {}}}), "by compressed-tensors with a transform_config"),
    (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "by compressed-tensors with a sparsity_config"),
    ({"bits": 8}, "by a method that its config does not name"),
]


@pytest.mark.parametrize(("said", "match"), UNREAD, ids=[match for _, match in UNREAD])
def test_methods_that_are_not_read_are_refused(models: Models, said: dict[str, Any], match: str) -> None:
    models.change("sft", fp8_state({UP0: torch.ones(8, 8)}, None), {**CONFIG, "quantization_config": said})
    models.refused(
        CheckpointError, rf"sft .* is quantised {match}, which --dequantize does not support", dequantize=True
    )


EIGHT = torch.ones(8, 8).to(torch.float8_e4m3fn)
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no scales": ({UP0: EIGHT}, rf"'{UP0}' is F8_E4M3 in sft .*, with no scales"),
    "two scales": (
        {UP0: EIGHT, f"{UP0}_scale_inv": torch.ones(1), f"{UP0}_scale": torch.ones(1)},
        "2 tensors of scales",
    ),
    "scales of a float": ({f"{UP1}_scale_inv": torch.ones(1)}, rf"stores '{UP1}_scale_inv', scales of a weight"),
    "scales of nothing": ({"x.weight_scale_inv": torch.ones(1)}, r"stores 'x\.weight_scale_inv', scales of a weight"),
    "another method besides": ({f"{UP1}_packed": torch.ones(1)}, "as in compressed-tensors models"),
    "int8 besides": ({UP1: torch.ones(8, 8).to(torch.int8), f"{UP1}_scale": torch.ones(1)}, rf"'{UP1}' is I8, with"),
    "scales that are integers": (
        {UP0: EIGHT, f"{UP0}_scale_inv": torch.ones(1, dtype=torch.uint8)},
        "stores the scales .* as U8; only F32",
    ),
}
GOOD = {UP1: EIGHT.clone(), f"{UP1}_scale_inv": torch.ones(1, 1)}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_and_scales_that_do_not_belong_together_are_refused(models: Models, what: str) -> None:
    changes, match = BROKEN[what]
    good = {} if UP1 in "".join(changes) else GOOD
    models.change("sft", {**fp8_state({"good_proj.weight": torch.ones(4, 4)}, None), **good, **changes}, FP8)
    models.refused(CheckpointError, match, dequantize=True)


@pytest.mark.parametrize(
    "grid", [(2, 1), (1, 2), (0,), (0, 0), (4,), (8, 8, 8), (1, 8, 8), (2,), (64,), (7, 1), (1, 9), (1, 1, 2)], ids=str
)
@pytest.mark.parametrize("block", [[128, 128], None, [3, 5], [10**30, 1]], ids=str)
def test_scales_that_do_not_fit_are_refused(models: Models, grid: tuple[int, ...], block: object) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    models.change("sft", {UP0: EIGHT, f"{UP0}_scale_inv": torch.ones(grid)}, config)
    if block == [3, 5] and grid == (1, 2):
        models.merge(dequantize=True)
        return
    match = rf"'{UP0}' is F8_E4M3 \[8, 8\] in sft .*_scale_inv' are {re.escape(str(list(grid)))}; they must be .*one"
    models.refused(MismatchError, match, dequantize=True)


@pytest.mark.parametrize("grid", [(2, 1, 1), (1, 1, 8), (2,), (3, 3), (2, 3, 1)], ids=str)
def test_scales_of_another_number_of_matrices_are_refused(models: Models, grid: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    models.change("sft", {name: EIGHT.repeat(3, 1, 1), f"{name}_scale_inv": torch.ones(grid)}, FP8)
    match = rf"'{name}' is F8_E4M3 \[3, 8, 8\] in sft .* are {re.escape(str(list(grid)))}; they must be"
    models.refused(MismatchError, match, dequantize=True)


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128.0, 128], [-1, 1], {"a": 1}, [True, True], 128], ids=str)
def test_a_block_that_is_none_is_refused(models: Models, block: object) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    models.change("sft", {UP0: EIGHT, f"{UP0}_scale_inv": torch.ones(1)}, config)
    models.refused(CheckpointError, "as block size of scales, not two positive numbers", dequantize=True)


def test_fp8_without_scales_can_be_kept_as_it_is(models: Models) -> None:
    for role in ("base", "sft"):
        models.change(role, {UP0: EIGHT, **GOOD}, FP8)
    message = models.refused(CheckpointError, "with no scales.*--keep.*--take", dequantize=True)
    for number, option in enumerate(shown_options(message)):
        out = models.folder / f"out{number}"
        models.merge(out=out, dequantize=True, **option)
        assert same_bits(read_model(out)[UP0], EIGHT)
        assert read_model(out)[UP1].dtype == torch.bfloat16
