"""Tiny random models of real architectures, written and read by transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

_SIZES: dict[str, int] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Layout:
    """An architecture: its config, the class that loads it, and its embedding's name."""

    config: Callable[[], Any]
    known_by: str
    embedding: str  # the input embedding's name in the files
    tied: bool
    auto: Any = transformers.AutoModelForCausalLM


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**_SIZES, "head_dim": 8, "sliding_window": 16},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=90,
        eoi_token_index=91,
        image_token_index=92,
    )


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config={
            **_SIZES,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=True,
    )


LAYOUTS = {
    "llama": Layout(
        lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False),
        "lm_head.weight",
        "model.embed_tokens.weight",
        tied=False,
    ),
    "qwen2": Layout(
        lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True),
        "model.layers.1.self_attn.k_proj.bias",
        "model.embed_tokens.weight",
        tied=True,
    ),
    "qwen3_moe": Layout(
        lambda: transformers.Qwen3MoeConfig(
            **_SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        ),
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.embed_tokens.weight",
        tied=False,
    ),
    "gpt2": Layout(
        lambda: transformers.GPT2Config(
            vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        "transformer.h.1.attn.c_attn.weight",
        "transformer.wte.weight",
        tied=True,
    ),
    "gemma3": Layout(
        _gemma3,
        "multi_modal_projector.mm_input_projection_weight",
        "language_model.model.embed_tokens.weight",
        tied=True,
        auto=transformers.AutoModelForImageTextToText,
    ),
    "qwen2_5_vl": Layout(
        _qwen2_5_vl,
        "visual.blocks.1.attn.qkv.weight",
        "model.embed_tokens.weight",
        tied=True,
        auto=transformers.AutoModelForImageTextToText,
    ),
    "llama4": Layout(
        lambda: transformers.Llama4TextConfig(
            **{**_SIZES, "num_hidden_layers": 2},
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=16,
            tie_word_embeddings=False,
        ),
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "model.embed_tokens.weight",
        tied=False,
    ),
    "gpt_oss": Layout(
        lambda: transformers.GptOssConfig(
            **{**_SIZES, "intermediate_size": 32},
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            tie_word_embeddings=False,
        ),
        "model.layers.1.mlp.experts.gate_up_proj_bias",
        "model.embed_tokens.weight",
        tied=False,
    ),
    "deepseek_v3": Layout(
        lambda: transformers.DeepseekV3Config(
            **_SIZES,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            tie_word_embeddings=False,
        ),
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.embed_tokens.weight",
        tied=False,
    ),
    "mamba": Layout(
        lambda: transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8),
        "backbone.layers.1.mixer.A_log",
        "backbone.embeddings.weight",
        tied=True,
    ),
}


def model_of(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    """A new model of a config, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return auto.from_config(config)


def new_model(layout: str) -> Any:
    """Make a random bfloat16 model; Mamba's A_log and D stay float32, as in training."""
    model = model_of(LAYOUTS[layout].config(), LAYOUTS[layout].auto)
    model = _noisy(model, seed=1).to(torch.bfloat16)
    if layout == "mamba":
        for layer in model.backbone.layers:
            layer.mixer.A_log.data = layer.mixer.A_log.data.float()
            layer.mixer.D.data = layer.mixer.D.data.float()
    return model


def fine_tuned(model: Any, seed: int, dtype: torch.dtype | None = None) -> Any:
    """Copy a model with every tensor slightly changed, in `dtype` if given."""
    tuned = copy.deepcopy(model)
    return _noisy(tuned if dtype is None else tuned.to(dtype), seed)


def untied(model: Any, seed: int) -> Any:
    """Copy a tied model and untie it, with a changed head."""
    copied = copy.deepcopy(model)
    for config in (copied.config, copied.config.get_text_config()):
        config.tie_word_embeddings = False
    head = copied.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return _noisy(copied, seed)


def save(model: Any, folder: Path, voice: str, shard: str = "5GB") -> Path:
    """Write a model with a tokenizer, chat template and generation config, each marked with `voice`."""
    model.generation_config = transformers.GenerationConfig(max_new_tokens=len(voice), stop_strings=[voice])
    model.save_pretrained(folder, max_shard_size=shard)
    return save_tokenizer(folder, voice)


def save_tokenizer(folder: Path, voice: str = "voice") -> Path:
    """Write a tokenizer with a chat template, marked with `voice`."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "merge", "back", voice])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template(voice)
    fast.save_pretrained(folder)
    return folder


def template(voice: str) -> str:
    """Return the chat template that `save` writes."""
    return "{% for message in messages %}" + voice + ": {{ message['content'] }}{% endfor %}"


def load(folder: Path, layout: str, **options: Any) -> Any:
    """Load a model as users do; check that no tensor is missing or unexpected."""
    model, info = LAYOUTS[layout].auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def exact_state(folder: Path, layout: str) -> dict[str, Tensor]:
    """Return the tensors of a loaded model in float64, named and fused as in memory."""
    model = load(folder, layout, dtype=torch.float32)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def dtypes_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the dtypes in a config and its nested configs: place -> dtype."""
    found = {key: value for key, value in config.items() if key in ("dtype", "torch_dtype")}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {f"{key}.{place}": dtype for place, dtype in dtypes_in(value).items()}
    return found


@torch.no_grad()
def _noisy(model: Any, seed: int, size: float = 0.01) -> Any:
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    trained = {id(parameter) for parameter in model.parameters()}
    buffers = [t for t in stored.values() if id(t) not in trained and t.is_floating_point()]
    for tensor in [*model.parameters(), *buffers]:
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * size)
    return model
