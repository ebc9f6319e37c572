"""Write what merges of many machines take into docs/many-machines.md.

python docs/scripts/many_machines.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import DOCS, update

from results import table

sys.path.append(str(DOCS.parent / "benchmarks"))
import ranks_plan


def where(path: Path, results: Mapping[str, Any]) -> str:
    """Which rates it is made of."""
    parts = []
    for inputs in ranks_plan.COMMANDS:
        found = ranks_plan.rates(results, inputs)
        told = " and ".join(f"{found[c].rate / 1e9:.2f} GB/s ({found[c].size}, {c})" for c in ("cold", "warm"))
        parts.append(f"{told} with {inputs} inputs")
    machine = results["machine"]
    return (
        f"From {', '.join(parts)}, read and written together, on one machine with {machine['cores']} cores"
        f" ({machine['cpu']}): `benchmarks/results/{path.name}`."
    )


def main() -> None:
    """Rewrite the page, or check it."""
    path, results = ranks_plan.newest()
    head, *rows = ranks_plan.table(results)
    update("many-machines.md", {"plan": f"{table(head, rows)}\n\n{where(path, results)}"}, __doc__)


if __name__ == "__main__":
    main()
