"""Measure `dare_merge` on tensors that are on a CUDA device, against what the device's memory allows.

    python benchmarks/gpu.py [--elements 268435456] [--runs 20]

The bound is the time that the device takes to copy as many bytes as a merge must touch: its inputs read once, its
output written once. Prints a Markdown table with versions and hardware.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version

from mergekit_imm import dare_merge

NAME = "model.layers.0.mlp.up_proj.weight"


def seconds(call: Callable[[], object], runs: int) -> float:
    """Median time of a call on the device, once it is warm."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return float(statistics.median(times))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; nothing to measure")
    from mergekit_imm.numerics import triton_kernel

    base, sft, start = (torch.randn(arguments.elements, device="cuda").bfloat16() for _ in range(3))
    how = f"fused by Triton {version('triton')}" if triton_kernel.fits(base, sft, start) else "not fused"
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()},"
        f" mergekit-imm {version('mergekit-imm')}, {how}, {arguments.elements} elements\n"
    )
    print("| merge | ms | GB/s | copy of as many bytes, ms | GB/s | ratio |")
    print("|---|---|---|---|---|---|")
    for label, third in (("bf16, base and sft", None), ("bf16, base, start and sft", start)):
        for drop in (0.9, 0.0):
            touched = (3 if third is None else 4) * base.nbytes
            one, two = (torch.empty(touched // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
            copy = seconds(lambda: two.copy_(one), arguments.runs)  # noqa: B023
            merge = seconds(
                lambda: dare_merge(base, sft, start=third, drop=drop, factor=1.1, name=NAME),  # noqa: B023
                arguments.runs,
            )
            print(
                f"| {label}, drop {drop} | {1e3 * merge:.3f} | {touched / merge / 1e9:.0f} | {1e3 * copy:.3f}"
                f" | {touched / copy / 1e9:.0f} | {merge / copy:.2f} |"
            )


if __name__ == "__main__":
    main()
