"""End real commands with real signals at random moments.

    python -m lost.kills FOLDER [--count N] [--seed N] [--signal KILL|TERM|INT]

`imm-merge` merges a pair of 50 MB in its own process and gets the signal at a random moment of its run, or just after
it; then the same command runs to its end. Prints JSON: how many, what was found, what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .driver import files_of

SMALL_WINDOW = """
import sys
from mergekit_imm import __main__
from mergekit_imm.engine import stream
stream.SYNC_BYTES = 8 << 20
__main__._begin("main")
"""
STATUS = {"KILL": -9, "TERM": 143, "INT": 130}


def write_pair(folder: Path) -> None:
    """Write base and sft of 50 MB each."""
    for seed, role in enumerate(("base", "sft")):
        row = np.random.default_rng(seed).normal(0, 0.02, 1 << 20).astype(np.float16)
        state = {f"layers.{i}.weight": np.roll(row, i).reshape(1 << 10, 1 << 10) for i in range(24)}
        (folder / role).mkdir(parents=True)
        save_file(state, folder / role / "model.safetensors")
        (folder / role / "tokenizer.json").write_text("{}")


def start(folder: Path, *arguments: str, small_window: bool = True) -> subprocess.Popen[str]:
    """Start the command in a folder; with `small_window`, it writes its journal every 8 MB."""
    program = ["-c", SMALL_WINDOW] if small_window else ["-m", "mergekit_imm"]
    return subprocess.Popen(
        [sys.executable, *program, "merge", "base", "sft", "-o", "out", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a command."""
    _, output = process.communicate(timeout=600)
    return process.returncode, output


def end_one(folder: Path, moment: float, number: signal.Signals, overwrite: bool) -> tuple[str, str]:
    """End one merge, then finish it. Return what the signal left, and what is wrong."""
    inputs = {role: files_of(folder / role) for role in ("base", "sft")}
    whole, old = files_of(folder / "whole"), files_of(folder / "old")
    for name in ("out", "out.partial", "out.old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out.replacing").unlink(missing_ok=True)
    if overwrite:
        shutil.copytree(folder / "old", folder / "out")
    arguments = ["--overwrite"] if overwrite else []
    process = start(folder, *arguments, small_window=number == signal.SIGKILL)
    time.sleep(moment)
    process.send_signal(number)
    status, output = finish(process)
    wanted = STATUS[number.name.removeprefix("SIG")]
    found = files_of(folder / "out") if (folder / "out").exists() else None
    kind = "the new one" if found == whole else "the old one" if overwrite and found == old else "absent"
    left = f"{kind}{', unfinished' if (folder / 'out.partial').exists() and kind != 'the new one' else ''}"
    of_python = ("Fatal Python error: init_", "Could not import runpy module")
    too_early = status == 1 and any(text in output for text in of_python)  # while Python itself starts
    if status not in (wanted, -number, 0) and not too_early:
        return left, f"status {status}: {output[-300:]}"
    if "Traceback" in output and "mergekit_imm/cli" in output:  # before that, it is Python's own
        return left, f"a traceback: {output[-300:]}"
    if found not in ((old, whole) if overwrite else (None, whole)):
        return left, "out is neither absent nor the old nor the new one"
    status, output = finish(start(folder, *arguments))
    if status != 0 or files_of(folder / "out") != whole:
        return left, f"the second run ended with {status}: {output[-300:]}"
    others = {path.name for path in folder.iterdir()} - {"base", "sft", "whole", "old", "out"}
    if others or {role: files_of(folder / role) for role in inputs} != inputs:
        return left, f"left behind: {sorted(others)}" if others else "an input was changed"
    return left, ""


def prepare(folder: Path) -> float:
    """Make the pair, its merge and an older merge; return the seconds that a merge takes."""
    write_pair(folder)
    seconds = []
    for _ in range(4):
        shutil.rmtree(folder / "out", ignore_errors=True)
        began = time.perf_counter()
        status, output = finish(start(folder))
        assert status == 0, output
        seconds.append(time.perf_counter() - began)
    (folder / "out").rename(folder / "whole")
    assert finish(start(folder, "--alpha", "0.25"))[0] == 0
    (folder / "out").rename(folder / "old")
    return statistics.median(seconds[1:])


def main(folder: Path, count: int, seed: int, number: signal.Signals) -> dict[str, Any]:
    """End `count` merges at moments drawn from equal parts of the run, every second one with --overwrite."""
    took, draw = prepare(folder), random.Random(seed)
    found: Counter[str] = Counter()
    failures = []
    for each in range(count):
        moment = (each + draw.random()) / count * took * 1.1
        left, wrong = end_one(folder, moment, number, overwrite=each % 2 == 1)
        found[left] += 1
        if wrong:
            failures.append(f"at {moment:.3f} s of {took:.3f}: {wrong}")
    return {"seconds_of_a_merge": round(took, 2), "tried": count, "found": dict(found), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=STATUS, default="KILL")
    given = parser.parse_args()
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    print(json.dumps(main(given.folder, given.count, given.seed, signal.Signals["SIG" + given.signal])))
