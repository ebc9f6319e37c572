"""Different names for one tensor: how checkpoints and transformers 5 spell the same modules, and which they join.

The names of both models are compared in one spelling, that of `canonical`, whichever spelling each model uses. Numbers
of layers and experts stay.
"""

from __future__ import annotations

import re
from functools import cache

from .tensor_names import blanked

# (pattern, replacement) for names without numbers, applied in order. An architecture with only one spelling of a module
# is not affected, as the names of both models change alike.
_SPELLINGS = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        # Layers, and the attention and MLP of encoders.
        (r"(^|\.)(encoder\.|transformer\.)?(layer|layers|blocks|resblocks)\.\*\.", r"\1layers.*."),
        (r"\.attention\.(attention|self)\.", ".attention."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.query\.", ".q_proj."),
        (r"\.key\.", ".k_proj."),
        (r"\.value\.", ".v_proj."),
        (r"\.([qv])_bias$", r".\1_proj.bias"),
        (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
        (r"\.self_attn\.to_out\.", ".self_attn.o_proj."),
        (r"\.self_attn\.norm_([qk])\.", r".self_attn.\1_norm."),
        (r"\.(intermediate\.dense|mlp\.c_fc|mlp\.ff0)\.", ".mlp.fc1."),
        (r"\.(output\.dense|mlp\.c_proj|mlp\.ff1)\.", ".mlp.fc2."),
        (r"\.mlp\.(w12|weights_in)\.", ".mlp.gate_up_proj."),
        (r"\.mlp\.ff_proj\.", ".mlp.up_gate_proj."),
        (r"\.mlp\.(weights_out|ff_out)\.", ".mlp.down_proj."),
        (r"\.(norm1|layernorm_before)\.", ".layer_norm1."),
        (r"\.(norm2|layernorm_after)\.", ".layer_norm2."),
        # Mixtures of experts.
        (r"\.moe\.(gate|up|down)_proj\.weight$", r".mlp.experts.\1_proj"),
        (r"\.(block_sparse_moe|moe|ffn)\.", ".mlp."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
        (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
        (
            r"\.(gate\.|experts\.|router\.|moe_statics\.)*(e_score_correction_bias|expert_bias|router_bias)$",
            ".e_score_correction_bias",
        ),
        (r"\.mlp\.gate\.bias$", ".mlp.e_score_correction_bias"),
        (r"\.mlp\.(gate|router\.gate|router\.layer)\.weight$", ".mlp.router.weight"),
        (r"\.(shared_mlp|shared_expert|share_expert)\.", ".shared_experts."),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        # Attention, its sinks and gates, and linear attention.
        (r"\.(attn|attention)\.", ".self_attn."),
        (r"\.mixer\.(?=(Wqkv|out_proj)\.)", ".self_attn."),
        (r"\.self_attn\.(dense|out_proj|proj|projection_layer|attn_out)\.", ".self_attn.o_proj."),
        (r"\.(Wqkv|qkv|att_proj)\.(weight|bias)$", r".qkv_proj.\2"),
        (r"\.(softmax_offset|attention_sink_bias|learnable_sink_param|attn_sink)$", ".sinks"),
        (r"\.linear_gate\.", ".gate_proj."),
        (r"\.self_attn\.gate_proj\.", ".self_attn.g_proj."),
        (r"\.self_attn\.q_b_proj\.", ".self_attn.q_gate_proj."),
        (r"\.forget_gate\.", "."),
        # Embeddings and heads.
        (r"(^|\.)(word_embeddings|embed)\.weight$", r"\1embed_tokens.weight"),
        (r"(^|\.)(embed_out|head|head\.decoder|cls)\.weight$", r"\1lm_head.weight"),
        (r"(^|\.)vision_projector\.", r"\1projector."),
        (r"(^|\.)lm_head\.norm\.", r"\1lm_head.layer_norm."),
        (r"(^|\.)patchifier\.", r"\1patch_embed."),
        (r"\.embeddings\.(patch_embedding|patch_embeddings|patch_embeddings\.projection)\.", ".embeddings.proj."),
        (r"(^|\.)patch_merge_mlp\.linear_", r"\1multi_modal_projector.merge_linear_"),
        # Norms.
        (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),
        (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
        (r"\.(attention_layer_norm|attn_norm)\.", ".input_layernorm."),
        (r"\.(feedforward_layer_norm|ffn_norm)\.", ".post_attention_layernorm."),
        (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
        (r"\.(post_ffn_norm|mlp\.post_mlp_layernorm)\.", ".post_mlp_layernorm."),
        (r"\.attn_ln\.", ".post_attention_layernorm."),
        (r"\.mlp_ln\.", ".post_mlp_layernorm."),
        (r"\.ff_norm\.", ".post_attention_layernorm."),
        (r"\.([qk])_layernorm\.", r".\1_norm."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.W_down\.", ".mlp.fc1."),
        (r"\.W_up\.", ".mlp.fc2."),
        # Hyper-connections.
        (r"(^|\.)hc_pre\.", r"\1"),
        (r"\.hc_(attn|ffn|mlp)_(layer\.hc_)?(fn|base|scale)$", r".\1_hc.\3"),
        (r"\.mlp_hc\.", ".ffn_hc."),
        (r"(^|\.)hc_head\.", r"\1"),
        (r"(^|\.)hc_head_(fn|base|scale)$", r"\1hc_\2"),
        # Compressed and indexed attention (DeepSeek-V4).
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.(self_attn|compressor|compressor\.indexer)\.norm\.", r".\1.kv_norm."),
        (r"\.self_attn\.indexer\.(weights_proj|wq_b)\.", r".self_attn.compressor.indexer.\1."),
        (r"\.compressor\.indexer\.scorer\.", ".compressor.indexer."),
        (r"\.compressor\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
        (r"\.ape$", ".position_bias"),
        (r"\.w(q_a|q_b|kv|gate|o_a|o_b)\.", r".\1_proj."),
        (r"\.self_attn\.q_b_proj\.", ".self_attn.q_gate_proj."),
    )
)

# Tensors that one model stores separately and another concatenated: (parts, whole, dimension, endings).
JOINTS: tuple[tuple[tuple[str, ...], str, int, tuple[str, ...]], ...] = (
    (("q_conv1d", "k_conv1d", "v_conv1d"), "conv1d", 0, (".weight",)),
    (("gate_proj", "up_proj"), "gate_up_proj", 0, (".weight", ".bias")),
    (("experts.gate_proj", "experts.up_proj"), "experts.gate_up_proj", 1, ("",)),
    (("up_proj", "gate_proj"), "up_gate_proj", 0, (".weight", ".bias")),
    (("g_proj", "q_proj", "k_proj", "v_proj"), "gqkv_proj", 0, (".weight",)),
    (("q_proj", "k_proj", "v_proj"), "qkv_proj", 0, (".weight", ".bias")),
    (("wte.embedding", "wte.new_embedding"), "embed_tokens.weight", 0, ("",)),
)


def canonical(name: str) -> str:
    """Return a name in the spelling used to compare names of different models.

    >>> canonical("model.layers.3.block_sparse_moe.router.layer.weight")
    'model.layers.3.mlp.router.weight'
    """
    numbers = iter([part for part in name.split(".") if part.isdigit()])
    return ".".join(next(numbers, part) if part == "*" else part for part in _kind(blanked(name)).split("."))


@cache
def _kind(name: str) -> str:
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name
