"""LoRA adapters as SFT: written by PEFT, compared with PEFT's own merge and with the formulas."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import reference
from checkpoints import files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MergeError,
    MismatchError,
    merge_checkpoints,
    verify,
)
from mergekit_imm.engine import workers
from mergekit_imm.transforms.lora_tensor import product, rescaled, tiled
from models import LAYOUTS, load, new_model
from thorough import others

Options = dict[str, Any]

# What is trained, by the id of the test.
KINDS: dict[str, tuple[str, Options]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16}),
    "all linear": ("qwen3_moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "rslora, patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 5, "down_proj": 1},
        },
    ),
    "a head trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding, by factors": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "a tied embedding, by factors": ("qwen2", {"target_modules": ["embed_tokens", "k_proj"]}),
    "a tied head, by factors": ("qwen2", {"target_modules": ["lm_head", "k_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "biases of factors": ("qwen2", {"target_modules": ["k_proj"], "lora_bias": True}),
    "all biases": ("qwen2", {"target_modules": ["k_proj"], "bias": "all"}),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "tokens": ("qwen2", {"target_modules": ["k_proj"], "trainable_token_indices": [3, 5, 90]}),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 3},
        },
    ),
    "experts, one parameter": (
        "deepseek_v3",
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "use_rslora": True,
        },
    ),
    "experts stored fused, turned, and square": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts stored fused": (
        "llama4",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        },
    ),
    "a model with other names in memory": ("qwen2_5_vl", {"target_modules": ["q_proj", "qkv", "down_proj"]}),
    "a model with two towers": ("gemma3", {"target_modules": "all-linear"}),
    "tokens of a module": (
        "llama",
        {
            "target_modules": ["k_proj"],
            "trainable_token_indices": {"embed_tokens": [0, 95]},
        },
    ),
}


def train(folder: Path, layout: str, options: Options, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base, an adapter with random trained tensors, and PEFT's merge of the two in float32."""
    model = new_model(layout)
    model.config.tie_word_embeddings = LAYOUTS[layout].tied
    model.save_pretrained(folder / "base")
    adapted(folder / "base", folder / "adapter", folder / "merged", layout, options, dtype)
    return folder


def adapted(base: Path, adapter: Path, merged: Path, layout: str, options: Options, dtype: torch.dtype) -> None:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options})
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                    parameter.copy_(parameter.to(dtype))
        wrapped.save_pretrained(adapter)
        wrapped.merge_and_unload().save_pretrained(merged)


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


# --- what is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter, but only LORA is supported; .*merge_and_unload"),
        ({"peft_type": None}, "is a None adapter"),
        ({"init_lora_weights": "pissa"}, "initialised by pissa, which changed its base"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"init_lora_weights": "corda"}, "initialised by corda"),
        ({"init_lora_weights": "loftq"}, "initialised by loftq"),
        ({"init_lora_weights": "lora_ga"}, "initialised by lora_ga"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens"),
        ({"use_qalora": True}, "has use_qalora"),
        ({"target_parameters": "experts"}, "its target_parameters is not a list of names"),
        ({"use_bdlora": {"x": 1}}, "has use_bdlora"),
        ({"use_something_new": True}, "has use_something_new, an unknown setting"),
        ({"r": 0}, "its r is 0, not a positive number"),
        ({"r": "8"}, "its r is 8, not a positive number"),
        ({"lora_alpha": float("inf")}, "its lora_alpha is inf"),
        ({"rank_pattern": {"(": 2}}, "its rank_pattern is not a mapping of patterns"),
        ({"alpha_pattern": ["x"]}, "its alpha_pattern is not a mapping"),
        ({"r": 5}, "and rank 5"),
        ({"ensure_weight_tying": float("inf")}, "holds infinity or NaN"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(trained: Path, tmp_path: Path, change: Options, match: str) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for dry_run in (True, False):
        with pytest.raises(MergeError, match=match) as caught:
            merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out", dry_run=dry_run)
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("lora_A.weight", "lora_A.weird"), "an unknown kind of tensor"),
        (("layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.q_proj.lora_X"), "an unknown kind of tensor"),
        (("layers.1.", "layers.7."), r"only, not in .*is this the model that the adapter was trained on\?"),
        (("lora_B", None), "has only one factor"),
    ],
)
def test_factors_that_fit_nothing_are_refused(
    trained: Path, tmp_path: Path, change: tuple[str, str | None], match: str
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    old, new = change
    save_file({n.replace(old, new or ""): t for n, t in state.items() if new is not None or old not in n}, path)
    with pytest.raises((CheckpointError, MismatchError), match=match):
        merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    state = read_model(trained / "base")
    wider = {n: torch.cat([t, t]) if "q_proj" in n else t for n, t in state.items()}
    write_model(tmp_path / "base", wider, config=json.loads((trained / "base" / "config.json").read_text()))
    with pytest.raises(MismatchError, match=r"q_proj\.weight' is BF16 \[64, 32\], but .*is this the model"):
        merge_checkpoints(tmp_path / "base", trained / "adapter", tmp_path / "out")


def test_an_adapter_is_no_base_and_no_start(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base .* holds an adapter; .*give the model it was trained on"):
        merge_checkpoints(trained / "adapter", trained / "base", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"start .* holds an adapter"):
        merge_checkpoints(trained / "base", trained / "base", tmp_path / "out", start=trained / "adapter", iteration=1)


def test_options_that_need_a_whole_model_are_refused(trained: Path, tmp_path: Path) -> None:
    given = (trained / "base", trained / "adapter", tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"cannot be taken from sft .*adapter"):
        merge_checkpoints(*given, take=["q_proj"])
    write_model(tmp_path / "start", read_model(trained / "base"))
    with pytest.raises(ArgumentError, match=r"leave out reference=.base."):
        merge_checkpoints(*given, start=tmp_path / "start", iteration=1, reference="base")
    assert merge_checkpoints(*given, keep=["q_proj"]).tensors["kept"] == 2


def test_an_adapter_on_a_tied_model_that_trained_the_head_apart_unties_it(tmp_path: Path) -> None:
    train(tmp_path, "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]})
    report = merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0, drop=0)
    assert "trained apart, though the base ties it" in report.notes[0]
    out = read_model(tmp_path / "out")
    head = next(t for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "lm_head" in n)
    assert torch.equal(out["lm_head.weight"], head.to(torch.bfloat16))
    assert torch.equal(out["model.embed_tokens.weight"], read_model(tmp_path / "base")["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_embedding_trained_apart_from_its_tied_head_is_refused(tmp_path: Path) -> None:
    """The head would change with it; if both are trained, or stay tied, it can be merged."""
    train(tmp_path / "apart", "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]})
    with pytest.raises(CheckpointError, match=r"trained apart from the head that base .* ties to it; train both"):
        merge_checkpoints(tmp_path / "apart" / "base", tmp_path / "apart" / "adapter", tmp_path / "out")
    train(tmp_path / "both", "qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]})
    merge_checkpoints(tmp_path / "both" / "base", tmp_path / "both" / "adapter", tmp_path / "out", alpha=0, drop=0)
    out, factors = read_model(tmp_path / "out"), load_file(tmp_path / "both" / "adapter" / "adapter_model.safetensors")
    for end in ("model.embed_tokens.weight", "lm_head.weight"):
        trained = next(tensor for name, tensor in factors.items() if name.endswith(end))
        assert torch.equal(out[end], trained.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("layout", "options", "match"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, r"DoRA for '.*c_attn\.weight', a Conv1D, which is"),
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA for '.*', an embedding, which is not"),
        (
            "qwen2",
            {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
            "changes 'lm_head.weight' and 'model.embed_tokens.weight', which are one tensor",
        ),
        ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}, "which are one tensor; merge it first"),
    ],
)
def test_what_peft_alone_can_merge_is_refused(tmp_path: Path, layout: str, options: Options, match: str) -> None:
    train(tmp_path, layout, options)
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_values_that_are_not_finite_are_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state: dict[str, Tensor] = load_file(path)
    name = next(name for name in state if "layers.1.mlp.up_proj.lora_A" in name)
    state[name][0, 3] = torch.inf
    save_file(state, path)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj\.weight' of sft .* has 64 NaN or infinite"):
        merge_checkpoints(trained / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_random_state_is_no_adapter(tmp_path: Path) -> None:
    """A folder with a model is a model, whatever else it has."""
    for role in ("base", "sft"):
        write_model(tmp_path / role, random_state({"a.weight": (4, 4)}, seed=len(role)))
    (tmp_path / "sft" / "adapter_config.json").write_text("{}")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    assert "adapter_config.json" not in files_of(tmp_path / "out")


def test_a_square_parameter_alone_is_refused_as_its_sides_cannot_be_told_apart(tmp_path: Path) -> None:
    train(tmp_path, "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]})
    with pytest.raises(
        CheckpointError, match=r"the orientation of '.*experts\.down_proj' is unknown, as it is square; merge it first"
    ):
        merge_checkpoints(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
