"""Measure `imm-analyze change` on two models: seconds and peak memory, against reading the same bytes.

    python benchmarks/pair.py qwen2.5-0.5b FOLDER && python docs/scripts/change_speed.py FOLDER

Before each run the files leave the page cache. Prints the row of docs/change.md.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

CODE = """
import sys
from mergekit_imm.cli.change import change_command
change_command(sys.argv[1:], standalone_mode=False)
"""
READ = """
import os, sys
buffer = bytearray(8 << 20)
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


def forget(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(code: str, *arguments: str) -> tuple[float, float]:
    """Return seconds and the largest resident set of all children so far, in MB."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main(folder: Path) -> None:
    files = sorted(folder.glob("*/*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    read, change = [], []
    for _ in range(3):
        forget(files)
        read.append(timed(READ, *map(str, files))[0])
    for _ in range(3):
        forget(files)
        change.append(timed(CODE, str(folder / "base"), str(folder / "sft"), "-q"))
    print("| read | reading alone | `imm-analyze change` | peak memory |\n|---|---|---|---|")
    seconds, peak = min(s for s, _ in change), max(mb for _, mb in change)
    print(f"| {size / 1e9:.2f} GB | {min(read):.1f} s | {seconds:.1f} s | {peak:.0f} MB |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
