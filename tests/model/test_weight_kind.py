"""Kinds of tensors by name and shape, against module classes of transformers and names in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import read_model
from mergekit_imm.model.tensor_names import layer_key, weight_kind
from models import LAYOUTS, new_model, save


def kind_of_module(model: torch.nn.Module, name: str) -> str | None:
    """The kind by the module's class; None if the class does not decide."""
    module = model.get_submodule(name.rpartition(".")[0])
    parameter = name.rpartition(".")[2]
    kind = type(module).__name__
    if "bias" in parameter:
        return "bias"
    if "Norm" in kind:
        return "norm"
    if "Embedding" in kind and parameter == "weight":
        return "embedding"
    if kind in ("Linear", "Conv1D") or "Experts" in kind or "Router" in kind:
        if layer_key(name) is not None:
            return "linear"
        return "head" if name.endswith("lm_head.weight") else "other"
    return "other" if kind in ("Conv2d", "Conv3d") else None


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_kinds_match_module_classes(layout: str) -> None:
    model = new_model(layout)
    expected = {name: kind_of_module(model, name) for name, _ in model.named_parameters()}
    found = {name: weight_kind(name, weight.shape) for name, weight in model.named_parameters()}
    assert {name: kind for name, kind in found.items() if expected[name] not in (kind, None)} == {}
    unsaid = {name.rpartition(".")[2] for name, kind in expected.items() if kind is None}
    assert unsaid <= {"weight", "sinks", "mm_input_projection_weight", "in_proj_weight", "probe", "A_log", "D"}
    assert {"linear", "embedding", "norm"} <= set(found.values())


@pytest.mark.parametrize("layout", ["qwen3_moe", "deepseek_v3", "gpt2", "llama"])
def test_files_and_memory_agree_on_how_many_weights_are_linear(layout: str, tmp_path: Path) -> None:
    """Experts are fused in memory and separate in the files."""
    model = new_model(layout)
    in_files = read_model(save(model, tmp_path / "m", "m"))

    def linear(tensors: dict[str, torch.Tensor]) -> int:
        return sum(t.numel() for name, t in tensors.items() if weight_kind(name, t.shape) == "linear")

    assert linear(in_files) == linear(dict(model.named_parameters())) > 0


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.3.mlp.shared_expert_gate.weight", (1, 32), "linear"),
        ("model.layers.3.attention.output.weight", (32, 32), "linear"),
        ("h.3.attn.c_attn.weight", (32, 96), "linear"),
        ("_orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight", (64, 32), "linear"),
        ("output.weight", (96, 32), "head"),
        ("model.layers.61.shared_head.head.weight", (96, 32), "head"),
        ("model.layers.61.embed_tokens.weight", (96, 32), "embedding"),
        ("transformer.wpe.weight", (64, 32), "embedding"),
        ("shared.weight", (96, 32), "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "embedding"),
        ("model.embed_tokens_per_layer.weight", (96, 64), "embedding"),
        ("word_embeddings_layernorm.weight", (32,), "norm"),
        ("transformer.h.0.ln_1.weight", (32,), "norm"),
        ("transformer.h.0.ln_1.bias", (32,), "bias"),
        ("model.layers.0.self_attn.q_norm.weight", (8,), "norm"),
        ("bert.encoder.layer.0.output.LayerNorm.gamma", (32,), "norm"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 64), "bias"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (4,), "bias"),
        ("transformer.h.0.attn.bias", (1, 1, 64, 64), "other"),
        ("backbone.layers.0.mixer.conv1d.weight", (64, 1, 4), "other"),
        ("model.layers.0.conv.conv.weight", (64, 1, 3), "other"),
        ("backbone.layers.0.mixer.A_log", (64, 16), "other"),
        ("rwkv.blocks.0.attention.time_maa_x", (1, 1, 64), "other"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (1, 2), "other"),
        ("visual.patch_embed.proj.weight", (32, 3, 14, 14), "other"),
        ("multi_modal_projector.linear_1.weight", (64, 32), "other"),
        ("model.layers.0.self_attn.sinks", (4,), "other"),
    ],
)
def test_kinds_of_names_in_use(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert weight_kind(name, shape) == kind
