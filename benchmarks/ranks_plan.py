"""What a merge of many machines takes: bytes, bandwidth and time, from the newest measured rates of one.

python benchmarks/ranks_plan.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {"405 B": 405e9, "1 T": 1e12}  # parameters, of bfloat16
NODES = (1, 8, 32)
COMMANDS = {2: "imm-merge", 3: "imm-merge --start"}  # by how many models are read


@dataclass(frozen=True)
class Rate:
    """Bytes that one machine read and wrote in a second while it streamed."""

    size: str
    cache: str  # warm: inputs in memory, so that computing is the limit; cold: the disk is
    rate: float


@dataclass(frozen=True)
class Row:
    """One merge on some machines."""

    model: str
    inputs: int
    nodes: int
    read: float
    written: float
    disk: float  # seconds, if a machine's part of the storage is as fast as the disk that was measured
    compute: float  # seconds, if the storage keeps up with what a machine computes
    bandwidth: float  # bytes per second in all that it must then read and write


def rates(results: Mapping[str, Any], inputs: int) -> dict[str, Rate]:
    """The rate of the largest model that was measured warm, and of the largest that was measured cold."""
    found = {}
    for size, entry in results["sizes"].items():  # from small to large
        for cache, it in entry["summary"].get(COMMANDS[inputs], {}).items():
            moved = it["read"]["median"] + it["written"]["median"]
            found[cache] = Rate(size, cache, moved / it["stream"]["median"])
    return found


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """The plan."""
    for model, parameters in MODELS.items():
        for inputs in COMMANDS:
            of = rates(results, inputs)
            read, written = 2 * parameters * inputs, 2 * parameters
            for nodes in NODES:
                disk, compute = ((read + written) / of[cache].rate / nodes for cache in ("cold", "warm"))
                yield Row(model, inputs, nodes, read, written, disk, compute, of["warm"].rate * nodes)


def duration(seconds: float) -> str:
    """Minutes, or hours and minutes."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def newest() -> tuple[Path, dict[str, Any]]:
    """The newest results."""
    path = max(RESULTS.glob("*.json"))
    return path, json.loads(path.read_text(encoding="utf-8"))


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """The plan as text, its head first."""
    head = [
        "model",
        "inputs",
        "reads TB",
        "writes TB",
        "machines",
        "time, disk as measured",
        "time, computing as measured",
        "storage must then move GB/s",
    ]
    cells = [
        [
            row.model,
            str(row.inputs),
            f"{row.read / 1e12:.2f}",
            f"{row.written / 1e12:.2f}",
            str(row.nodes),
            duration(row.disk),
            duration(row.compute),
            f"{row.bandwidth / 1e9:.0f}",
        ]
        for row in rows(results)
    ]
    return [head, *cells]


if __name__ == "__main__":
    for line in table(newest()[1]):
        print("\t".join(line))
