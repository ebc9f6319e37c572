"""The change of weights against naive sums of norms in float64, for checkpoints of many forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import State, random_state, write_model
from mergekit_imm import (
    ArgumentError,
    CheckpointError,
    MismatchError,
    NonFiniteError,
    merge_checkpoints,
    weight_change,
)
from mergekit_imm.analysis.change import Norms, change_of, checkpoint_change, module_kind, reported_change
from mergekit_imm.model.tensor_names import weight_kind

LINEAR = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"model.layers.{i}.{name}": (24 + 8 * i, 16) for i in range(3) for name in LINEAR},
    **{f"model.layers.{i}.mlp.experts.gate_up_proj": (4, 6, 16) for i in range(3)},
    **{f"model.layers.{i}.self_attn.q_proj.bias": (24,) for i in range(3)},
    **{f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(3)},
    "model.embed_tokens.weight": (50, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (50, 16),
}


def by_hand(before: State, after: State) -> dict[str, float]:
    """Eq. 4 in float64, with an explicit list of the weights that count."""
    found: dict[str, float] = {}
    for name in before:
        if name.endswith((*LINEAR, "gate_up_proj")):
            delta = before[name].double().numpy() - after[name].double().numpy()
            layer = ".".join(name.split(".")[:3])
            found[layer] = found.get(layer, 0.0) + math.sqrt(float(np.square(delta).sum()))
    return found


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[State, State]:
    return random_state(SHAPES, dtype=dtype), random_state(SHAPES, seed=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_layer_is_the_sum_of_norms(dtype: torch.dtype) -> None:
    before, after = pair(dtype)
    found = weight_change(before, after)
    assert found.layers == pytest.approx(by_hand(before, after), rel=1e-6)
    zero = {name: torch.zeros_like(each) for name, each in before.items()}
    assert found.weights == pytest.approx(by_hand(before, zero), rel=1e-6)
    for key, value in found.layers.items():
        assert math.fsum(found.kinds[key].values()) == pytest.approx(value)
        assert found.relative[key] == pytest.approx(value / found.weights[key])
    assert math.fsum(x or 0.0 for x in found.share.values()) == pytest.approx(1)
    assert set(found.elsewhere) == {"bias", "embedding", "head", "norm"}
    head = (before["lm_head.weight"].double() - after["lm_head.weight"].double()).norm()
    assert found.elsewhere["head"] == pytest.approx(float(head), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_and_tensors_agree(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    before, after = pair(dtype)
    names = list(SHAPES)
    write_model(tmp_path / "base", before, shards=[names[::2], names[1::2]] if sharded else None)
    write_model(tmp_path / "sft", after)
    seen: list[tuple[int, int]] = []
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft", progress=lambda *at: seen.append(at))
    assert found.layers == pytest.approx(by_hand(before, after), rel=1e-6)
    assert found.elsewhere == pytest.approx(weight_change(before, after).elsewhere, rel=1e-6)
    assert seen[-1] == (4 * sum(math.prod(shape) for shape in SHAPES.values()),) * 2
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sft"}


def test_an_adapter_changes_by_its_product(tmp_path: Path) -> None:
    before, _ = pair(torch.float32)
    write_model(tmp_path / "base", before, config={"model_type": "qwen2"})
    target = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(2, 16), torch.randn(32, 2)
    (tmp_path / "adapter").mkdir()
    names = {f"base_model.model.{target}.lora_A.weight": a, f"base_model.model.{target}.lora_B.weight": b}
    save_file(names, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = checkpoint_change(tmp_path / "base", tmp_path / "adapter")
    expected = 2.0 * float((b.double() @ a.double()).norm())
    assert found.layers == pytest.approx({"model.layers.0": 0, "model.layers.1": expected, "model.layers.2": 0})


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    before, after = pair(torch.float32)
    for state in (before, after):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    for name, state in (("base", before), ("sft", after)):
        write_model(tmp_path / name, state, config={"tie_word_embeddings": True})
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft")
    norm = (before["lm_head.weight"].double() - after["lm_head.weight"].double()).norm()
    assert found.elsewhere["embedding"] == pytest.approx(float(norm), rel=1e-6)
    assert "head" not in found.elsewhere


def test_rows_of_only_one_vocabulary_do_not_count(tmp_path: Path) -> None:
    before, after = pair(torch.float32)
    more = {
        name: torch.cat([after[name], torch.ones(3, 16)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "sft", after | more)
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft")
    assert found.elsewhere == pytest.approx(weight_change(before, after).elsewhere, rel=1e-6)
    assert "note: the vocabularies have 50 and 53 rows; the first 50 are compared" in found.notes
    with pytest.raises(MismatchError, match='vocab="base" or vocab='):
        checkpoint_change(tmp_path / "base", tmp_path / "sft", vocab="strict")


def test_report_of_a_merge_agrees(tmp_path: Path) -> None:
    before, after = pair()
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "sft", after)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.3, drop=0.7)
    streamed, read = checkpoint_change(tmp_path / "base", tmp_path / "sft"), reported_change(tmp_path / "out")
    assert (read.layers, read.weights, read.kinds) == (streamed.layers, streamed.weights, streamed.kinds)
    assert read.elsewhere == streamed.elsewhere


def test_report_of_a_later_round_refers_to_its_start(tmp_path: Path) -> None:
    before, after = pair()
    for name, state in (("base", before), ("sft", after)):
        write_model(tmp_path / name, state)
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "one")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "two", start=tmp_path / "one")
    streamed = checkpoint_change(tmp_path / "one", tmp_path / "sft")
    assert reported_change(tmp_path / "two").layers == pytest.approx(streamed.layers, rel=1e-6)


def test_incomplete_reports_are_refused(tmp_path: Path) -> None:
    before, after = pair()
    for name, state in (("base", before), ("sft", after)):
        write_model(tmp_path / name, state)
    with pytest.raises(CheckpointError, match=r"holds no merge with imm_report\.json; measure it from the models"):
        reported_change(tmp_path / "base")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "kept", keep=["up_proj"])
    with pytest.raises(CheckpointError, match=r"up_proj' was not merged \(keep\)"):
        reported_change(tmp_path / "kept")
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "norms", keep=["norm"])
    assert "norm" not in reported_change(tmp_path / "norms").elsewhere
    report = tmp_path / "norms" / "imm_report.json"
    content = json.loads(report.read_text())
    content["tensors"]["model.layers.0.mlp.up_proj.weight"]["delta_norm"] = None
    report.write_text(json.dumps(content))
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight'"):
        reported_change(tmp_path / "norms")
    report.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        reported_change(tmp_path / "norms")


def test_nan_is_refused_with_a_working_cure(tmp_path: Path) -> None:
    before, after = pair()
    after["model.layers.1.mlp.up_proj.weight"][0, 3] = math.nan
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "sft", after)
    message = r"'model.layers.1.mlp.up_proj.weight' of sft .*holds NaN or infinity; .*: keep=.r.\^model.layers.1"
    message = message.replace("model.layers.1", r"model\\?.layers\\?.1")
    with pytest.raises(NonFiniteError, match=message):
        checkpoint_change(tmp_path / "base", tmp_path / "sft")
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft", keep=[r"layers\.1\.mlp\.up_proj"])
    assert "note: 1 tensors are not measured: left out, or not floats" in found.notes
    with pytest.raises(NonFiniteError, match="of base "):
        checkpoint_change(tmp_path / "sft", tmp_path / "base")
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp.up_proj.weight"):
        weight_change(before, after)


def test_other_names_and_shapes_are_refused(tmp_path: Path) -> None:
    before, after = pair()
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(MismatchError, match="shape \\(32, 16\\) before and \\(1, 16\\) after"):
        weight_change(before, {**after, name: after[name][:1]})
    del after[name]
    with pytest.raises(MismatchError, match="1 tensor is in before only"):
        weight_change(before, after)
    with pytest.raises(MismatchError, match=r"is torch\.int64 before"):
        weight_change({"h.0.w": torch.zeros(2, 2, dtype=torch.int64)}, {"h.0.w": torch.zeros(2, 2)})
    with pytest.raises(MismatchError, match="none of 1 tensors is a weight matrix"):
        weight_change({"w": torch.zeros(2, 2)}, {"w": torch.zeros(2, 2)})
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "sft", after)
    with pytest.raises(MismatchError, match=r"up_proj\.weight.* keep="):
        checkpoint_change(tmp_path / "base", tmp_path / "sft")
    with pytest.raises(ArgumentError, match="workers"):
        checkpoint_change(tmp_path / "base", tmp_path / "base", workers=0)


def test_no_change_gives_no_division_by_zero() -> None:
    found = change_of(
        {"h.0.w": Norms((2, 2), 0.0, 0.0), "h.10.w": Norms((2, 2), 0.0, 2.0), "h.2.w": Norms((2, 2), 0.0, 1.0)}
    )
    assert list(found.layers) == ["h.0", "h.2", "h.10"]
    assert found.relative == {"h.0": None, "h.2": 0.0, "h.10": 0.0}
    assert set(found.share.values()) == {None}
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "linear"),
        ("model.layers.0.mlp.experts.3.w1.weight", (4, 4), "linear"),
        ("model.layers.0.mlp.experts.down_proj", (2, 4, 4), "linear"),
        ("h.0.attn.c_attn.weight", (4, 12), "linear"),
        ("model.layers.0.self_attn.q_norm.weight", (4,), "norm"),
        ("h.0.ln_1.weight", (4,), "norm"),
        ("model.layers.0.self_attn.q_proj.bias", (4,), "bias"),
        ("model.layers.0.mixer.conv1d.weight", (4, 1, 4), "other"),
        ("model.embed_tokens.weight", (4, 4), "embedding"),
        ("wpe.weight", (4, 4), "embedding"),
        ("lm_head.weight", (4, 4), "head"),
        ("bert.encoder.layer.0.output.dense.weight", (4, 4), "linear"),
    ],
)
def test_kinds_of_weights(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert weight_kind(name, shape) == kind


def test_kinds_of_modules() -> None:
    assert module_kind("model.layers.3.mlp.experts.gate_up_proj") == "gate_up_proj"
    assert module_kind("h.0.mlp.2.weight") == "mlp.*"


def test_separate_experts_are_separate_matrices_and_integers_do_not_count(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (8, 4) for i in range(3)}
    before, after = random_state(shapes), random_state(shapes, seed=1)
    for number, (name, state) in enumerate((("base", before), ("sft", after))):
        counts = {"model.layers.0.mlp.count": torch.full((2, 2), number)}
        write_model(tmp_path / name, state | counts)
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft")
    expected = sum(float((before[name].double() - after[name].double()).norm()) for name in shapes)
    assert found.layers == pytest.approx({"model.layers.0": expected}, rel=1e-6)
    assert found.kinds["model.layers.0"].keys() == {"up_proj"}
    assert "note: 1 tensors are not measured: left out, or not floats" in found.notes


def test_rename_rules_apply(tmp_path: Path) -> None:
    before, after = pair()
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "sft", {name.replace("model.", "net.", 1): each for name, each in after.items()})
    found = checkpoint_change(tmp_path / "base", tmp_path / "sft", rename=[r"^net\.=model."])
    assert found.layers == pytest.approx(by_hand(before, after), rel=1e-6)
