"""Models with resized embeddings and their tokenizers, made by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace

import reference
from checkpoints import State
from loading import EMBED, HEAD
from models import fine_tuned, new_model

WORDS = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(87))]  # 90 tokens; the base has 96 rows
EXTRA = ["<pad>", *(f"<call{n}>" for n in range(9))]
ENDS = (EMBED, HEAD)
Options = dict[str, Any]


def tokenizer_of(words: list[str], added: list[str] = [], **special: str) -> Any:  # noqa: B006
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)
    fast.add_tokens([AddedToken(token, special=True) for token in added])
    return fast


def resize(model: Any, rows: int, seed: int = 7) -> Any:
    """Copy a model with more or fewer embedding rows; new rows are random."""
    resized = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resized.resize_token_embeddings(rows, mean_resizing=False)
    return resized


def save(model: Any, folder: Path, tokenizer: Any = None, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_pair(layout: str, folder: Path) -> Path:
    """Write a sharded base of 96 rows and 90 tokens, and an sft of 100 rows and 100 tokens."""
    model = new_model(layout)
    save(model, folder / "base", tokenizer_of(WORDS), shard="20KB")
    tokenizer = tokenizer_of(WORDS, EXTRA, pad_token="<pad>")
    tuned = resize(fine_tuned(model, seed=2), len(tokenizer))
    tuned.config.pad_token_id = tuned.generation_config.pad_token_id = 90
    save(tuned, folder / "sft", tokenizer)
    return folder


def expected_of(
    base: State, sft: State, owner: State, common: int, start: State | None = None, **numbers: Any
) -> State:
    """Merge by the formulas: common rows are merged, the owner supplies the rest, in the base's dtype."""
    made = {}
    for name, tensor in base.items():
        rows = common if name in ENDS else len(tensor)
        b, f, s = (each[name][:rows] for each in (base, sft, base if start is None else start))
        made[name] = reference.merge_tensors(b, f, s, tensor.dtype, name=name, **numbers)
        if name in ENDS:
            made[name] = torch.cat([made[name], owner[name][common:].to(tensor.dtype)])
    return made
