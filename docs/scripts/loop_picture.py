"""Draw the picture of docs/loop.md from the table above it, as `imm-loop` does.

python docs/scripts/loop_picture.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mergekit_imm.loop.state import Settings, State
from mergekit_imm.views.loop_summary import plot

DOCS = Path(__file__).resolve().parents[1]
HEAD = "model                 alpha  new  old  loss\n"
NAMES = {"base": "base", "SFT": "{}/sft", "Merge": "{}/merged", "SFT without merges": "{}/baseline"}


def state(page: str) -> State:
    """Return the loop that printed the table."""
    _, _, rest = page.partition(HEAD)
    metrics, alphas = {}, {}
    for line in rest.partition("\npictures:")[0].splitlines():
        *title, new, old, loss = line.split()
        alpha = title.pop() if title[0] == "Merge" else None
        number = title.pop() if title[-1].isdigit() else ""
        metrics[NAMES[" ".join(title)].format(number)] = {"new": float(new), "old": float(old), "loss": float(loss)}
        if alpha is not None:
            alphas[number] = float(alpha)
    return State(
        Settings("taught", "{model} {output}", evaluate="{model} {json}", rounds=len(alphas), baseline=True),
        "",
        metrics=metrics,
        alphas=alphas,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        plot(state((DOCS / "loop.md").read_text(encoding="utf-8")), Path(folder))
        shutil.copy(Path(folder) / "metrics.png", DOCS / "loop-metrics.png")
