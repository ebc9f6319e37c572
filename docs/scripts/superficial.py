"""Is self-improvement superficial? Loops of examples/self_improvement on models of 12 layers, diagnosed.

    python docs/scripts/superficial.py [--check]             renews the table of docs/change.md from superficial.json
    python docs/scripts/superficial.py --measure FOLDER      trains and measures again: five minutes for each of 3 seeds

For each seed a base learns all eight skills. It is fine-tuned on its own right answers to additions, three rounds in a
row; and, as a control, in as many steps on right answers to questions of all skills, as in pretraining. Importance is
that of the base's layers, on right answers to additions and on those of all skills.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import update

SCRIPTS = Path(__file__).resolve().parent
EXAMPLE = SCRIPTS.parents[1] / "examples" / "self_improvement"
RESULTS = SCRIPTS / "superficial.json"
SEEDS, ROUNDS, LAYERS, QUESTIONS = (0, 1, 2), 3, 12, 600
ARMS = {"own answers, round 0": "sft-0", "own answers, round 2": "sft-2", "all skills, as many steps": "mix"}
DATA = {"additions": "in.jsonl", "all skills": "all.jsonl"}


def call(script: str, *arguments: object) -> None:
    """Run a script of the example, unless what it makes is there."""
    if not Path(str(arguments[arguments.index("--output") + 1])).exists():
        subprocess.run([sys.executable, str(EXAMPLE / script), *map(str, arguments)], check=True)


def measure(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLE))
    from toy import IN_DOMAIN, distinct, training_mix

    from mergekit_imm.analysis.change import checkpoint_change
    from mergekit_imm.analysis.measured import measure_importance
    from mergekit_imm.analysis.verdict import mismatch

    found: dict[str, Any] = {"layers": LAYERS, "arms": {name: {} for name in ARMS}}
    for seed in SEEDS:
        here = folder / str(seed)
        here.mkdir(parents=True, exist_ok=True)
        call("pretrain.py", "--output", here / "base", "--layers", LAYERS, "--seed", seed)
        model = here / "base"
        for number in range(ROUNDS):
            own, sft = here / f"own-{number}.jsonl", here / f"sft-{number}"
            call("sample.py", "--model", model, "--output", own, "--round", number, "--seed", seed)
            call("sft.py", "--model", model, "--data", own, "--output", sft, "--round", number, "--seed", seed)
            model = sft
        rng = random.Random(seed)
        for name, examples in (
            ("in.jsonl", distinct(IN_DOMAIN, QUESTIONS, rng, test=False)),
            ("all.jsonl", training_mix(QUESTIONS, rng)),
            ("mix.jsonl", training_mix(2400, rng)),
        ):
            key = "answer" if name == "mix.jsonl" else "response"
            lines = [json.dumps({"prompt": each.prompt, key: each.answer}) + "\n" for each in examples]
            (here / name).write_text("".join(lines))
        call(
            "sft.py",
            "--model",
            here / "base",
            "--data",
            here / "mix.jsonl",
            "--output",
            here / "mix",
            "--steps",
            300,
            "--seed",
            seed,
        )
        layers = {
            data: measure_importance(
                str(here / "base"), str(here / file), str(here / f"{file}.json"), batch_size=60
            ).importance.layers
            for data, file in DATA.items()
        }
        for name, sft_name in ARMS.items():
            change = checkpoint_change(str(here / "base"), str(here / sft_name))
            verdicts = {data: mismatch(values, change).to_dict() for data, values in layers.items()}
            found["arms"][name][str(seed)] = verdicts
            print(name, seed, {data: each["verdict"] for data, each in verdicts.items()}, flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table() -> str:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    head = ["fine-tuned on", "importance on", "rho of Eq. 4, a seed each", "of the relative change"]
    head += ["importance, by thirds", "change, by thirds"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for name, seeds in found["arms"].items():
        for data in DATA:
            of_data = [each[data] for each in seeds.values()]
            cells = [
                ", ".join(f"{e[key]['value']:+.2f} [{e[key]['low']:+.2f}, {e[key]['high']:+.2f}]" for e in of_data)
                for key in ("rho", "relative")
            ]
            cells += [
                ", ".join(
                    f"{100 * sum(e['thirds'][t][key] for e in of_data) / len(of_data):.0f} %"
                    for t in of_data[0]["thirds"]
                )
                for key in ("importance", "change")
            ]
            lines.append(f"| {name} | {data} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        update("change.md", {"superficial": table()}, __doc__)
