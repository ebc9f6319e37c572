"""Draw the pictures of docs/alpha.md and docs/loop.md from the tables above them, as the commands do.

python docs/scripts/page_pictures.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mergekit_imm.evaluation.results import Result, tradeoff
from mergekit_imm.loop.state import Settings, State
from mergekit_imm.views.loop_summary import plot
from mergekit_imm.views.pareto import picture

DOCS = Path(__file__).resolve().parents[1]
FRONT = "model        alpha     in    out  held-out    moved\n"  # the heads of the tables
LOOP = "model                 alpha  new  old  loss\n"
MODELS = {"base": "base", "SFT": "{}/sft", "Merge": "{}/merged", "SFT without merges": "{}/baseline"}


def lines(page: str, head: str, end: str) -> list[str]:
    """Return the lines of a table of a page."""
    return (DOCS / page).read_text(encoding="utf-8").partition(head)[2].partition(end)[0].splitlines()


def front() -> list[Result]:
    """Return the results of the table in alpha.md: the base, then round by round by alpha."""
    found = []
    for line in lines("alpha.md", FRONT, "\nround "):
        *name, inside, outside, _, _ = line.split()
        alpha = float(name.pop()) if len(name) == 3 else None
        series = f"round {name[1]}" if len(name) > 1 else ""
        found.append(Result(" ".join(name), "", {"in": float(inside), "out": float(outside)}, alpha, series=series))
    return sorted(found, key=lambda each: (each.series, each.alpha or 0.0))


def loop() -> State:
    """Return the loop that printed the table in loop.md."""
    metrics, alphas = {}, {}
    for line in lines("loop.md", LOOP, "\npictures:"):
        *title, new, old, loss = line.split()
        alpha = title.pop() if title[0] == "Merge" else None
        number = title.pop() if title[-1].isdigit() else ""
        metrics[MODELS[" ".join(title)].format(number)] = {"new": float(new), "old": float(old), "loss": float(loss)}
        if alpha is not None:
            alphas[number] = float(alpha)
    settings = Settings("taught", "{model} {output}", evaluate="{model} {json}", rounds=len(alphas), baseline=True)
    return State(settings, "", metrics=metrics, alphas=alphas)


if __name__ == "__main__":
    (DOCS / "which-alpha.png").write_bytes(picture(tradeoff(front(), "in", "out"))["pareto.png"])
    with tempfile.TemporaryDirectory() as folder:
        plot(loop(), Path(folder))
        shutil.copy(Path(folder) / "metrics.png", DOCS / "loop-metrics.png")
