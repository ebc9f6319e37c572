"""Which architectures merge, in whatever layout their files have: every small model that transformers can build.

    python docs/scripts/architectures.py [--check]          renews the table of docs/inputs.md from architectures.json
    python docs/scripts/architectures.py --sweep [CLASS …]  builds, merges and compares: ten minutes on one core

Of each class of the auto mappings a small model is built, saved, and saved again with all its weights moved; each in
the layout of the hub and in that of memory (`save_pretrained(..., save_original_format=False)`). They are merged three
times: both as on the hub, the SFT as in memory, the base as in memory. A merge is right if transformers loads the
result, misses and finds left over no tensor that it would not of the base, and every tensor is the mean of the two.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import update

from results import table

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "architectures.json"
WAYS = ("hub", "sft", "base")  # which of the two is saved as in memory
GROUPS = {
    "causal language models": ("MODEL_FOR_CAUSAL_LM",),
    "language models that see and hear": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM"),
    "encoder-decoder models": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    "encoders of text": ("MODEL_FOR_MASKED_LM",),
}
# Why merges of two layouts are refused, by model type.
PERMUTED = "rows are permuted or interleaved between the layouts"
NUMBERED = "parts have numbers for names, or names that mean something else in the other layout"
SPELT = "many parts have other names, which are not known here"
REASONS: dict[str, str] = {
    **dict.fromkeys(("inkling2", "inkling2_text", "kimi_k25", "mistral_large4", "step3p7"), PERMUTED),
    **dict.fromkeys(("hunyuan_vl", "jina_embeddings_v3", "nomic_bert", "qianfan_ocr", "unlimited_ocr"), NUMBERED),
    **dict.fromkeys(("cohere_asr", "cosmos3_edge", "cosmos3_omni", "molmo2", "pi0"), SPELT),
}
MOST = 12_000_000  # elements of a model that is built
SECONDS = 60  # for one model

# Sizes, by names of settings; the first that matches counts. All differ, so that shapes tell what is what.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?vocab_size(_.*)?", 96),
    (r"(.*_)?(n_group|num_expert_groups?|n_groups)", 1),
    (r"(.*_)?topk_group", 1),
    (
        r"(.*_)?(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|top_k_experts|experts_per_token|moe_k|num_selected_experts|topk|router_topk)",
        2,
    ),
    (r"(n_shared_experts|num_shared_experts?|moe_num_shared_experts)", 1),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (
        r"(decoder_sparse_step|encoder_sparse_step|moe_layer_freq|expert_layer_period|interleave_moe_layer_step|moe_layer_interval)",
        1,
    ),
    (r"expert_layer_offset|attn_layer_offset", 0),
    (r"attn_layer_period", 2),
    (
        r"(moe|expert|shared_expert|moe_shared_expert|moe_latent|share_expert)_(intermediate_size|dim|ffn_dim|hidden_dim|ffn_hidden_size)",
        24,
    ),
    (r"intermediate_size_mlp", 40),
    (
        r"(.*_)?(intermediate_size|ffn_dim|encoder_ffn_dim|decoder_ffn_dim|d_ff|ffn_hidden_size|n_inner|dim_ff|intermediate_dim|mlp_hidden_size|feed_forward_hidden_size|hidden_dim|ffn_intermediate_size|mlp_dim)",
        48,
    ),
    (
        r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|kv_n_heads|swa_num_key_value_heads|num_key_value_attention_heads)",
        2,
    ),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"(mamba_n_heads|mamba_num_heads|num_ssm_heads)", 8),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 8),
    (
        r"(.*_)?(num_attention_heads|num_heads|n_head|n_heads|encoder_attention_heads|decoder_attention_heads|attention_heads|num_query_heads|swa_num_attention_heads|index_n_heads|num_decoder_attention_heads|num_encoder_attention_heads)",
        4,
    ),
    (r"q_lora_rank", 16),
    (r"kv_lora_rank", 12),
    (r"qk_rope_head_dim|rope_head_dim", 4),
    (
        r"qk_nope_head_dim|v_head_dim|qk_head_dim|swa_head_dim|index_head_dim|global_head_dim|.*_head_dim|head_dim|d_kv|head_size|attention_head_size",
        8,
    ),
    (r"rotary_dim", 4),
    (r"(mamba_)?(d_state|state_size|ssm_state_size|mamba_d_state)", 8),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|out_hidden_size|output_hidden_size|projection_dim|attention_hidden_size|lru_width|hidden_size_per_layer_input|model_dim|output_dim|emb_dim|dim|proj_hidden_size|text_hidden_size|width|backbone_hidden_size|projector_hidden_size|word_embed_proj_dim|d_embed|mm_hidden_size|embedding_dim|decoder_hidden_size)",
        32,
    ),
    (r"num_mem_blocks|num_hidden_groups", 1),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|mtp_num_layers", 0),
    (
        r"(.*_)?(num_hidden_layers|num_layers|n_layer|n_layers|depth|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|num_blocks|num_layer|num_block)",
        2,
    ),
    (
        r"(.*_)?(max_position_embeddings|n_positions|max_source_positions|max_target_positions|seq_length|max_seq_len|max_sequence_length|n_ctx|max_seq_length|max_length)",
        64,
    ),
    (r"(.*_)?sliding_window|attention_window", 16),
    (r"(.*_)?image_size", 28),
    (r"(.*_)?patch_size", 14),
    (r"num_mel_bins|num_codebooks", 16),
    (r"conv_dim|num_conv_pos_embeddings", 32),
    (r"num_conv_pos_embedding_groups", 2),
)
# What the rules above get wrong, by model type: settings of the config, {part: {...}} for those of a part.
SETTINGS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16, "index_kpool": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cosmos3_edge_text": {"head_dim": 128},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16)},
    "molmo2_adapter": {"vision_feature_layers": [-1, -2], "vision_feature_layer": [1, 0]},
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
}


def small(config_class: Any, model_type: str, *, fill: bool, kinds: bool, depth: int = 0) -> Any:
    """A config of small sizes; parts are made small too. `fill` sets what is None, `kinds` has a layer of each kind."""
    values = {key: value for key, value in vars(config_class()).items() if not key.startswith("_")}
    made: dict[str, Any] = {}
    for key, value in values.items():
        if hasattr(value, "to_dict"):
            if depth < 4:
                made[key] = small(type(value), value.model_type, fill=fill, kinds=kinds, depth=depth + 1)
        elif (found := size_of(key, value, fill)) is not None:
            made[key] = found
        elif re.search(r"_token(_id|_index)?$", key) and type(value) is int and value >= 80:
            made[key] = 80 + sum(map(ord, key)) % 16
    chosen = values.get("layer_types")
    if kinds and isinstance(chosen, list) and chosen:
        chosen = [*dict.fromkeys(chosen)]
        made["layer_types"] = chosen * 2 if len(chosen) == 1 else chosen
        if "num_hidden_layers" in values:
            made["num_hidden_layers"] = len(made["layer_types"])
    return config_class(**{**made, **SETTINGS.get(model_type, {})})


def size_of(key: str, value: Any, fill: bool) -> int | None:
    """The small value of a setting; None to leave it alone."""
    if isinstance(value, bool) or not (isinstance(value, int) or (value is None and fill)):
        return None
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)
    return size if size is None or value is None else min(size, value) if value >= 0 else None


def classes() -> Iterator[tuple[str, str, str]]:
    """Each class of a model that the auto classes know, with its group and model type."""
    from transformers.models.auto import modeling_auto

    seen: set[tuple[str, str]] = set()
    for group, mappings in GROUPS.items():
        for mapping in mappings:
            for model_type, names in getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").items():
                for name in (names,) if isinstance(names, str) else names:
                    if (model_type, name) not in seen:
                        seen.add((model_type, name))
                        yield group, model_type, name


class UnbuiltError(Exception):
    """No small model of a class can be built here."""


def build(transformers: Any, torch: Any, model_type: str, name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    errors = []
    for fill, kinds in itertools.product((False, True), (True, False)):
        try:
            kind = getattr(transformers, name)
            config_class = kind.config_class or CONFIG_MAPPING[model_type]
            config = small(config_class, config_class.model_type, fill=fill, kinds=kinds)
            with torch.device("meta"):
                count = sum(p.numel() for p in kind(config).parameters())
            if count <= MOST:
                torch.manual_seed(0)
                return kind(config)
            errors.append(f"{count} elements")
        except Exception as error:
            lines = f"{type(error).__name__}: {error}".splitlines()
            errors.append(" ".join(line.strip() for line in lines)[:300])
    raise UnbuiltError(errors[0])


def moved(model: Any, torch: Any, seed: int) -> Any:
    """Move every weight of a model, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1)
    return model


def state(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loaded(kind: Any, folder: Path) -> tuple[dict[str, Any], set[str]]:
    """What transformers makes of a folder: its tensors, and the names that the files lack or have beyond them."""
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    wrong = {str(each) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for each in told.get(key, ())}
    return state(model), wrong


def try_class(transformers: Any, torch: Any, model_type: str, name: str, folder: Path) -> dict[str, Any]:
    """How the three merges of a class end."""
    from mergekit_imm import MergeError, merge_checkpoints

    model = build(transformers, torch, model_type, name)
    kind = type(model)
    moved(model, torch, 1)
    base_state = state(model)
    layouts = {"hub": True, "memory": False}
    try:
        for layout, original in layouts.items():
            model.save_pretrained(folder / f"base-{layout}", save_original_format=original)
        moved(model, torch, 2)
        for layout, original in layouts.items():
            model.save_pretrained(folder / f"sft-{layout}", save_original_format=original)
        sft_state = state(model)
        told = {}
        for role, expected in (("base", base_state), ("sft", sft_state)):
            for layout in layouts:
                found, wrong = loaded(kind, folder / f"{role}-{layout}")
                if role == "base":
                    told[layout] = wrong
                bad = [n for n in expected if n not in found or not same(torch, found[n], expected[n], 1e-6)]
                if bad:
                    raise UnbuiltError(f"transformers does not read back {bad[0]} as it saved it ({layout})")
    except UnbuiltError:
        raise
    except Exception as error:
        raise UnbuiltError(
            f"transformers does not save and load it: {type(error).__name__}: {error}".splitlines()[0][:200]
        ) from error
    mean = {n: (t.float() + sft_state[n].float()) / 2 if t.is_floating_point() else t for n, t in base_state.items()}
    outcomes: dict[str, Any] = {}
    for way in WAYS:
        base = folder / ("base-memory" if way == "base" else "base-hub")
        sft = folder / ("sft-memory" if way == "sft" else "sft-hub")
        out = folder / f"out-{way}"
        try:
            merge_checkpoints(base, sft, out, drop=0, alpha=0.5)
        except MergeError as error:
            outcomes[way] = f"refused: {error}".replace(str(folder), "…").partition("; ")[0]
            continue
        try:
            found, wrong = loaded(kind, out)
        except Exception as error:
            outcomes[way] = f"wrong: transformers does not load it: {error}".splitlines()[0][:200]
            continue
        more = wrong - told["memory" if way == "base" else "hub"]
        bad = [n for n in mean if n not in found or not same(torch, found[n], mean[n], 2e-6)]
        outcomes[way] = f"wrong: {bad[0]} ({len(bad)})" if bad else f"wrong: {sorted(more)[0]}" if more else "right"
    changed = {file: sorted(keys_of(folder / file)) for file in ("base-hub", "base-memory")}
    return {**outcomes, "layouts": 1 if changed["base-hub"] == changed["base-memory"] else 2}


def keys_of(folder: Path) -> list[Any]:
    from safetensors import safe_open

    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found += [(name, tuple(f.get_slice(name).get_shape())) for name in f.keys()]  # noqa: SIM118 - it is no dict
    return found


def same(torch: Any, one: Any, other: Any, tolerance: float) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=0, atol=tolerance, equal_nan=True
    )


def sweep(only: list[str]) -> None:
    """Build, merge and compare; write what was seen, or renew that of some classes or model types."""
    os.environ.update(HF_HUB_OFFLINE="1")
    import logging

    import torch
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def late(*_: object) -> None:
        raise UnbuiltError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["groups"] if only and RESULTS.exists() else {}
    found: dict[str, Any] = {group: known.get(group, {}) for group in GROUPS}
    for group, model_type, name in classes():
        if only and not {name, model_type} & {*only}:
            continue
        folder = Path(tempfile.mkdtemp(prefix="architectures-"))
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                result = try_class(transformers, torch, model_type, name, folder)
        except UnbuiltError as error:
            result = {"unbuilt": str(error).replace(str(folder), "…")}
        finally:
            signal.alarm(0)
            shutil.rmtree(folder, ignore_errors=True)
        found[group][f"{model_type} {name}"] = result
        print(model_type, name, result, flush=True)
    text = json.dumps({"transformers": transformers.__version__, "groups": found}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def tables() -> str:
    """What was seen: how many merges of each group are right, and why the others are refused."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows, refused, unbuilt = [], defaultdict(set), 0
    total = Counter[str]()
    for group, found in results["groups"].items():
        built = {name: each for name, each in found.items() if "unbuilt" not in each}
        unbuilt += len(found) - len(built)
        counts = Counter(each[way].partition(":")[0] for each in built.values() for way in WAYS)
        counts["classes"], counts["two"] = len(built), sum(each["layouts"] == 2 for each in built.values())
        total += counts
        rows.append([group, *(str(counts[key]) for key in ("classes", "two", "right", "refused", "wrong"))])
        for name, each in built.items():
            if any(each[way].startswith("refused") for way in WAYS):
                model_type = name.split()[0]
                if model_type not in REASONS:
                    sys.exit(f"error: {model_type} is refused, and REASONS of {Path(__file__).name} does not say why")
                refused[REASONS[model_type]].add(model_type)
    rows.append(["together", *(str(total[key]) for key in ("classes", "two", "right", "refused", "wrong"))])
    head = ["with transformers " + results["transformers"], "classes", "of two layouts", "right", "refused", "wrong"]
    why = [[reason, ", ".join(f"`{each}`" for each in sorted(kinds))] for reason, kinds in refused.items()]
    rest = f"Not built are {unbuilt} classes: they need other packages, or no small config of theirs was found."
    return f"{table(head, rows)}\n\n{table(['refused, as', 'model types'], why)}\n\n{rest}"


def main() -> None:
    """Rewrite the page, or check it."""
    update("inputs.md", {"architectures": tables()}, __doc__)


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep(sys.argv[sys.argv.index("--sweep") + 1 :])
    else:
        main()
