"""How much of a merge's change 16 bits can hold, on a real model: the table of docs/concepts.md.

    python docs/scripts/rounding.py [--check]                   renews the table from rounding.json
    python docs/scripts/rounding.py --measure BASE SFT [...]    measures again; SFT is sft-LEARNINGRATE

For every weight matrix of the layers: the merged weights m by the formula in float32, rounded; and the part of the
change asked for that they make, <m - base, sft - base> / ||sft - base||^2. With start = base that is 1 - alpha if
nothing is rounded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pages import update

RESULTS = Path(__file__).resolve().parent / "rounding.json"
DIALS = ((0.5, 0.2), (0.5, 0.0), (0.5, 0.5), (0.8, 0.2))


def measure(base: str, sfts: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def weights(folder: str) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return {name: w.detach() for name, w in model.named_parameters() if ".layers." in name and w.ndim == 2}

    found = {}
    theirs = weights(base)
    for sft in sfts:
        mine = weights(sft)
        moved = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
        norm = sum(float(each.square().sum()) for each in theirs.values())
        rows = []
        for stored in (torch.float32, torch.bfloat16):
            for alpha, drop in DIALS:
                made = asked = 0.0
                torch.manual_seed(0)
                for name, b in theirs.items():
                    delta = mine[name].to(stored).float() - b
                    kept = torch.rand_like(b) >= drop
                    merged = alpha * b + (1 - alpha) * (b + kept * delta / (1 - drop))
                    change = merged.to(torch.bfloat16).float() - b
                    made += float((change * delta).sum(dtype=torch.float64))
                    asked += float((delta * delta).sum(dtype=torch.float64))
                rows.append({"sft": str(stored)[6:], "alpha": alpha, "drop": drop, "made": made / asked})
        found[Path(sft).name] = {"moved": (moved / norm) ** 0.5, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    if "--measure" in sys.argv:
        measure(sys.argv[2], sys.argv[3:])
        return
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    head = ["learning rate", "`sft` stored in", *(f"alpha {alpha:g}, drop {drop:g}" for alpha, drop in DIALS)]
    rows = [["", "nothing rounded", *(f"{1 - alpha:.2f}" for alpha, _ in DIALS)]]
    for name, model in found.items():
        for stored in ("float32", "bfloat16"):
            made = {(row["alpha"], row["drop"]): row["made"] for row in model["rows"] if row["sft"] == stored}
            rows.append([name.removeprefix("sft-"), stored, *(f"{made[dial]:.2f}" for dial in DIALS)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
    update("concepts.md", {"rounding": table}, __doc__)


if __name__ == "__main__":
    main()
