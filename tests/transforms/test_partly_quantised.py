"""A partly quantised base: what is quantised is kept byte for byte, and described by the config of OUT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
from adapters import adapted
from checkpoints import State, read_model, same_bits, write_model
from fp8 import FP8, SMALL, float32_of, fp8_state, theirs
from mergekit_imm import CheckpointError, MismatchError, merge_checkpoints, verify
from mergekit_imm.transforms.quantised_units import pattern_of
from models import fine_tuned, new_model
from refused import CONFIG, SHAPES, UP0, UP1, Models, shown_options, write_models

MLP = re.compile(r"\.mlp\.\w+_proj\.weight$")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return write_models(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with MLPs quantised to FP8 by transformers, and one tuned from it in bfloat16."""
    folder = tmp_path_factory.mktemp("partly")
    model = new_model("llama")
    model.save_pretrained(folder / "base-bf16")
    fine_tuned(model, seed=2).save_pretrained(folder / "sft")
    state = read_model(folder / "base-bf16")
    config = json.loads((folder / "base-bf16" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(SMALL),
        "modules_to_not_convert": ["lm_head", "self_attn"],
    }
    mlps = fp8_state({name: state[name] for name in state if MLP.search(name)}, SMALL)
    write_model(folder / "base", {**{n: t for n, t in state.items() if not MLP.search(n)}, **mlps}, config=config)
    return folder


def merged_naively(base: State, sft: State, alpha: float, drop: float) -> State:
    """The formula for unquantised tensors, the base for quantised ones."""
    found: State = {}
    for name, tensor in base.items():
        quantised = ".mlp." in name
        found[name] = (
            tensor
            if quantised
            else reference.merge_tensors(tensor, sft[name], tensor, tensor.dtype, name=name, alpha=alpha, drop=drop)
        )
    return found


@pytest.mark.parametrize("form", ["bfloat16", "FP8", "adapter"])
def test_it_is_merged_and_loads(llama: Path, tmp_path: Path, form: str) -> None:
    """The sft unquantised, quantised like the base, or an adapter; transformers reads the config of the result."""
    base = read_model(llama / "base")
    sft = llama / "sft"
    if form == "FP8":
        state = read_model(sft)
        mlps = fp8_state({name: state[name] for name in state if MLP.search(name)}, SMALL)
        config = json.loads((llama / "base" / "config.json").read_text())
        sft = write_model(tmp_path / "sft", {**state, **mlps}, config=config)
    if form == "adapter":
        sft = tmp_path / "sft"
        options = {"target_modules": ["q_proj", "v_proj"]}
        adapted(llama / "base-bf16", sft, tmp_path / "merged", "llama", options, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"quantization_config of fp8.; dequantize=True"):
        merge_checkpoints(llama / "base", sft, tmp_path / "out")
    drop = 0.0 if form == "adapter" else 0.4
    keep = [r"mlp\.(gate|up|down)_proj"]
    report = merge_checkpoints(llama / "base", sft, tmp_path / "out", drop=drop, keep=keep, verify=True)
    out = read_model(tmp_path / "out")
    if form == "adapter":
        assert sorted(out) == sorted(base)
        changed = {name for name in base if not same_bits(out[name], base[name])}
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    else:
        expected = merged_naively(base, read_model(sft), 0.5, drop)
        assert sorted(out) == sorted(expected)
        assert [name for name in out if not same_bits(out[name], expected[name])] == []
    said = json.loads((llama / "base" / "config.json").read_text())["quantization_config"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == said
    assert report.config_changes.get("quantization_config") == (said if form == "bfloat16" else None)
    loaded = theirs(tmp_path / "out", "llama", SMALL)
    exact = float32_of(out, SMALL)
    assert sorted(loaded) == sorted(exact)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor.float(), exact[name].float(), rtol=2**-8, atol=0)
    verify(tmp_path / "out")


def test_an_adapter_of_what_is_quantised_is_refused(llama: Path, tmp_path: Path) -> None:
    """Keeping the base's would discard what it trained."""
    options = {"target_modules": ["q_proj", "up_proj"]}
    adapted(llama / "base-bf16", tmp_path / "sft", tmp_path / "merged", "llama", options, torch.bfloat16)
    with pytest.raises(
        MismatchError, match=r"sft .* changes tensor '.*up_proj.weight', which is quantised, F8_E4M3.*dequantize=True"
    ):
        merge_checkpoints(llama / "base", tmp_path / "sft", tmp_path / "out", keep=[r"\.mlp\."])
    merge_checkpoints(llama / "base", tmp_path / "sft", tmp_path / "out", dequantize=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_its_bytes_stay_whatever_the_dtype_of_the_output(llama: Path, tmp_path: Path, dtype: str) -> None:
    merge_checkpoints(llama / "base", llama / "sft", tmp_path / "out", keep=[r"\.mlp\."], dtype=dtype)
    base, out = read_model(llama / "base"), read_model(tmp_path / "out")
    for name, tensor in out.items():
        if ".mlp." in name:
            assert same_bits(tensor, base[name]), name
        else:
            assert tensor.dtype == getattr(torch, dtype)


def test_what_is_kept_in_part_is_refused_with_a_pattern_for_all(llama: Path, tmp_path: Path) -> None:
    given = (llama / "base", llama / "sft", tmp_path / "out")
    for keep in ([r"layers\.0\.mlp"], [r"\.mlp\.\w+\.weight$"], [r"\.mlp\.\w+\.weight_scale_inv"], ["up_proj"]):
        with pytest.raises(
            CheckpointError, match=r"copied in part only, first '.*': keep all of them: keep="
        ) as caught:
            merge_checkpoints(*given, keep=keep)
        (option,) = shown_options(caught.value.args[0])
        assert "self_attn" not in option["keep"][0]
        merge_checkpoints(*given, keep=[*keep, *option["keep"]], dry_run=True)
    merge_checkpoints(*given, keep=option["keep"])
    assert {name for name, t in read_model(tmp_path / "out").items() if t.dtype == torch.float8_e4m3fn} == {
        name for name, t in read_model(llama / "base").items() if t.dtype == torch.float8_e4m3fn
    }


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


UP = UP0.removesuffix(".weight")
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
# The tensors of a quantised module; the config; the tensors of an unquantised model instead.
FORMS: dict[str, tuple[State, dict[str, Any], str]] = {
    "GPTQ": (
        {
            f"{UP}.qweight": zeros(torch.int32, 1, 8),
            f"{UP}.qzeros": zeros(torch.int32, 1, 1),
            f"{UP}.scales": zeros(torch.float16, 1, 8),
            f"{UP}.g_idx": zeros(torch.int32, 8),
        },
        {"quant_method": "gptq", "bits": 4},
        UP0,
    ),
    "AWQ": (
        {
            f"{UP}.qweight": zeros(torch.int32, 8, 1),
            f"{UP}.qzeros": zeros(torch.int32, 1, 1),
            f"{UP}.scales": zeros(torch.float16, 1, 8),
        },
        {"quant_method": "awq", "bits": 4},
        UP0,
    ),
    "bitsandbytes": (
        {
            UP0: zeros(torch.uint8, 32, 1),
            f"{UP0}.absmax": zeros(torch.uint8, 1),
            f"{UP0}.quant_map": zeros(torch.float32, 16),
            f"{UP0}.nested_absmax": zeros(torch.float32, 1),
            f"{UP0}.quant_state.bitsandbytes__nf4": zeros(torch.uint8, 16),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        UP0,
    ),
    "int8": (
        {UP0: zeros(torch.int8, 8, 8), f"{UP}.SCB": zeros(torch.float32, 8), f"{UP}.weight_format": zeros(torch.uint8)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        UP0,
    ),
    "MXFP4": (
        {f"{EXPERTS}_blocks": zeros(torch.uint8, 2, 8, 1, 16), f"{EXPERTS}_scales": zeros(torch.uint8, 2, 8, 1)},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        EXPERTS,
    ),
    "compressed-tensors": (
        {
            f"{UP0}_packed": zeros(torch.int32, 8, 1),
            f"{UP0}_scale": zeros(torch.bfloat16, 8, 1),
            f"{UP0}_shape": zeros(torch.int64, 2),
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        UP0,
    ),
    "NVFP4": (
        {
            UP0: zeros(torch.uint8, 8, 4),
            f"{UP0}_scale": zeros(torch.float8_e4m3fn, 8, 1),
            f"{UP0}_scale_2": zeros(torch.float32),
            f"{UP}.input_scale": zeros(torch.float32),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        UP0,
    ),
    "AQLM": (
        {
            f"{UP}.codes": zeros(torch.int16, 8, 8),
            f"{UP}.codebooks": zeros(torch.float16, 1, 4),
            f"{UP}.scales": zeros(torch.float16, 8),
        },
        {"quant_method": "aqlm"},
        UP0,
    ),
    "EETQ": (
        {UP0: zeros(torch.int8, 8, 8), f"{UP}.weight_scales": zeros(torch.float16, 8)},
        {"quant_method": "eetq"},
        UP0,
    ),
    "ComfyUI": (
        {
            UP0: zeros(torch.float8_e4m3fn, 8, 8),
            f"{UP}.scale_weight": zeros(torch.float32),
            f"{UP}.scale_input": zeros(torch.float32),
        },
        {"quant_method": "fp8"},
        UP0,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sft", ["plain", "same", "quantised otherwise"])
def test_any_form_is_copied_as_it_is(models: Models, form: str, sft: str) -> None:
    """With the offered option; the sft unquantised, quantised alike, or quantised elsewhere."""
    parts, said, weight = FORMS[form]
    rest = {UP0: None} if weight == UP0 else {}
    same: dict[str, Any] = {**rest, "big.weight": torch.ones(60, 60), f"{UP}.bias": torch.ones(8)}
    config = {**CONFIG, "quantization_config": said}
    models.change("base", {**same, **parts}, config)
    state: dict[str, Any] = {weight: torch.ones(8, 8)}
    if sft == "same":
        state = {n: t + 1 if t.dtype in (torch.int32, torch.uint8, torch.float16) else t for n, t in parts.items()}
    elif sft == "quantised otherwise":
        state |= {UP1: zeros(torch.int8, 8, 8), f"{UP1}_scale": torch.ones(1)}
    configs = {"plain": CONFIG, "same": config, "quantised otherwise": {**CONFIG, "quantization_config": {"a": 1}}}
    models.change("sft", {**same, **state, f"{UP}.bias": 3 * torch.ones(8)}, configs[sft])
    message = models.refused(CheckpointError, "base .* is quantised .*; or keep the base's quantised tensors")
    (option,) = shown_options(message)
    keep = option["keep"]
    if sft == "quantised otherwise":
        message = models.refused(CheckpointError, f"sft .* is quantised.*first '{UP1}", keep=[*keep, r"\.1\..*_scale$"])
        (option,) = shown_options(message)
        keep += option["keep"]
    models.merge(keep=keep, drop=0)
    out, base = models.merged(), read_model(models.base)
    assert sorted(out) == sorted(base)
    assert [name for name in parts if not same_bits(out[name], base[name])] == []
    assert same_bits(out[f"{UP}.bias"], 2 * torch.ones(8))
    assert json.loads((models.out / "config.json").read_text())["quantization_config"] == said


def test_a_quantised_sft_over_an_unquantised_base_leaves_no_trace(models: Models) -> None:
    models.change("sft", {UP0: zeros(torch.float8_e4m3fn, 8, 8), f"{UP0}_scale_inv": torch.ones(1, 1)}, FP8)
    report = models.merge(keep=[UP0], drop=0)
    assert sorted(models.merged()) == sorted(SHAPES)
    assert same_bits(models.merged()[UP0], read_model(models.base)[UP0])
    assert report.config_changes == {"quantization_config": None}
    assert any(re.search(r"1 tensors of sft .*, such as '.*_scale_inv'", note) for note in report.notes)


@pytest.mark.parametrize("form", ["GPTQ", "compressed-tensors", "NVFP4", "ComfyUI"])
def test_what_a_message_offers_for_a_quantised_sft_keeps_the_base_s_weight(models: Models, form: str) -> None:
    parts, said, _ = FORMS[form]
    large = {"big.weight": torch.ones(40, 40)}
    models.change("base", large)
    config = {**CONFIG, "quantization_config": said}
    models.change("sft", {UP0: None, **large, **parts}, config)
    message = models.refused(CheckpointError, "sft .* is quantised .*; or keep the base's quantised tensors")
    (option,) = shown_options(message)
    models.merge(drop=0, keep=option["keep"])
    assert sorted(models.merged()) == sorted({**SHAPES, **large})
    assert same_bits(models.merged()[UP0], read_model(models.base)[UP0])
    assert "quantization_config" not in json.loads((models.out / "config.json").read_text())


def test_nobody_is_told_to_keep_most_of_a_model(models: Models) -> None:
    eight = {name: zeros(torch.float8_e4m3fn, 8, 8) for name in (UP0, UP1)}
    scales = {f"{name}_scale": torch.ones(1) for name in (UP0, UP1)}
    small = {"model.embed_tokens.weight": None, "lm_head.weight": None}
    models.change("base", {**eight, **scales, **small}, FP8)
    models.change("sft", small)
    assert "--keep" not in models.refused(CheckpointError, "base .* is quantised")


def test_what_is_taken_whole_brings_its_config(models: Models) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    parts = {UP0: zeros(torch.float8_e4m3fn, 8, 8), f"{UP0}_scale": torch.full((1,), 0.3)}
    models.change("sft", parts, config)
    models.refused(CheckpointError, "sft .*copied in part only, first '.*_scale'", take=[f"{UP0}$"])
    models.merge(take=[UP0], drop=0, dtype="float16")
    assert [name for name in parts if not same_bits(models.merged()[name], parts[name])] == []
    assert json.loads((models.out / "config.json").read_text())["quantization_config"] == config["quantization_config"]


def test_another_form_of_a_weight_is_not_taken_beside_it(models: Models) -> None:
    parts, said, _ = FORMS["GPTQ"]
    models.change("sft", {UP0: None, **parts}, {**CONFIG, "quantization_config": said})
    message = models.refused(CheckpointError, f"is taken, but base .* has '{UP0}' instead", take=[f"{UP}."])
    (option,) = shown_options(message)
    models.merge(drop=0, keep=option["keep"])
    assert sorted(models.merged()) == sorted(SHAPES)


def test_kept_and_taken_parts_need_one_config(models: Models) -> None:
    for role, said in (("base", {"quant_method": "fp8"}), ("sft", {"quant_method": "fp8", "weight_block_size": None})):
        scaled = {f"{name}_scale": torch.ones(1) for name in (UP0, UP1)}
        eight = {name: zeros(torch.float8_e4m3fn, 8, 8) for name in (UP0, UP1)}
        models.change(role, {**eight, **scaled}, {**CONFIG, "quantization_config": said})
    options: dict[str, Any] = {"keep": [UP0], "take": [UP1]}
    models.refused(CheckpointError, "tensors of base .* are kept and of sft .* are taken, .* differ", **options)
    models.refused(CheckpointError, "base .*copied in part only", keep=[f"{UP0}$"], take=[f"{UP0}_scale", UP1])


def test_with_dequantize_other_forms_beside_are_refused(models: Models) -> None:
    """One quantization_config would describe both, and be wrong for one."""
    parts = {
        UP0: zeros(torch.float8_e4m3fn, 8, 8),
        f"{UP0}_scale": torch.ones(1),
        UP1: zeros(torch.int8, 8, 8),
        f"{UP1}_scale": torch.ones(1),
    }
    models.change("base", parts, FP8)
    message = models.refused(CheckpointError, f"base .*'{UP1}' is I8, with", keep=[UP1], dequantize=True)
    assert "keep=" not in message


@pytest.mark.parametrize(
    ("names", "others", "pattern"),
    [
        (["a.weight"], [], r"^a\.weight$"),
        (["weight", "x.0.b"], ["y"], r"^weight$|^x\.\d+\.b$"),
        (["h.0.a.w", "h.1.a.w", "h.0.b.w"], ["h.0.c.w"], r"^(h\.\d+\.a\.|h\.\d+\.b\.)w$"),
        (["h.1.e.0.w", "h.1.e.1.w"], ["h.0.e.0.w"], r"^h\.1\.e\.(0|1)\.w$"),
        (["h.0.w", "h.1.v"], ["h.1.w", "h.0.v"], r"^h\.0\.w$|^h\.1\.v$"),
    ],
)
def test_patterns_find_all_and_no_other(names: list[str], others: list[str], pattern: str) -> None:
    assert pattern_of(names, others) == pattern
    assert all(re.search(pattern, name) for name in names)
    assert not any(re.search(pattern, name) for name in others)
