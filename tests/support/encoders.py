"""Tiny encoders and encoder-decoders, each with a head that is tied to its embedding under another name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SMALL, embedding_size=32)),
    "electra": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(**SMALL, embedding_size=32)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    ),
    "xlm": lambda: transformers.XLMWithLMHeadModel(
        transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=1, n_heads=4, max_position_embeddings=40)
    ),
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5 with a head of its own": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, tie_word_embeddings=False)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
}
