"""Time what a user waits for before the first byte: --help, the first merge ever, a dry run of 405 B parameters.

    python benchmarks/startup.py [--runs 5] [--json]

The model of 405 B parameters has the names, shapes and 191 shards of Llama 3.1's, as sparse files: real headers and no
data, so it takes no disk. Its merge would be refused for want of 812 GB: the dry run is told that the disk has room.
The first merge compiles the kernel, which later ones load.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

from contenders import imm_merge, make_models
from measure import measured
from pair import Tensors, header

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 16384, 53248, 126, 128, 8, 128256
SHARD = 4_800_000_000  # bytes, at most; this gives the 191 files that it has

ON_A_LARGE_DISK = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**13, total=10**13)
from mergekit_imm.cli.main import imm_merge
imm_merge()
"""


def llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the 405 B model."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("mlp.down_proj", (HIDDEN, INNER)),
            ("mlp.gate_proj", (INNER, HIDDEN)),
            ("mlp.up_proj", (INNER, HIDDEN)),
            ("post_attention_layernorm", (HIDDEN,)),
            ("self_attn.k_proj", (kv, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.v_proj", (kv, HIDDEN)),
        ):
            yield f"{layer}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def llama_shards() -> list[Tensors]:
    """Tensors of each of the 191 files."""
    files: list[Tensors] = [[]]
    filled = 0
    for name, shape in llama_shapes():
        size = 2 * prod(shape)
        if filled and filled + size > SHARD:
            files.append([])
            filled = 0
        files[-1].append((name, shape))
        filled += size
    return files


def make_llama(folder: Path) -> None:
    """Write a model of 405 B parameters without its data."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = llama_shards()
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        head, size = header(tensors)
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
        weight_map |= dict.fromkeys((each for each, _ in tensors), name)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def measure(folder: Path, runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time each command several times, in alternation; the first of each is not counted, but for the compile."""
    folder.mkdir()
    for role in ("base", "sft"):
        make_llama(folder / f"{role}-405b")
    make_models("tiny", folder / "tiny")
    merge = [imm_merge(), f"{folder}/tiny/base", f"{folder}/tiny/sft", "--quiet", "-o"]
    llama = [sys.executable, "-c", ON_A_LARGE_DISK, f"{folder}/base-405b", f"{folder}/sft-405b"]
    llama += ["--dry-run", "-o", f"{folder}/out-405b"]
    taken: dict[str, dict[str, list[float]]] = {}
    for i in range(runs + 1):
        fresh = {"NUMBA_CACHE_DIR": str(folder / f"cache-{i}")}
        for name, command, environment in (
            ("help", [imm_merge(), "--help"], {}),
            ("dry run, 405 B", llama, {}),
            ("tiny merge", [*merge, f"{folder}/merged-{i}"], {}),
            ("tiny merge, kernel not compiled yet", [*merge, f"{folder}/first-{i}"], fresh),
        ):
            if i > 2 and environment:
                continue  # eight seconds each
            took, _ = measured(command, environment=environment)
            if i:
                for key in ("wall", "peak"):
                    taken.setdefault(name, {}).setdefault(key, []).append(took[key])
    return {name: {key: spread(values) for key, values in entry.items()} for name, entry in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        results = measure(Path(folder) / "startup", arguments.runs)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, entry in results.items():
        wall, peak = entry["wall"], entry["peak"]["median"] / 1e6
        print(f"{name:<38}{wall['median']:7.2f} s ({wall['min']:.2f}-{wall['max']:.2f}){peak:8.0f} MB")


if __name__ == "__main__":
    main()
