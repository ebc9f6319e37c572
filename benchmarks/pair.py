"""Make a pair of random-weight checkpoints, base and sft, in the layout of a real model.

    python benchmarks/pair.py qwen2.5-1.5b FOLDER

writes FOLDER/base and FOLDER/sft (bfloat16, 3.1 GB each). Names, shapes and shards are those of the real model; the
weights are Gaussian, the sft's moved by about 2 % of their size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: who measures memory must not have it loaded
    import torch

# hidden, intermediate, layers, width of k and v, vocabulary, tied head
SIZES = {
    "qwen2.5-0.5b": (896, 4864, 24, 128, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 256, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 512, 152064, False),
}
SHARD = 4_000_000_000


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the file."""
    hidden, inner, layers, kv, vocab, tied = SIZES[size]
    if not tied:
        yield "lm_head.weight", (vocab, hidden)
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, width in (("k", kv), ("o", hidden), ("q", hidden), ("v", kv)):
            if name != "o":
                yield f"{layer}.self_attn.{name}_proj.bias", (width,)
            yield f"{layer}.self_attn.{name}_proj.weight", (width, hidden)
    yield "model.norm.weight", (hidden,)


def make_pair(size: str, folder: Path) -> tuple[Path, Path]:
    """Write base and sft below a folder, and return both."""
    import torch

    hidden, inner, layers, kv, vocab, tied = SIZES[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, kv // 128), "vocab_size": vocab, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    paths = folder / "base", folder / "sft"
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
    step = (torch.randn(1 << 24, generator=generator) * 0.0004).bfloat16()
    shards: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{}]
    weight_map: list[list[str]] = []
    filled, at = 0, 0
    for name, shape in shapes(size):
        count = prod(shape)
        at = (at + 7919) % (1 << 20)
        source = noise[at:].repeat(count // (len(noise) - at) + 1)[:count]
        moved = source + step[at:].repeat(count // (len(step) - at) + 1)[:count]
        if filled and filled + 2 * count > SHARD:
            _write(shards[-1], paths, weight_map)
            shards, filled = [{}], 0
        shards[-1][name] = (source.reshape(shape), moved.reshape(shape))
        filled += 2 * count
    _write(shards[-1], paths, weight_map)
    _rename(paths, weight_map)
    return paths


def _write(
    shard: dict[str, tuple[torch.Tensor, torch.Tensor]], paths: tuple[Path, Path], weight_map: list[list[str]]
) -> None:
    from safetensors.torch import save_file

    for side, path in enumerate(paths):
        tensors = {name: pair[side].contiguous() for name, pair in shard.items()}
        save_file(tensors, path / f"part-{len(weight_map)}.safetensors", metadata={"format": "pt"})
    weight_map.append(list(shard))


def _rename(paths: tuple[Path, Path], weight_map: list[list[str]]) -> None:
    total = len(weight_map)
    for path in paths:
        index: dict[str, str] = {}
        for number, names in enumerate(weight_map):
            file = f"model-{number + 1:05}-of-{total:05}.safetensors" if total > 1 else "model.safetensors"
            (path / f"part-{number}.safetensors").rename(path / file)
            index |= dict.fromkeys(names, file)
        if total > 1:
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            content = {"metadata": {"total_size": size}, "weight_map": index}
            (path / "model.safetensors.index.json").write_text(json.dumps(content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for made in make_pair(arguments.size, arguments.folder):
        print(made)
