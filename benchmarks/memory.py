"""Measure `imm-merge` on a real layout with random weights: wall time, peak memory, bytes read and written.

    python benchmarks/memory.py qwen2.5-1.5b [--runs 3]

makes the pair in a temporary folder (three times the model's size on disk), merges it several times, and prints a
Markdown table with the versions and the hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from pair import SIZES


def measured(command: list[str]) -> tuple[float, int, str]:
    """Run a command; return its wall seconds, its peak resident memory in bytes, and its output."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: {' '.join(command)} exited with {process.returncode}")
        output.seek(0)
        kilobytes = usage.ru_maxrss if sys.platform == "linux" else usage.ru_maxrss // 1024
        return seconds, kilobytes * 1024, output.read()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--drop", default="0.9")
    arguments = parser.parse_args()
    executable = Path(sys.executable).with_name("imm-merge")
    rows = []
    with tempfile.TemporaryDirectory(dir=".", prefix="benchmark-") as folder:
        root = Path(folder)
        # A process of its own: a child starts with the peak memory of the one it was forked from, so this one
        # stays small.
        maker = Path(__file__).with_name("pair.py")
        subprocess.run([sys.executable, maker, arguments.size, root], check=True, stdout=subprocess.DEVNULL)
        base, sft = root / "base", root / "sft"
        for _ in range(arguments.runs):
            command = [executable, base, sft, "--drop", arguments.drop, "--json", "-o", root / "out"]
            seconds, peak, output = measured([str(part) for part in command])
            report = json.loads(output)
            rows.append((seconds, peak, report["seconds"]["stream"], report["bytes_read"], report["bytes_written"]))
            shutil.rmtree(root / "out")
    print(f"{arguments.size}, bfloat16, alpha 0.5, drop {arguments.drop}; {report['parameter_count'] / 1e9:.2f} B"
          f" parameters, {report['workers']} workers, {os.cpu_count()} CPUs, {platform.machine()}")  # fmt: skip
    print(f"Python {platform.python_version()}, numba {version('numba')}, mergekit-imm {version('mergekit-imm')}\n")
    print("| run | wall s | streaming s | peak memory MB | read GB | written GB |")
    print("|---|---|---|---|---|---|")
    for number, (seconds, peak, stream, read, written) in enumerate(rows, 1):
        print(
            f"| {number} | {seconds:.2f} | {stream:.2f} | {peak / 1e6:.0f} | {read / 1e9:.2f} | {written / 1e9:.2f} |"
        )
    medians = [statistics.median(row[i] for row in rows) for i in range(3)]
    print(f"| median | {medians[0]:.2f} | {medians[2]:.2f} | {medians[1] / 1e6:.0f} | | |")


if __name__ == "__main__":
    main()
