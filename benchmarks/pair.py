"""Make random-weight checkpoints, base and sft (and start), in the layout of a real model.

    python benchmarks/pair.py qwen2.5-1.5b FOLDER [--start]

writes FOLDER/base and FOLDER/sft (bfloat16, 3.1 GB each), and with --start also FOLDER/start. Names, shapes and shards
are those of the real model; `made-up-0.1b` and `tiny` continue the row downwards. The weights are Gaussian and repeat
after 4 million elements; the sft's are moved by about 2 % of their size, the start's by half of that.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # imported where it is used: who measures memory must not have it loaded
    import numpy as np
    import numpy.typing as npt


class Shape(NamedTuple):
    """What sets the names and shapes of a Qwen2 model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SIZES = {
    "tiny": Shape(64, 128, 2, 2, 1, 512, True),
    "made-up-0.1b": Shape(384, 2048, 18, 6, 2, 151936, True),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": Shape(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
}
SHARD = 4_000_000_000
TILE = 1 << 22  # elements; every tensor is cut from it, so that making a pair takes no arithmetic and little memory

Tensors = list[tuple[str, tuple[int, ...]]]


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the file."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    kv = hidden // heads * kv_heads
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)
    yield "model.embed_tokens.weight", (vocabulary, hidden)
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


def shards(size: str) -> list[Tensors]:
    """Tensors of each file: filled in order up to 4 GB."""
    files: list[Tensors] = [[]]
    filled = 0
    for name, shape in shapes(size):
        if filled and filled + 2 * prod(shape) > SHARD:
            files.append([])
            filled = 0
        files[-1].append((name, shape))
        filled += 2 * prod(shape)
    return files


def parameter_count(size: str) -> int:
    """How many parameters a model has."""
    return sum(prod(shape) for _, shape in shapes(size))


def config(size: str) -> dict[str, object]:
    """What transformers must know to load it."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


def _bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def tiles() -> dict[str, bytes]:
    """The weights of each model that all its tensors are cut from."""
    import numpy as np

    generator = np.random.default_rng(0)
    base: npt.NDArray[np.float32] = generator.standard_normal(TILE, dtype=np.float32)
    step: npt.NDArray[np.float32] = generator.standard_normal(TILE, dtype=np.float32)
    base *= np.float32(0.02)
    step *= np.float32(0.0004)
    return {"base": _bfloat16(base), "start": _bfloat16(base + step * np.float32(0.5)), "sft": _bfloat16(base + step)}


def make_pair(size: str, folder: Path, *, start: bool = False) -> list[Path]:
    """Write base, sft and perhaps start below a folder, and return them; they are on the disk then."""
    files = shards(size)
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    paths = []
    for role, tile in tiles().items():
        if role == "start" and not start:
            continue
        path = folder / role
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config(size), indent=2))
        total = sum(_write(path / name, tensors, tile) for name, tensors in zip(names, files, strict=True))
        if len(files) > 1:
            weight_map = {name: file for file, tensors in zip(names, files, strict=True) for name, _ in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        paths.append(path)
    return paths


def header(tensors: Tensors) -> tuple[bytes, int]:
    """The beginning of a safetensors file of bfloat16 tensors, and how many bytes of tensors follow it."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        end = at + 2 * prod(shape)
        content[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def _write(path: Path, tensors: Tensors, tile: bytes) -> int:
    """Write one file, and return how many bytes its tensors have."""
    head, total = header(tensors)
    view, begin = memoryview(tile), 0
    with path.open("wb", buffering=0) as file:
        file.write(head)
        for _, shape in tensors:
            begin = (begin + 2 * 7919) % (1 << 20)  # each tensor at another place of the tile
            left, at = 2 * prod(shape), begin
            while left:
                written = file.write(view[at : at + left])
                left -= written
                at = (at + written) % len(tile)
        os.fsync(file.fileno())
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", action="store_true", help="make FOLDER/start too")
    arguments = parser.parse_args()
    for made in make_pair(arguments.size, arguments.folder, start=arguments.start):
        print(made)
