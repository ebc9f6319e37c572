"""Which predicts forgetting: how far weights moved, or KL(base || model)? Models of examples/self_improvement.

    python docs/scripts/forgetting.py [--check]                    renews table and picture of docs/kl.md
    python docs/scripts/forgetting.py --measure FOLDER SEED...     trains and measures again: minutes for each seed

For each seed a base learns all eight skills, is fine-tuned in several ways on its own right answers to additions, and
merged. Each model's weights are compared with the base's, its predictions on the base's own answers to other additions,
and its accuracy in the seven other skills.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from pages import DOCS, update

SCRIPTS = Path(__file__).resolve().parent
EXAMPLE = SCRIPTS.parents[1] / "examples" / "self_improvement"
RESULTS = SCRIPTS / "forgetting.json"
# label -> round of the data and of the start, options of sft.py; or of the merge of the first model with the base
TRAINED: dict[str, tuple[int, str]] = {
    "STaR, round 0": (0, ""),
    "STaR, round 1": (1, ""),
    "STaR, round 2": (2, ""),
    "lr / 2": (0, "--lr 2.5e-4"),
    "lr / 5": (0, "--lr 1e-4"),
    "steps / 5": (0, "--steps 20"),
    "a quarter of old data": (0, "--mixture 0.25"),
    "half of old data": (0, "--mixture 0.5"),
}
MERGED = {
    "alpha .3": {"alpha": 0.3, "drop": 0.2},
    "alpha .5": {"alpha": 0.5, "drop": 0.2},
    "alpha .7": {"alpha": 0.7, "drop": 0.2},
    "alpha .5, drop .9": {"alpha": 0.5, "drop": 0.9},
}
OLD = ("a quarter of old data", "half of old data")  # they see the other skills


def call(script: str, *arguments: object) -> None:
    """Run a script of the example in this process, unless what it makes is there."""
    words = list(map(str, arguments))
    made = next(words[i + 1] for i, word in enumerate(words) if word in ("--output", "--json"))
    if not Path(made).exists():
        sys.argv = [script, *words]
        runpy.run_path(str(EXAMPLE / script), run_name="__main__")


def measure(folder: Path, seed: int) -> dict[str, Any]:
    from mergekit_imm import merge_checkpoints

    here = folder / str(seed)
    here.mkdir(parents=True, exist_ok=True)
    base = here / "base"
    call("pretrain.py", "--output", base, "--seed", seed)
    models = {"base": base}
    for label, (number, options) in TRAINED.items():
        start = models[f"STaR, round {number - 1}"] if number else base
        own, out = here / f"own-{number}.jsonl", here / label.replace(" / ", "-by-").replace(" ", "-")
        call("sample.py", "--model", start, "--output", own, "--round", number, "--seed", seed)
        at = ("--round", number, "--seed", seed, *options.split())
        call("sft.py", "--model", start, "--data", own, "--output", out, *at)
        models[label] = out
    for label, options in MERGED.items():
        out = here / label.replace(" ", "-")
        if not out.exists():
            merge_checkpoints(base, models["STaR, round 0"], out, seed=seed, **options)
        models[label] = out
    found = {}
    for label, model in models.items():
        numbers = here / f"{model.name}.json"
        call("evaluate.py", "--model", model, "--base", base, "--json", numbers, "--questions", 200, 100)
        found[label] = json.loads(numbers.read_text())
        print(seed, label, found[label], flush=True)
    return found


def ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def rho(one: list[float], other: list[float]) -> float:
    """Spearman's rank correlation."""
    import numpy as np

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def lost(found: dict[str, Any], label: str) -> float:
    change: float = found["base"]["out"] - found[label]["out"]
    return change


def table() -> str:
    seeds = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| model | moved | KL | in: change | out: change |", "|---|---|---|---|---|"]
    for label in (*TRAINED, *MERGED):
        of = [each[label] for each in seeds.values()]
        mean = {key: sum(one[key] for one in of) / len(of) for key in ("moved", "kl")}
        change = {
            key: sum(each[label][key] - each["base"][key] for each in seeds.values()) / len(seeds)
            for key in ("in", "out")
        }
        name = label if label in TRAINED else f"merged, {label}"
        lines.append(
            f"| {name} | {mean['moved']:.3f} | {mean['kl']:.4f} | {change['in']:+.1f} | {change['out']:+.1f} |"
        )
    return "\n".join(lines)


def correlations() -> str:
    seeds = json.loads(RESULTS.read_text(encoding="utf-8"))
    every = [*TRAINED, *MERGED]
    lines = ["| rank correlation with the loss out of domain | KL, a seed each | moved, a seed each |", "|---|---|---|"]
    for name, labels in (
        (f"all {len(every)} models", every),
        ("without old data", [label for label in every if label not in OLD]),
    ):
        cells = [
            ", ".join(
                f"{rho([each[label][key] for label in labels], [lost(each, label) for label in labels]):+.2f}"
                for each in seeds.values()
            )
            for key in ("kl", "moved")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw() -> None:
    """Draw the loss out of domain against both measures."""
    from matplotlib import style
    from matplotlib.figure import Figure

    seeds = json.loads(RESULTS.read_text(encoding="utf-8"))
    kinds = {
        "merged": list(MERGED),
        "fine-tuned": [label for label in TRAINED if label not in OLD],
        "fine-tuned, with old data": list(OLD),
    }
    with style.context(Path(__file__).with_name("pictures.mplstyle")):
        figure = Figure(figsize=(8, 3.6))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in zip(
            panels, ("kl", "moved"), ("KL(base || model), nats per token", "moved"), strict=True
        ):
            for kind, marker in zip(kinds, "o^s", strict=True):
                points = [(each[label][key], lost(each, label)) for each in seeds.values() for label in kinds[kind]]
                axes.scatter(*zip(*points, strict=True), marker=marker, s=22, label=kind)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(title)
        panels[0].set_ylabel("points lost out of domain")
        panels[0].legend()
        figure.savefig(DOCS / "kl-forgetting.png", metadata={"Software": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        folder = Path(sys.argv[2]).resolve()
        wanted = list(map(int, sys.argv[3:]))
        sys.path.insert(0, str(EXAMPLE))
        for seed in wanted:
            whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            whole[str(seed)] = measure(folder, seed)
            RESULTS.write_text(json.dumps(dict(sorted(whole.items())), indent=1) + "\n", encoding="utf-8")
    else:
        if "--check" not in sys.argv:
            draw()
        update("kl.md", {"forgetting": table(), "correlations": correlations()}, __doc__)
