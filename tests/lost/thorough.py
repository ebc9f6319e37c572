"""Run everything: every call, every power failure, 300 signals, 100,000 damaged inputs (`make thorough`).

    python -m lost.thorough [--parts calls,power,signals,damage] [--count N] [--kills N]

Writes the results to results.json beside this file, part by part, for docs/nothing-lost.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import cpu_name, git_version

from .driver import SCENARIOS

RESULTS = Path(__file__).with_name("results.json")
BATCH = 2500  # damaged inputs per process


def program(*arguments: object) -> dict[str, Any]:
    """Run one of the programs in this folder in a fresh temporary folder, and return the JSON it prints."""
    module, *rest = map(str, arguments)
    folder = tempfile.mkdtemp(prefix="lost-", dir=Path.cwd())
    began = time.perf_counter()
    try:
        ended = subprocess.run(
            [sys.executable, "-m", f"lost.{module}", folder, *rest],
            capture_output=True,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        shutil.rmtree(folder)
    if ended.returncode != 0:
        raise SystemExit(f"{module} {' '.join(rest)} failed:\n{ended.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
    if found.get("failures"):
        raise SystemExit(f"{module} {' '.join(rest)} found:\n" + "\n".join(found["failures"][:20]))
    print(f"{time.perf_counter() - began:6.0f} s  {module} {' '.join(rest)}: {found['tried']} tried", file=sys.stderr)
    return found


def at_once(tasks: Sequence[tuple[object, ...]]) -> Iterator[dict[str, Any]]:
    """Run programs, one per CPU at a time; yield their results in the order of the tasks."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(lambda task: program(*task), tasks)


def main(parts: Sequence[str], count: int, kills: int) -> None:
    """Run the parts and save their results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(part: str, found: Any) -> None:
        results[part] = {
            "date": date.today().isoformat(),
            "git": git_version(Path(__file__).parent),
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "versions": {name: version(name) for name in ("numpy", "safetensors", "hypothesis")},
            **found,
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    for part in {"calls", "power"} & set(parts):
        found = at_once([("driver", scenario, part, "--seeds", 3) for scenario in SCENARIOS])
        keep(part, {"scenarios": dict(zip(SCENARIOS, found, strict=True))})
    if "signals" in parts:  # one at a time: the moments assume an otherwise idle machine
        counts = {"KILL": kills, "TERM": kills // 4, "INT": kills // 4}
        keep("signals", {"signals": {n: program("kills", "--signal", n, "--count", c) for n, c in counts.items()}})
    if "damage" in parts:
        endings: Counter[str] = Counter()
        tasks = [("damage", "--count", BATCH, "--seed", seed) for seed in range(-(-count // BATCH))]
        for batch in at_once(tasks):
            endings.update(batch["endings"])
            keep("damage", {"tried": sum(endings.values()), "endings": dict(sorted(endings.items()))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="calls,power,signals,damage")
    parser.add_argument("--count", type=int, default=100_000, help="damaged inputs (default 100000)")
    parser.add_argument(
        "--kills", type=int, default=200, help="SIGKILLs; a quarter as many of SIGTERM and Ctrl-C (default 200)"
    )
    given = parser.parse_args()
    main(given.parts.split(","), given.count, given.kills)
