"""Time the plan of a model of a million tensors, and its merge: many small experts, as in a mixture of experts.

    python benchmarks/plans.py [--tensors 1000000] [--runs 3] [--json]

The tensors have 2 x 4 elements each, so what is measured is what a tensor costs, not what its elements do. Names are
those of Qwen's mixtures of experts, in files of 200,000 tensors and an index: safetensors allows 100 MB of header, less
than a million such names need. Base and sft are stored alike, as is usual.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from contenders import imm_merge
from measure import measured
from pair import Tensors, header, tiles
from startup import spread

EXPERTS, SHAPE = 512, (2, 4)  # in a layer; of each tensor
IN_A_FILE = 200_000  # tensors
NUMBER = 1_000_000  # tensors


def names() -> Iterator[str]:
    """Names of embedding and head, then of layer after layer, without end."""
    yield from ("model.embed_tokens.weight", "lm_head.weight")
    layer = 0
    while True:
        for expert in range(EXPERTS):
            for projection in ("down", "gate", "up"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        layer += 1


def make_experts(folder: Path, tensors: int, tile: bytes) -> None:
    """Write a model of so many tensors, cut from `tile`."""
    folder.mkdir(parents=True)
    left = islice(names(), tensors)
    files: list[Tensors] = [
        [(name, SHAPE) for name in islice(left, IN_A_FILE)] for _ in range(-(-tensors // IN_A_FILE))
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for number, content in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        head, size = header(content)
        (folder / file).write_bytes(head + (tile * (size // len(tile) + 1))[:size])
        weight_map |= dict.fromkeys((name for name, _ in content), file)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = -(-tensors // (3 * EXPERTS))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_both(folder: Path, tensors: int) -> None:
    """Write base and sft below a folder."""
    for role, tile in tiles().items():
        if role != "start":
            make_experts(folder / role, tensors, tile)


def measure(folder: Path, tensors: int = NUMBER, runs: int = 3) -> dict[str, dict[str, dict[str, float]]]:
    """Time the dry run and the merge several times, in alternation."""
    # In a process of its own: see `measured`.
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--tensors", str(tensors)], check=True)
    out = folder / "merged"
    merge = [imm_merge(), f"{folder}/base", f"{folder}/sft", "--quiet", "-o", str(out)]
    taken: dict[str, dict[str, list[float]]] = {}
    for _ in range(runs):
        for name, command in (("dry run", [*merge, "--dry-run"]), ("merge", merge)):
            os.sync()
            took, _ = measured(command)
            shutil.rmtree(out, ignore_errors=True)
            for key in ("wall", "cpu", "peak"):
                taken.setdefault(f"{name}, {tensors:,} tensors", {}).setdefault(key, []).append(took[key])
    return {name: {key: spread(values) for key, values in entry.items()} for name, entry in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=NUMBER)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only make FOLDER/base and FOLDER/sft")
    arguments = parser.parse_args()
    if arguments.make:
        make_both(arguments.make, arguments.tensors)
        return
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        results = measure(Path(folder) / "plans", arguments.tensors, arguments.runs)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, entry in results.items():
        wall, cpu, peak = entry["wall"], entry["cpu"]["median"], entry["peak"]["median"] / 1e6
        print(f"{name:<26}{wall['median']:8.2f} s ({wall['min']:.2f}-{wall['max']:.2f}){cpu:8.1f} CPU-s{peak:8.0f} MB")


if __name__ == "__main__":
    main()
