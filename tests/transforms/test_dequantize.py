"""FP8 weights times their scales: equal to transformers and the formulas, merged with any other input."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import reference
from adapters import adapted
from checkpoints import State, files_of, read_model, same_bits, write_model
from fp8 import FP8, MODELOPT, RAGGED, SMALL, Block, Quantiser, compressed, float32_of, ragged_state, theirs, write_fp8
from mergekit_imm import CheckpointError, NonFiniteError, merge_checkpoints, verify
from mergekit_imm.checkpoint.safetensors_file import TensorInfo
from mergekit_imm.engine import workers
from mergekit_imm.numerics import cuda, devices
from mergekit_imm.transforms.fp8 import Dequantised, _fit, _table
from models import fine_tuned, load, new_model
from refused import CONFIG, MODEL, UP0, Models, write_models
from thorough import others

UP = UP0.removesuffix(".weight")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return write_models(tmp_path)


@pytest.mark.parametrize("block", [SMALL, None], ids=["blocks", "one scale"])
@pytest.mark.parametrize("layout", ["llama", "qwen3_moe"])
def test_it_is_what_transformers_dequantises(tmp_path: Path, layout: str, block: Block) -> None:
    new_model(layout).save_pretrained(tmp_path / "bf16")
    fp8 = write_fp8(tmp_path / "bf16", tmp_path / "fp8", block)
    report = merge_checkpoints(tmp_path / "bf16", fp8, tmp_path / "out", alpha=0, drop=0, dequantize=True, verify=True)
    assert report.verified
    assert report.config_changes == {"quantization_config": None}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, expected = load(tmp_path / "out", layout).state_dict(), theirs(fp8, layout, block)
    assert sorted(ours) == sorted(expected)
    assert [name for name in expected if not same_bits(ours[name], expected[name])] == []
    base = read_model(tmp_path / "bf16")
    assert sum(not torch.equal(base[n], t) for n, t in read_model(tmp_path / "out").items()) > 10
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("roles", "parameters", "dtype"),
    [
        ("sft", {"alpha": 0, "drop": 0}, "base"),
        ("base sft", {"alpha": 0, "drop": 0}, "float32"),
        *((roles, {"alpha": 0.3, "drop": 0.4}, "base") for roles in ("sft", "base sft start")),
        *others(*((roles, {"alpha": 0.3, "drop": 0.4}, "base") for roles in ("base", "start"))),
    ],
)
def test_the_bits_are_those_of_the_formulas(
    tmp_path: Path, roles: str, parameters: dict[str, float], dtype: str
) -> None:
    """Ragged edges, fused experts, FP8 in any input; not rounded before the merge."""
    inputs: dict[str, State] = {}
    for seed, role in enumerate(("base", "sft", "start")):
        state = ragged_state(seed)
        values = float32_of(state)
        if role in roles.split():
            write_model(tmp_path / role, state, config=FP8)
            inputs[role] = values
        else:
            inputs[role] = {name: tensor.to(torch.bfloat16) for name, tensor in values.items()}
            write_model(tmp_path / role, inputs[role], config=CONFIG)
    start: dict[str, Any] = {"start": tmp_path / "start", "iteration": 1} if "start" in roles else {}
    options: dict[str, Any] = {**start, **parameters, "dtype": dtype}
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", dequantize=True, **options)
    out = read_model(tmp_path / "out")
    assert sorted(out) == sorted(RAGGED)
    for name, tensor in out.items():
        base, sft, begun = (inputs[r][name] for r in ("base", "sft", "start" if start else "base"))
        expected = reference.merge_tensors(
            base,
            sft,
            begun,
            torch.float32 if dtype == "float32" else torch.bfloat16,
            name=name,
            alpha=parameters["alpha"],
            drop=parameters["drop"],
            iteration=1 if start else 0,
        )
        assert same_bits(tensor, expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == ("float32" if dtype == "float32" else "bfloat16")


FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("grid", [(3, 2, 1), (3, 1, 1), (3, 2, 2)], ids=str)
def test_fused_experts_are_as_transformers_has_them(tmp_path: Path, grid: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    columns = 256 if grid[2] == 2 else 130
    state = {
        FUSED: (torch.randn((3, 192, columns), generator=draw) * 50).to(torch.float8_e4m3fn),
        f"{FUSED}_scale_inv": torch.rand(grid, generator=draw),
    }
    expected = Fp8Dequantize(Quantiser(None))._dequantize_one(*state.values(), torch.bfloat16)
    write_model(tmp_path / "fp8", state, config=FP8)
    merge_checkpoints(tmp_path / "fp8", tmp_path / "fp8", tmp_path / "out", drop=0, alpha=0, dequantize=True)
    assert same_bits(read_model(tmp_path / "out")[FUSED], expected)


# The config, the shape and dtype of the weight and of its scales, and the suffix of their name.
FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...], torch.dtype, tuple[int, ...], torch.dtype, str]] = {
    "compressed-tensors, rows": (compressed(), (40, 24), torch.float8_e4m3fn, (40, 1), torch.bfloat16, "_scale"),
    "compressed-tensors, one": (compressed(), (40, 24), torch.float8_e4m3fn, (1,), torch.bfloat16, "_scale"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, (40, 24), torch.float8_e4m3fn, (40, 1), torch.float32, "_scale"),
    "fbgemm, Llama 4": (
        {"quant_method": "fbgemm_fp8"},
        (3, 24, 40),
        torch.float8_e4m3fn,
        (3, 1, 40),
        torch.float32,
        "_scale",
    ),
    "modelopt": (MODELOPT, (40, 24), torch.float8_e4m3fn, (), torch.float32, "_scale"),
    "E5M2": ({"quant_method": "fp8"}, (200, 300), torch.float8_e5m2, (2, 3), torch.float32, "_scale_inv"),
    "scales in BF16": ({"quant_method": "fp8"}, (200, 300), torch.float8_e4m3fn, (2, 3), torch.bfloat16, "_scale_inv"),
    "scales in E8M0": (
        {"quant_method": "fp8", "scale_fmt": "ue8m0"},
        (200, 300),
        torch.float8_e4m3fn,
        (2, 3),
        torch.float8_e8m0fnu,
        "_scale_inv",
    ),
}


# Names of weights and scales, and extra tensors, in ComfyUI and DeepSeek's own code.
SPELLINGS: dict[str, tuple[str, tuple[int, ...], torch.dtype, dict[str, torch.Tensor]]] = {
    "ComfyUI": (
        ".scale_weight",
        (),
        torch.float32,
        {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{UP}.scale_input": torch.ones(())},
    ),
    "ComfyUI, one element": (".scale_weight", (1,), torch.float32, {"scaled_fp8": torch.zeros(0)}),
    "ComfyUI, rows": (
        ".scale_weight",
        (200, 1),
        torch.float32,
        {"model.scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)},
    ),
    "ComfyUI, later": (
        ".weight_scale",
        (),
        torch.float32,
        {f"{UP}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
    ),
    "DeepSeek": (".scale", (2, 3), torch.float8_e8m0fnu, {}),
    "static activations": (".weight_scale", (1,), torch.bfloat16, {f"{UP}.act_scale": torch.ones(1)}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("says", [False, True], ids=["no config", "config"])
def test_other_names_of_scales(models: Models, spelling: str, says: bool) -> None:
    ending, grid, dtype, beside = SPELLINGS[spelling]
    draw = torch.Generator().manual_seed(1)
    weight = (torch.randn((200, 300), generator=draw) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(grid, generator=draw).add(0.1).to(dtype)
    model = {"norm.weight": torch.ones(8), "norm.scale": torch.ones(8)}
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}} if says else CONFIG
    write_model(models.sft, {**model, UP0: weight, UP + ending: scale, **beside}, config=config)
    write_model(models.base, {**model, UP0: torch.zeros(200, 300)}, config=CONFIG)
    models.refused(CheckpointError, "--dequantize multiplies its weights by their scales")
    report = models.merge(alpha=0, drop=0, dequantize=True)
    expected = float32_of({UP0: weight, f"{UP0}_scale": scale})[UP0]
    assert set(models.merged()) == {*model, UP0}
    assert same_bits(models.merged()[UP0], expected)
    assert len(report.notes) == (1 if beside else 0)


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_fp8_times_scales(models: Models, form: str) -> None:
    said, shape, fp8, grid, dtype, ending = FORMS[form]
    draw = torch.Generator().manual_seed(1)
    name = FUSED if len(shape) == 3 else UP0
    weight = (torch.randn(shape, generator=draw) * 50).to(fp8)
    scale = torch.rand(grid, generator=draw).add(0.1).to(dtype)
    state = {name: weight, name + ending: scale}
    for role in ("base", "sft"):
        write_model(getattr(models, role), state, config={**CONFIG, "quantization_config": said})
    models.refused(CheckpointError, "--dequantize multiplies its weights by their scales")
    models.merge(alpha=0, drop=0, dequantize=True)
    assert set(models.merged()) == {name}
    assert same_bits(models.merged()[name], float32_of(state)[name].to(torch.bfloat16))


def test_without_a_config_names_tell_and_blocks_are_of_128_by_128(models: Models) -> None:
    state = ragged_state(0)
    for role in ("base", "sft"):
        write_model(getattr(models, role), state)
        (getattr(models, role) / "config.json").unlink()
    models.base, models.sft = models.base / MODEL, models.sft / MODEL
    models.merge(alpha=0, drop=0, dequantize=True)
    expected = float32_of(state)
    assert all(same_bits(t, expected[n].to(torch.bfloat16)) for n, t in models.merged().items())


@pytest.fixture(scope="module")
def fp8_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bf16 and FP8, and one tuned from it in bf16 and FP8."""
    folder = tmp_path_factory.mktemp("llama")
    model = new_model("llama")
    for role, each in (("base", model), ("sft", fine_tuned(model, seed=2))):
        each.save_pretrained(folder / f"{role}-bf16", max_shard_size="20KB")
        write_fp8(folder / f"{role}-bf16", folder / role, SMALL)
    return folder


def test_an_adapter_on_an_fp8_base(fp8_llama: Path, tmp_path: Path) -> None:
    """PEFT's merge into the model as transformers dequantises it, up to the order of sums."""
    options = {"target_modules": "all-linear"}
    # In float32, so that PEFT too starts from unrounded weights.
    exact = float32_of(read_model(fp8_llama / "base"), SMALL)
    config = json.loads((fp8_llama / "base-bf16" / "config.json").read_text())
    write_model(tmp_path / "exact", {n: t.float() for n, t in exact.items()}, config={**config, "dtype": "float32"})
    adapted(tmp_path / "exact", tmp_path / "adapter", tmp_path / "merged", "llama", options, torch.float32)
    given = (fp8_llama / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"base .*quantization_config of fp8.; dequantize=True"):
        merge_checkpoints(*given)
    merge_checkpoints(*given, alpha=0, drop=0, dequantize=True, dtype="float32", verify=True)
    expected = read_model(tmp_path / "merged")
    out = read_model(tmp_path / "out")
    assert set(out) == set(expected)
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-7)
    changed = [name for name, tensor in out.items() if not torch.equal(tensor, exact[name].float())]
    assert len(changed) == 14
    load(tmp_path / "out", "llama")


def test_workers_pieces_sweeps_and_the_path_of_gpus_give_the_same_bytes(fp8_llama: Path, tmp_path: Path) -> None:
    given = (fp8_llama / "base", fp8_llama / "sft")
    merge_checkpoints(*given, tmp_path / "one", drop=0.5, workers=1, dequantize=True)
    with (
        patch("mergekit_imm.engine.workers.BUFFER", workers.MARGIN + 15 * 4096),
        patch("mergekit_imm.plan.plan.SEGMENT_ELEMENTS", 1024),
    ):
        merge_checkpoints(*given, tmp_path / "two", drop=0.5, workers=5, dequantize=True)
    device = devices.Device(cuda.merge_span_on("cpu"), cuda.buffer)
    with patch("mergekit_imm.engine.write_folder.pick_device", lambda _: device):
        merge_checkpoints(*given, tmp_path / "gpu", drop=0.5, dequantize=True)
    merge_checkpoints(*given, tmp_path / "at-{alpha}", alpha=[0.5, 0.7], drop=0.5, dequantize=True)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "gpu") == files_of(tmp_path / "at-0.5")
    two = files_of(tmp_path / "two")
    del one["imm_report.json"], two["imm_report.json"]  # sums of other pieces
    assert one == two
    verify(tmp_path / "at-0.7")


def test_the_output_has_the_files_of_the_base_and_no_scales(fp8_llama: Path, tmp_path: Path) -> None:
    report = merge_checkpoints(fp8_llama / "base", fp8_llama / "sft-bf16", tmp_path / "out", drop=0.5, dequantize=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    was = json.loads((fp8_llama / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file for name, file in was.items() if not name.endswith("_scale_inv")}
    read = sum(t.nbytes for role in ("base", "sft-bf16") for t in read_model(fp8_llama / role).values())
    assert report.bytes_read == read
    load(tmp_path / "out", "llama")


@pytest.mark.parametrize("role", ["base", "sft"])
def test_a_code_that_is_no_number_is_named(models: Models, role: str) -> None:
    for each in ("base", "sft"):
        state = ragged_state(0)
        if each == role:
            weight = state["model.layers.0.self_attn.q_a_proj.weight"]
            weight.view(torch.uint8)[3, 5] = 0xFF
        write_model(getattr(models, each), state, config=FP8)
    match = rf"q_a_proj\.weight' of {role} .* has 1 NaN or infinite of 2100 .*905"
    models.refused(NonFiniteError, match, streaming=True, dequantize=True)
    assert models.merge(dequantize=True, allow_nonfinite=True).status == "merged"
    merged = models.merged()["model.layers.0.self_attn.q_a_proj.weight"].float()
    assert merged.isnan().nonzero().tolist() == [[3, 5]]


def test_tensors_are_kept_and_taken_as_bfloat16(models: Models) -> None:
    for seed, role in enumerate(("base", "sft")):
        write_model(getattr(models, role), ragged_state(seed), config=FP8)
    models.merge(dequantize=True, keep=["q_a_proj"], take=["down_proj"], drop=0.5)
    for seed, name in ((0, "model.layers.0.self_attn.q_a_proj.weight"), (1, "model.layers.0.mlp.experts.down_proj")):
        assert same_bits(models.merged()[name], float32_of(ragged_state(seed))[name].to(torch.bfloat16))
    report = models.merge(out=models.folder / "wide", dequantize=True, take=["down_proj"], drop=0.5, dtype="float32")
    assert report.bytes_read == sum(kind["bytes_read"] for kind in report.kinds)
    assert same_bits(read_model(models.folder / "wide")[name], float32_of(ragged_state(1))[name])


def test_scales_of_activations_are_left_out_with_a_note(models: Models) -> None:
    state = {
        f"{UP}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        f"{UP}.weight_scale": torch.ones(()),
        f"{UP}.input_scale": torch.ones(()),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
        "model.layers.0.other.input_scale": torch.ones(1),
        "model.layers.0.other.k_scale": torch.ones(4),
    }
    side = {"hf_quant_config.json": "{}", "tokenizer.json": "{}"}
    write_model(models.base, state, config={**CONFIG, "quantization_config": MODELOPT}, side=side)
    floats = {UP0: torch.ones(8, 8), **{name: state[name] for name in state if "other" in name}}
    write_model(models.sft, floats, config=CONFIG)
    report = models.merge(dequantize=True)
    (note,) = [note for note in report.notes if "changes nothing" not in note]
    assert re.search(
        r"left out 2 scales of activations or marks of base .*, which only FP8 needs, such as '.*_scale'", note
    )
    assert sorted(models.merged()) == sorted(floats)
    assert not (models.out / "hf_quant_config.json").exists()
    assert (models.out / "tokenizer.json").exists()


# --- the numbers


def test_codes_are_those_of_torch() -> None:
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    for name, dtype in dtypes.items():
        expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
        np.testing.assert_array_equal(_table(name), expected)
        assert np.array_equal(np.signbit(_table(name)), np.signbit(expected)) or name != "F8_E4M3"


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    kind=st.sampled_from(["blocks", "rows", "columns", "one"]),
    cuts=st.lists(st.integers(0, 64000), max_size=5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_piece_of_a_weight_is_that_piece(
    shape: list[int], block: tuple[int, int], kind: str, cuts: list[int], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    rows, columns = (1, 1, *shape)[-2:]
    full = {
        "blocks": (-(-rows // block[0]), -(-columns // block[1])),
        "rows": (rows, 1),
        "columns": (1, columns),
        "one": (1, 1),
    }[kind]
    grid = [1] if kind == "one" else [*shape[:-2], *full[-min(2, len(shape)) :]]
    codes = draw.integers(0, 256, shape).astype(np.uint8)
    scales = draw.random(grid, np.float32)
    weight = TensorInfo("w", "F8_E4M3", tuple(shape), "f", 0, codes.size)
    scale = TensorInfo("s", "F32", tuple(grid), "f", 0, scales.nbytes)
    fit = _fit(weight, scale, block)
    assert fit is not None
    i, j = np.arange(rows), np.arange(columns)
    down = {"blocks": i // block[0], "rows": i}.get(kind, i * 0)
    across = {"blocks": j // block[1], "columns": j}.get(kind, j * 0)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy().reshape(-1, rows, columns)
    whole = (values * scales.reshape(-1, *full)[:, down[:, None], across]).reshape(-1)

    def read(tensor: Any, first: int, buffer: Any) -> None:
        source = (codes if tensor.name == "w" else scales).reshape(-1).view(np.uint8)
        buffer[:] = source[first : first + len(buffer)]

    tensor = Dequantised("w", tuple(shape), weight, scale, "base", *fit)
    edges = sorted({0, codes.size, *(cut for cut in cuts if cut < codes.size)})
    for first, end in pairwise(edges):
        out = np.full(end - first, np.float32(7))
        tensor.compute(lambda _: read, None, first, out)
        np.testing.assert_array_equal(out, whole[first:end])
