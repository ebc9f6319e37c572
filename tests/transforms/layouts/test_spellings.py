"""Architectures with different names on the hub and in memory, as transformers saves both."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import State, random_state, read_model, same_bits, write_model
from mergekit_imm import MismatchError, dare_merge, merge_checkpoints
from mergekit_imm.model.layout_names import canonical
from mergekit_imm.model.rename_rules import by_name
from models import fine_tuned

SCRIPTS = Path(__file__).parents[3] / "docs" / "scripts"
# Names, fused or split tensors, experts; text, several parts, images.
CLASSES = {
    "kimi_linear": "KimiLinearForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "hrm_text": "HrmTextForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "vit": "ViTModel",
}


@pytest.fixture(scope="module")
def architectures() -> Iterator[ModuleType]:
    """The script that builds small models of all architectures."""
    spec = importlib.util.spec_from_file_location("architectures", SCRIPTS / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(SCRIPTS))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))


def assert_same(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("model_type", CLASSES)
def test_any_layout_gives_the_same_result(model_type: str, architectures: Any, tmp_path: Path) -> None:
    """Masks and output follow the base; without dropping transformers loads the mean."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = architectures.build(transformers, torch, model_type, CLASSES[model_type])
        sft = fine_tuned(model, 2)
        for name, each in (("base", model), ("sft", sft)):
            for layout, original in (("files", True), ("memory", False)):
                each.save_pretrained(tmp_path / f"{name} {layout}", save_original_format=original)
    names = {layout: read_model(tmp_path / f"base {layout}") for layout in ("files", "memory")}
    assert set(names["files"]) != set(names["memory"])
    for layout in names:
        expected = dare_merge(*(read_model(tmp_path / f"{name} {layout}") for name in ("base", "sft")), drop=0.5)
        other = {"files": "memory", "memory": "files"}[layout]
        out = tmp_path / f"out {layout}"
        report = merge_checkpoints(tmp_path / f"base {layout}", tmp_path / f"sft {other}", out, drop=0.5, workers=2)
        assert_same(read_model(out), expected)
        assert report.renamed
        for name in set(read_model(out)):
            assert canonical(canonical(name)) == canonical(name)
    plain = tmp_path / "plain"
    merge_checkpoints(tmp_path / "base files", tmp_path / "sft memory", plain, drop=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, told = type(model).from_pretrained(plain, output_loading_info=True)
    assert not told["missing_keys"]
    states = model.state_dict(), sft.state_dict(), found.state_dict()
    for name in states[0]:
        one, two, merged = (state[name].double() for state in states)
        torch.testing.assert_close(merged, (one + two) / 2, rtol=0, atol=1e-6)


def test_two_names_of_one_spelling_are_not_guessed(tmp_path: Path) -> None:
    shapes = {"layers.0.mlp.gate.weight": (4, 8), "layers.0.block_sparse_moe.router.layer.weight": (4, 8)}
    write_model(tmp_path / "base", random_state(shapes))
    write_model(tmp_path / "sft", random_state({"layers.0.mlp.router.weight": (4, 8)}))
    with pytest.raises(MismatchError, match="2 tensors are in base"):
        merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out")


def test_a_spelling_of_another_shape_is_not_taken() -> None:
    lost, free = {"m.layers.0.attn_norm.weight": (8,)}, {"m.layers.0.input_layernorm.weight": (9,)}
    assert by_name(lost, free) == {}
    assert by_name(lost, {"m.layers.0.input_layernorm.weight": (8,)}) == {next(iter(lost)): next(iter(free))}


def test_norms_of_old_checkpoints(tmp_path: Path) -> None:
    """Early BERT checkpoints name weight and bias gamma and beta; transformers reads both."""
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertForMaskedLM(config)
    for name, each in (("base", model), ("sft", fine_tuned(model, 2))):
        each.save_pretrained(tmp_path / name)
    state = read_model(tmp_path / "base")
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {n: next((n.removesuffix(e) + ends[e] for e in ends if n.endswith(e)), n) for n in state}
    write_model(tmp_path / "base", {old[n]: t for n, t in state.items()})
    merge_checkpoints(tmp_path / "base", tmp_path / "sft", tmp_path / "out", drop=0.5)
    sft = {old[n]: t for n, t in read_model(tmp_path / "sft").items()}
    assert_same(read_model(tmp_path / "out"), dare_merge(read_model(tmp_path / "base"), sft, drop=0.5))


def test_parts_that_move_apart_are_matched_together_or_not_at_all() -> None:
    lost = {"lm.one.x.weight": (4,), "lm.two.y.weight": (4,)}
    free = {"one.x.weight": (4,), "model.two.y.weight": (4,)}
    assert by_name(lost, free) == dict(zip(lost, free, strict=True))
    assert by_name(lost | {"lm.three.z.weight": (4,)}, free) == {}


_PARTS = ["model", "layers", "0", "1", "mlp", "moe", "experts", "self_attn", "attn", "gate", "router", "layer"]
_ENDS = ["q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "norm", "q_norm"]
_NAME = st.builds(
    lambda parts, end: ".".join([*parts, end, "weight"]),
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=5),
    st.sampled_from(_ENDS),
)


@given(st.dictionaries(_NAME, st.just((4, 4)), max_size=10), st.dictionaries(_NAME, st.just((4, 4)), max_size=10))
def test_a_match_is_one_to_one_and_keeps_numbers(lost: Any, free: Any) -> None:
    lost = {name: shape for name, shape in lost.items() if name not in free}
    found = by_name(lost, free)
    assert set(found) <= set(lost)
    assert set(found.values()) <= set(free)
    assert len({*found.values()}) == len(found)
    for old, new in found.items():
        assert [p for p in old.split(".") if p.isdigit()] == [p for p in new.split(".") if p.isdigit()]
