"""LoRA adapters written by PEFT, with the models that they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from models import LAYOUTS, new_model

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
