"""Tiny models of many architectures, as transformers builds them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 96
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT: dict[str, Any] = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
_MOE = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """How to make a config, tied or untied, and what loads the model."""

    config: Callable[[bool], Any]
    auto: str = "AutoModelForCausalLM"
    task: str | None = "CAUSAL_LM"
    experts: tuple[str, ...] = ()  # parameters of fused experts, as PEFT's target_parameters names them
    expert_leaves: tuple[str, ...] = ()  # what its target_modules calls those of experts that are not fused
    leave_out: tuple[str, ...] = ()  # linear layers that PEFT is not to target


def _plain(name: str, **more: Any) -> Callable[[bool], Any]:
    return lambda tied: getattr(transformers, f"{name}Config")(**{**_TEXT, **more}, tie_word_embeddings=tied)


def _bert(name: str, **more: Any) -> Callable[[bool], Any]:
    return lambda tied: getattr(transformers, f"{name}Config")(**{**_BERT, **more}, tie_word_embeddings=tied)


def _gpt2(tied: bool) -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )


def _t5(name: str) -> Callable[[bool], Any]:
    return lambda tied: getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )


def _bart(name: str) -> Callable[[bool], Any]:
    return lambda tied: getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        tie_word_embeddings=tied,
    )


def _whisper(tied: bool) -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=8,
        max_target_positions=16,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        tie_word_embeddings=tied,
    )


def _gemma3(tied: bool) -> Any:
    return transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": tied},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        boi_token_index=90,
        eoi_token_index=91,
        image_token_index=92,
        tie_word_embeddings=tied,
    )


def _qwen_vl(name: str) -> Callable[[bool], Any]:
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
        "window_size": 56,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    if name == "Qwen3VL":
        text |= {"head_dim": 8}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [1, 1, 2]}
    return lambda tied: getattr(transformers, f"{name}Config")(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config=vision,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=tied,
    )


def _llava(tied: bool) -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT, tie_word_embeddings=tied),
        vision_config=transformers.CLIPVisionConfig(**{**_VISION, "num_hidden_layers": 2}, projection_dim=16),
        image_token_index=92,
        tie_word_embeddings=tied,
    )


def _gpt_oss(tied: bool) -> Any:
    return transformers.GptOssConfig(
        **{**_TEXT, "intermediate_size": 16},
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=16,
        tie_word_embeddings=tied,
    )


def _deepseek(tied: bool) -> Any:
    return transformers.DeepseekV3Config(
        **{**_TEXT, "num_key_value_heads": 4},
        head_dim=4,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        tie_word_embeddings=tied,
    )


def _mamba(tied: bool) -> Any:
    return transformers.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )


_MLM: dict[str, Any] = {"auto": "AutoModelForMaskedLM", "task": None}
_SEQ: dict[str, Any] = {"auto": "AutoModelForSeq2SeqLM", "task": "SEQ_2_SEQ_LM"}
_VLM: dict[str, Any] = {"auto": "AutoModelForImageTextToText", "task": None}
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_GATED: dict[str, Any] = {"experts": _EXPERTS, "expert_leaves": ("gate_proj", "up_proj", "down_proj")}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_plain("Llama")),
    "qwen2": Architecture(_plain("Qwen2")),
    "qwen3": Architecture(_plain("Qwen3", head_dim=8)),
    "gemma2": Architecture(_plain("Gemma2", head_dim=8, sliding_window=16)),
    "gemma3_text": Architecture(_plain("Gemma3Text", head_dim=8, sliding_window=16)),
    "phi3": Architecture(_plain("Phi3")),
    "olmo2": Architecture(_plain("Olmo2")),
    "gpt2": Architecture(_gpt2),
    "gpt_neox": Architecture(_bert("GPTNeoX")),
    "opt": Architecture(
        lambda tied: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
    ),
    "mamba": Architecture(_mamba, leave_out=("conv1d", "out_proj")),
    "bert": Architecture(_bert("Bert"), **_MLM),
    "roberta": Architecture(_bert("Roberta"), **_MLM),
    "albert": Architecture(_bert("Albert", embedding_size=8), **_MLM),
    "electra": Architecture(_bert("Electra", embedding_size=8), **_MLM),
    "distilbert": Architecture(
        lambda tied: transformers.DistilBertConfig(
            vocab_size=VOCAB,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        ),
        **_MLM,
    ),
    "modernbert": Architecture(_bert("ModernBert", cls_token_id=1, sep_token_id=2), **_MLM),
    "t5": Architecture(_t5("T5"), **_SEQ),
    "mt5": Architecture(_t5("MT5"), **_SEQ),
    "bart": Architecture(_bart("Bart"), **_SEQ),
    "mbart": Architecture(_bart("MBart"), **_SEQ),
    "whisper": Architecture(_whisper, "AutoModelForSpeechSeq2Seq", None),
    "mixtral": Architecture(
        _plain("Mixtral", num_local_experts=3, num_experts_per_tok=2),
        experts=_EXPERTS,
        expert_leaves=("w1", "w2", "w3"),
    ),
    "qwen2_moe": Architecture(_plain("Qwen2Moe", **_MOE, shared_expert_intermediate_size=12), **_GATED),
    "qwen3_moe": Architecture(_plain("Qwen3Moe", head_dim=8, **_MOE), **_GATED),
    "deepseek_v3": Architecture(_deepseek, **_GATED),
    "gpt_oss": Architecture(_gpt_oss, experts=_EXPERTS),
    "gemma3": Architecture(_gemma3, **_VLM),
    "qwen2_5_vl": Architecture(_qwen_vl("Qwen2_5_VL"), **_VLM),
    "qwen3_vl": Architecture(_qwen_vl("Qwen3VL"), **_VLM),
    "llava": Architecture(_llava, **_VLM),
}


def auto_of(name: str) -> Any:
    """Return the class that loads an architecture."""
    return getattr(transformers, ARCHITECTURES[name].auto)


@cache
def _new(name: str, tied: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = auto_of(name).from_config(ARCHITECTURES[name].config(tied)).float().eval()
    return moved(model, seed=1, size=0.02)


def new_model(name: str, *, tied: bool) -> Any:
    """Return a float32 model with every tensor random."""
    return copy.deepcopy(_new(name, tied))


@torch.no_grad()
def moved(model: Any, *, seed: int, size: float = 0.02) -> Any:
    """Add noise to every parameter and floating-point buffer that is stored, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in stored_of(model).values():
        if tensor.is_floating_point():
            tensor.add_((torch.randn(tensor.shape, generator=generator) * size).to(tensor.dtype))
    return model


def stored_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that are stored, a shared one once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def linear_leaves(name: str) -> tuple[str, ...]:
    """Return the last parts of the names of linear layers, heads left out."""
    return tuple(sorted(_leaves(name)))


@cache
def _leaves(name: str) -> frozenset[str]:
    model = _new(name, True)
    head = model.get_output_embeddings()
    found = set()
    for path, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module is not head:
            found.add(path.rpartition(".")[2])
    return frozenset(found - set(ARCHITECTURES[name].leave_out) - {leaf for leaf in found if leaf.isdigit()})


def norm_leaf(model: Any) -> str | None:
    """Return the path of the last norm of a model that has a weight."""
    paths = [path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    paths = [path for path in paths if getattr(model.get_submodule(path), "weight", None) is not None]
    return paths[-1] if paths else None


def ends_of(model: Any) -> tuple[str, str]:
    """Return the paths of the modules that are the input embedding and the output head."""
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]


def is_tied(model: Any) -> bool:
    """Whether the head of a model in memory is its embedding."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def shared_names(model: Any) -> set[frozenset[str]]:
    """Return the names of parameters that are one, for each that has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def untie(model: Any) -> Any:
    """Give every name of a shared tensor of a model a tensor of its own, in place, and say so in its config."""
    modules: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in modules:
            model.set_submodule(path, copy.deepcopy(module))
        modules.add(id(module))
    seen: set[int] = set()
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach().clone()))
        seen.add(id(parameter))
    say_tied(model.config, False)
    return model


def say_tied(config: Any, tied: bool) -> None:
    """Make a config, and that of its text part, say whether the head is tied."""
    config.tie_word_embeddings = tied
    text = config.get_text_config()
    if text is not config:
        text.tie_word_embeddings = tied


@torch.no_grad()
def outputs_of(name: str, model: Any) -> torch.Tensor:
    """Return the logits of a model for a fixed input."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    auto = ARCHITECTURES[name].auto
    if auto == "AutoModelForSpeechSeq2Seq":
        sound = torch.randn((2, 8, 16), generator=generator)
        logits = model(input_features=sound, decoder_input_ids=ids).logits
    elif auto == "AutoModelForSeq2SeqLM":
        logits = model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
    else:
        logits = model(input_ids=ids).logits
    found: torch.Tensor = logits.detach()
    return found
