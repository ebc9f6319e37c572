"""Small real models, built and loaded with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import State, read_model, same_bits, write_model
from models import LAYOUTS, fine_tuned, new_model, save

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = [name for name, layout in LAYOUTS.items() if layout.tied]
SHARDED_BASE = ("llama", "qwen3_moe", "gemma3")  # for the others, the sft is sharded


class Pair(NamedTuple):
    """A base and its fine-tuned model on disk."""

    layout: str
    base: Path
    sft: Path


def write_pair(layout: str, folder: Path) -> Pair:
    model = new_model(layout)
    shards = {True: "20KB", False: "5GB"}
    base = save(model, folder / "base", "base", shards[layout in SHARDED_BASE])
    sft = save(fine_tuned(model, seed=2), folder / "sft", "sft", shards[layout not in SHARDED_BASE])
    return Pair(layout, base, sft)


def header(file: Path) -> tuple[list[tuple[str, str, list[int]]], dict[str, str]]:
    """Return the tensors of a safetensors file in file order, and its metadata."""
    content = file.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = entries.pop("__metadata__")
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, entry["dtype"], entry["shape"]) for name, entry in ordered], metadata


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def assert_same_bits(state: State, expected: State) -> None:
    assert sorted(state) == sorted(expected)
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []


def assert_index_is_right(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert index["weight_map"] == {name: file.name for file in files for name, _, _ in header(file)[0]}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_model(folder).values())


def stored(state: State, form: str) -> State:
    """Return a model's tensors in one layout of embedding and head: under one name, under both, or untied."""
    rest = {name: tensor for name, tensor in state.items() if name not in (EMBED, HEAD)}
    ends = {
        "embedding": {EMBED: state[EMBED]},
        "both": {EMBED: state[EMBED], HEAD: state[EMBED].clone()},
        "head": {HEAD: state[EMBED]},
        "apart": {EMBED: state[EMBED], HEAD: state[HEAD]},
    }
    return rest | ends[form]


class Tied(NamedTuple):
    """Make a tied model and two fine-tuned ones, each with an extra head that would break the tie."""

    config: dict[str, Any]
    states: dict[str, State]

    def write(self, role: str, form: str, folder: Path) -> tuple[Path, State]:
        state = stored(self.states[role], form)
        names = sorted(state, key=lambda name: (name != EMBED, name == HEAD))
        shards = [names[:9], names[9:]] if role == "base" else None
        return write_model(folder / role, state, shards=shards, config=self.config), state
