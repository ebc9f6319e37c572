"""Draw the picture of docs/alpha.md from the table above it, as `imm-analyze pareto` does.

python docs/scripts/which_alpha.py
"""

from __future__ import annotations

from pathlib import Path

from mergekit_imm.evaluation.results import Result, tradeoff
from mergekit_imm.views.pareto import picture

DOCS = Path(__file__).resolve().parents[1]
HEAD = "model        alpha     in    out  held-out    moved\n"


def results(page: str) -> list[Result]:
    """Return the results of the table: the base, then round by round by alpha."""
    _, _, rest = page.partition(HEAD)
    found = []
    for line in rest.partition("\nround ")[0].splitlines():
        *name, inside, outside, _, _ = line.split()
        alpha = float(name.pop()) if len(name) == 3 else None
        series = f"round {name[1]}" if len(name) > 1 else ""
        found.append(Result(" ".join(name), "", {"in": float(inside), "out": float(outside)}, alpha, series=series))
    return sorted(found, key=lambda each: (each.series, each.alpha or 0.0))


if __name__ == "__main__":
    found = tradeoff(results((DOCS / "alpha.md").read_text(encoding="utf-8")), "in", "out")
    (DOCS / "which-alpha.png").write_bytes(picture(found)["pareto.png"])
