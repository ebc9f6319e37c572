"""Time the kernel alone, on one core: ns per parameter, beside a memcpy of the same bytes.

    python benchmarks/kernel.py [--seconds 1] [--only bf16] [--json > before.json] [--against before.json]

Each case merges 2^20 elements, statistics included, as a streaming worker does. The memcpy moves as many bytes: for two
bfloat16 inputs and one output the kernel reads 4 bytes and writes 2 for each parameter, and memcpy reads 3 and writes
3. Kernel and memcpy take turns. The minimum is what the code can do, the median what it did on this machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_imm.numerics.mask import arithmetic, mask_key
from mergekit_imm.numerics.statistics import new_tally

os.environ.setdefault("MERGEKIT_IMM_WIDE_VECTORS", "1")  # as the commands do, before the kernel is loaded
merge_span = importlib.import_module("mergekit_imm.numerics.cpu").merge_span

COUNT = 1 << 20
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

# name: base, start (None: the base), sft, output, drop
CASES: dict[str, tuple[str, str | None, str, str, float]] = {
    "bf16": ("BF16", None, "BF16", "BF16", 0.9),
    "bf16, drop 0": ("BF16", None, "BF16", "BF16", 0.0),
    "bf16, three inputs": ("BF16", "BF16", "BF16", "BF16", 0.9),
    "bf16, sft f32": ("BF16", None, "F32", "BF16", 0.9),
    "f16": ("F16", None, "F16", "F16", 0.9),
    "f32": ("F32", None, "F32", "F32", 0.9),
}


def weights(dtype: str, seed: int) -> npt.NDArray[np.uint8]:
    """Raw elements of a tensor, Gaussian."""
    values = np.random.default_rng(seed).standard_normal(COUNT) * 0.02
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).view(np.uint8)


def case(name: str) -> tuple[Callable[[], None], Callable[[], None], int]:
    """The kernel and the memcpy of a case, and the bytes that each moves."""
    base_dtype, start_dtype, sft_dtype, out_dtype, drop = CASES[name]
    base, sft = (weights(base_dtype, 0), base_dtype), (weights(sft_dtype, 1), sft_dtype)
    start = base if start_dtype is None else (weights(start_dtype, 2), start_dtype)
    out = (np.empty(COUNT * WIDTH[out_dtype], np.uint8), out_dtype)
    constants = arithmetic(alpha=0.5, drop=drop)
    key = mask_key("model.layers.0.mlp.up_proj.weight", 0, 0)
    sides = [base, sft, out] if start is base else [base, start, sft, out]
    moved = sum(raw.nbytes for raw, _ in sides)
    source, target = np.zeros(moved // 2, np.uint8), np.ones(moved // 2, np.uint8)

    def kernel() -> None:
        merge_span(base, start, sft, out, COUNT, 0, key, constants, new_tally())

    return kernel, lambda: np.copyto(target, source), moved


def measure(name: str, seconds: float) -> dict[str, float]:
    """Time a case in turns; ns per parameter."""
    kernel, memcpy, moved = case(name)
    kernel()  # compiled, or loaded
    memcpy()
    times: dict[str, list[int]] = {"kernel": [], "memcpy": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["kernel"]) < 10:
        for label, function in (("kernel", kernel), ("memcpy", memcpy)):
            began = time.perf_counter_ns()
            function()
            times[label].append(time.perf_counter_ns() - began)
    result: dict[str, float] = {"bytes_per_parameter": moved / COUNT, "repeats": len(times["kernel"])}
    for label, taken in times.items():
        result[f"{label}_min"] = round(min(taken) / COUNT, 4)
        result[f"{label}_median"] = round(statistics.median(taken) / COUNT, 4)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--only", action="append", choices=CASES, help="a case; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--against", type=Path, help="JSON of an earlier run, to compare with")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    before: dict[str, Any] = json.loads(arguments.against.read_text()) if arguments.against else {}
    results = {}
    if not arguments.json:
        print(f"{'ns per parameter':<20}{'kernel min':>11}{'median':>9}{'memcpy min':>12}{'median':>9}{'ratio':>7}")
    for name in arguments.only or CASES:
        results[name] = it = measure(name, arguments.seconds)
        if not arguments.json:
            ratio = it["kernel_min"] / it["memcpy_min"]
            change = f"  {it['kernel_min'] / before[name]['kernel_min'] - 1:+.1%} (min)" if name in before else ""
            print(
                f"{name:<20}{it['kernel_min']:>11.3f}{it['kernel_median']:>9.3f}{it['memcpy_min']:>12.3f}"
                f"{it['memcpy_median']:>9.3f}{ratio:>7.2f}{change}",
                flush=True,
            )
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
