"""LoRA adapters as SFT: written by PEFT, compared with PEFT's own merge and with the formulas."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reference
from adapters import KINDS, Options, train
from checkpoints import files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import (
    CheckpointError,
    MismatchError,
    merge_checkpoints,
    verify,
)
from mergekit_imm.engine import workers
from mergekit_imm.transforms.lora_tensor import product, rescaled, tiled
from models import load
from thorough import others


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_s_own_merge_gives(tmp_path: Path, kind: str) -> None:
    """Equal in float32 up to the order of sums, in bfloat16 within one unit in the last place."""
    layout, options = KINDS[kind]
    train(tmp_path, layout, options)
    report = merge_checkpoints(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0, drop=0, dtype="float32", verify=True
    )
    assert report.verified
    ours, theirs = read_model(tmp_path / "out"), read_model(tmp_path / "merged")
    assert set(ours) - {"lm_head.weight"} == set(theirs) - {"lm_head.weight"}
    base = read_model(tmp_path / "base")
    changed = 0
    for name in set(ours) & set(theirs):
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=2e-6, atol=2e-7)
        changed += not torch.equal(ours[name], base[name].float()) if name in base else 1
    assert changed >= 2
    load(tmp_path / "out", layout)
    merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", alpha=0, drop=0)
    for name, tensor in read_model(tmp_path / "half").items():
        if name in theirs:
            ulps = tensor.view(torch.int16).int() - theirs[name].to(tensor.dtype).view(torch.int16).int()
            assert ulps.abs().max() <= 1
    verify(tmp_path / "half")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), *KINDS["rslora, patterns"], dtype=torch.bfloat16)


def scaling_of(name: str) -> float:
    rank = 2 if "q_proj" in name else 3 if "layers.1.mlp.up_proj" in name else 4
    alpha = 5 if "layers.0.self_attn.k_proj" in name else 1 if "down_proj" in name else 8
    return float(alpha / np.sqrt(rank))


@pytest.mark.parametrize(
    "parameters",
    [
        {"alpha": 0.5, "drop": 0.9},
        *others({"alpha": 0.7, "drop": 0}),
        {"alpha": 0, "drop": 0.2},
        {"alpha": 0.3, "drop": 0, "importance": {"0": 1.0, "1": 3.0}},
    ],
)
@pytest.mark.parametrize("other_start", [False, True])
def test_the_bits_are_those_of_the_formulas(
    trained: Path, tmp_path: Path, parameters: Options, other_start: bool
) -> None:
    """The delta is added to the start unrounded; tensors without a change are those of the start."""
    base = read_model(trained / "base")
    start = {name: (tensor.float() + 0.01).to(tensor.dtype) for name, tensor in base.items()} if other_start else base
    options = dict(parameters)
    if other_start:
        config = json.loads((trained / "base" / "config.json").read_text())
        write_model(tmp_path / "start", start, config=config)
        options |= {"start": tmp_path / "start", "iteration": 2}
    merge_checkpoints(trained / "base", trained / "adapter", tmp_path / "out", **options)
    factors = load_file(trained / "adapter" / "adapter_model.safetensors")
    factor = {"0": 0.5, "1": 1.5} if "importance" in parameters else {}
    for name, tensor in read_model(tmp_path / "out").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = None
        if f"{key}.lora_A.weight" in factors:
            left, right = (factors[f"{key}.lora_{each}.weight"].float().numpy() for each in "BA")
            delta = torch.from_numpy(reference.product(left, right, scaling_of(name)))
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        expected = reference.merge_tensors(
            base[name],
            start[name] if delta is None else delta,
            start[name],
            tensor.dtype,
            name=name,
            alpha=parameters["alpha"],
            drop=parameters["drop"],
            factor=factor.get(layer, 1.0),
            iteration=2 if other_start else 0,
            is_delta=delta is not None,
        )
        assert same_bits(tensor, expected), name


@given(
    rank=st.integers(1, 20),
    rows=st.integers(1, 40),
    columns=st.integers(1, 2100),
    scaling=st.floats(0.01, 100),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_piece_of_a_product_is_that_piece(
    rank: int, rows: int, columns: int, scaling: float, cuts: list[int], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    left = draw.normal(size=(rows, rank)).astype(np.float32)
    right = draw.normal(size=(rank, columns)).astype(np.float32)
    whole = reference.product(left, right, scaling).reshape(-1)
    edges = sorted({0, rows * columns, *(cut for cut in cuts if cut < rows * columns)})
    for first, end in pairwise(edges):
        out = np.full(end - first, np.nan, np.float32)
        row = first // columns
        product(left[row:], tiled(right), columns, np.float32(scaling), first - row * columns, out)
        assert out.tobytes() == whole[first:end].tobytes()


@given(
    rank=st.integers(1, 20),
    rows=st.integers(1, 20),
    columns=st.integers(1, 1100),
    bfloat16=st.booleans(),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_any_piece_of_rescaled_rows_is_that_piece(
    rank: int, rows: int, columns: int, bfloat16: bool, place: tuple[float, float], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    left, right, weight = (
        draw.normal(size=shape).astype(np.float32) for shape in ((rows, rank), (rank, columns), (rows, columns))
    )
    magnitude = draw.normal(size=rows).astype(np.float32)
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    if bfloat16:
        weight = (bits.astype(np.uint32) << 16).view(np.float32)
    moved = weight + reference.product(left, right, 0.5)
    norms = [float(np.cumsum(np.square(row.astype(np.float64)))[-1]) for row in moved]
    factors = magnitude / np.sqrt(np.array(norms)).astype(np.float32)
    whole = (factors[:, None] * moved).reshape(-1)
    first, last = sorted(int(share * (rows * columns - 1)) for share in place)
    row, end = first // columns, last // columns + 1
    out = np.full(last + 1 - first, np.nan, np.float32)
    work, squares = np.empty(8 * columns, np.float32), np.empty((8, 512), np.float64)
    held = (bits if bfloat16 else weight)[row:end].reshape(-1)
    rows_of = (left[row:end], tiled(right), columns, np.float32(0.5), held, magnitude[row:end])
    rescaled(*rows_of, first - row * columns, work, squares, out)
    assert out.tobytes() == whole[first : last + 1].tobytes()


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "DoRA",
        "tokens",
        "Conv1D",
        "an embedding, by factors",
        "experts",
        "experts stored fused, turned, and square",
    ],
)
def test_any_number_of_workers_and_any_pieces_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    train(tmp_path, *KINDS[kind])
    given = (tmp_path / "base", tmp_path / "adapter")
    merge_checkpoints(*given, tmp_path / "one", drop=0.5, workers=1)
    with (
        patch("mergekit_imm.engine.workers.BUFFER", workers.MARGIN + 15 * 4096),
        patch("mergekit_imm.plan.plan.SEGMENT_ELEMENTS", 1024),
    ):
        merge_checkpoints(*given, tmp_path / "other", drop=0.5, workers=5)
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    del one["imm_report.json"], other["imm_report.json"]  # sums of other pieces
    assert one == other


def test_the_path_of_gpus_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    from mergekit_imm.numerics import cuda, devices

    merge_checkpoints(trained / "base", trained / "adapter", tmp_path / "cpu", drop=0.5)
    device = devices.Device(cuda.merge_span_on("cpu"), cuda.buffer)
    with patch("mergekit_imm.engine.write_folder.pick_device", lambda _: device):
        merge_checkpoints(trained / "base", trained / "adapter", tmp_path / "gpu", drop=0.5)
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "gpu")


def test_the_recipe_says_what_the_adapter_is(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    report = merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "imm_recipe.json").read_text())
    assert recipe["inputs"]["sft"]["adapter"]["lora_alpha"] == 8
    assert recipe["inputs"]["sft"]["adapter"]["rank_pattern"] == KINDS["rslora, patterns"][1]["rank_pattern"]
    assert report.bytes_read == sum(f.stat().st_size for f in (trained / "base").glob("*.safetensors")) - _head(
        trained / "base" / "model.safetensors"
    ) + sum(t.nbytes for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    assert "adapter_config.json" not in files_of(tmp_path / "out")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(CheckpointError, match=r"its adapter_config\.json has changed"):
        verify(tmp_path / "out")


def _head(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_tokenizers_come_with_the_adapter(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"a": 1}')
    merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'


def test_a_config_beside_an_adapter_is_made_to_fit_what_is_written(trained: Path, tmp_path: Path) -> None:
    """Trainers write one that, for QLoRA, says how the base was loaded; the merge is not quantised."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    config = json.loads((trained / "base" / "config.json").read_text())
    path = tmp_path / "adapter" / "config.json"
    loaded = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dtype": "float32"}
    path.write_text(json.dumps(config | loaded | {"pad_token_id": 3}))
    report = merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"pad_token_id": 3}
    assert report.config_changes == {"quantization_config": None, "dtype": "bfloat16"}
    verify(tmp_path / "out")
    path.write_text(json.dumps(config | {"model_type": "another"}))
    with pytest.raises(MismatchError, match=r"has model_type llama, sft .* has another; they must be one architecture"):
        merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "no")


def test_an_adapter_on_a_tied_model_that_trained_the_head_apart_unties_it(tmp_path: Path) -> None:
    train(tmp_path, "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]})
    report = merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0, drop=0)
    assert "trained apart, though the base ties it" in report.notes[0]
    out = read_model(tmp_path / "out")
    head = next(t for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "lm_head" in n)
    assert torch.equal(out["lm_head.weight"], head.to(torch.bfloat16))
    assert torch.equal(out["model.embed_tokens.weight"], read_model(tmp_path / "base")["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_random_state_is_no_adapter(tmp_path: Path) -> None:
    """A folder with a model is a model, whatever else it has."""
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a.weight": (4, 4)}, seed=len(role)))
    (tmp_path / "sft" / "adapter_config.json").write_text("{}")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "adapter_config.json" not in files_of(tmp_path / "out")
