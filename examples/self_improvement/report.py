"""Tables and pictures of what experiment.py found: `python report.py RESULTS.json --pictures FOLDER`.

A difference is always one of two models of the same seed, and so of the same base; ± is its sample standard deviation
over the seeds, and brackets hold the 95 % interval of its mean (Student's t).
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))

from experiments import Row, draw_rows, markdown, show, where

Results = Mapping[str, Any]
Measure = Callable[[Mapping[str, Any]], float]
BASE, STAR, IMM, GENTLE, STOPPED = "base", "star", "imm", "low-lr", "stopped"
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # by the number of seeds
MEASURES: dict[str, Measure] = {
    "in": lambda final: final["in"],
    "out": lambda final: final["out"],
    "average": lambda final: (final["in"] + final["out"]) / 2,
    "moved": lambda final: final["moved"],
}


def finals(results: Results, arm: str) -> dict[str, Mapping[str, Any]]:
    """Return the scores of an arm's last model by seed; `star-250` is STaR with the questions of `imm-250`."""
    name, kind = (arm.replace(STAR, IMM), "final STaR") if arm.startswith(STAR) else (arm, "final")
    seeds = results["seeds"].items()
    if arm == BASE:
        return {seed: found["base"] for seed, found in seeds}
    return {seed: found["arms"][name][kind] for seed, found in seeds if name in found["arms"]}


def labels(results: Results, questions: int) -> dict[str, str]:
    """Return the arms with so many questions, by name, STaR first."""
    arms = {name: arm["label"] for name, arm in results["arms"].items() if arm["questions"] == questions}
    star = {name.replace(IMM, STAR): "STaR" for name in arms if name in (IMM, f"{IMM}-{questions}")}
    return star | arms


def differences(results: Results, arm: str, other: str, measure: Measure) -> list[float]:
    """Return arm - other for each seed that has both."""
    ours, theirs = finals(results, arm), finals(results, other)
    return [measure(ours[seed]) - measure(theirs[seed]) for seed in ours if seed in theirs]


def spread(values: list[float]) -> str:
    """Show a mean of differences ± their standard deviation."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else ""
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f}"


def interval(values: list[float]) -> str:
    """Show a mean of differences with its 95 % interval, in bold if that excludes 0."""
    if len(values) < 2:
        return spread(values)
    mean = statistics.mean(values)
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    text = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    return f"**{text}**" if abs(mean) > half else text


def average(found: Iterable[float], digits: int = 1) -> str:
    values = list(found)
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def arms_table(results: Results) -> str:
    """Show the last model of every arm: scores, change from its own base, distance and KL from the base."""
    has_kl = all("kl" in final for final in finals(results, BASE).values())  # earlier results have none
    rows = []
    for arm, label in {BASE: "base", **labels(results, results["questions"])}.items():
        found = finals(results, arm).values()
        row = [label, str(len(found)), average(f["in"] for f in found), average(f["out"] for f in found)]
        changes = [spread(differences(results, arm, BASE, MEASURES[part])) for part in ("in", "out", "average")]
        row += [""] * 3 if arm == BASE else changes
        row.append(average((f["moved"] for f in found), 3))
        rows.append([*row, average((f["kl"] for f in found), 3)] if has_kl else row)
    head = ["", "seeds", "in", "out", "in: change", "out: change", "average: change", "moved"]
    return markdown([*head, "KL"] if has_kl else head, rows)


def gentle_table(results: Results) -> str:
    """Show the difference between each arm and gentle training, the same stopped by the held-out score, and IMM."""
    known = labels(results, results["questions"])
    columns = [(GENTLE, part) for part in ("in", "out", "average")] + [(STOPPED, "average"), (IMM, "average")]
    columns = [(other, part) for other, part in columns if other in known]
    rows = [
        [label, *("" if arm == o else interval(differences(results, arm, o, MEASURES[part])) for o, part in columns)]
        for arm, label in known.items()
    ]
    return markdown(["", *(f"{part}: less {known[other]}" for other, part in columns)], rows)


def pass_table(results: Results) -> str:
    """Show pass@1 and pass@8 from sampled answers."""
    many = f"pass@{results['samples']}"
    measures: list[Measure] = [lambda final: final[many]["in"], lambda final: final[many]["out"]]
    rows = []
    for arm, label in {BASE: "base", **labels(results, results["questions"])}.items():
        found = list(finals(results, arm).values())
        row = [average(f[k][part] for f in found) for part in ("in", "out") for k in ("pass@1", many)]
        row += ["" if arm == BASE else spread(differences(results, arm, BASE, measure)) for measure in measures]
        row += ["" if arm == GENTLE else interval(differences(results, arm, GENTLE, m)) for m in measures]
        rows.append([label, *row])
    k, gentle = many[4:], labels(results, results["questions"]).get(GENTLE, "")
    head = ["in @1", f"in {k}", "out @1", f"out {k}", f"in {k}: change", f"out {k}: change"]
    return markdown(["", *head, f"in {k}: less {gentle}", f"out {k}: less {gentle}"], rows)


def skills_table(results: Results) -> str:
    """Show each skill's greedy accuracy, a mean over the seeds."""
    skills = list(next(iter(finals(results, BASE).values()))["skill"])
    rows = []
    for arm, label in {BASE: "base", **labels(results, results["questions"])}.items():
        found = list(finals(results, arm).values())
        rows.append([label, *(average((f["skill"][skill] for f in found), 0) for skill in skills)])
    return markdown(["", *skills], rows)


def pools_table(results: Results) -> str:
    """Show STaR, IMM and gentle training with each number of questions."""
    rows = []
    for questions in sorted({arm["questions"] for arm in results["arms"].values()}):
        for arm, label in labels(results, questions).items():
            if arm.partition("-")[0] in (STAR, IMM) or arm.startswith(GENTLE):
                parts = [spread(differences(results, arm, BASE, MEASURES[part])) for part in ("in", "out", "average")]
                rows.append([str(questions), label, str(len(finals(results, arm))), *parts])
    return markdown(["questions", "", "seeds", "in: change", "out: change", "average: change"], rows)


def rounds_of(results: Results, kind: str, part: str) -> list[list[float]]:
    """Return a score over the rounds, for each seed; kind is sft, merged or baseline."""
    found = []
    for seed in results["seeds"].values():
        metrics = seed["arms"][IMM]["metrics"]
        keys = ["0/sft" if (kind, n) == ("baseline", 0) else f"{n}/{kind}" for n in range(results["rounds"])]
        found.append([metrics[key][part] for key in keys])
    return found


def rounds_table(results: Results) -> str:
    """Show STaR and IMM over the rounds, as means over the seeds of the change from the base."""
    rows = []
    bases = {part: [seed["base"][part] for seed in results["seeds"].values()] for part in ("in", "out")}
    for kind, label in (("baseline", "STaR"), ("sft", "IMM, before the merge"), ("merged", "IMM, merged")):
        row = [label]
        for part in ("in", "out"):
            each = rounds_of(results, kind, part)
            row += [
                spread([s[number] - b for s, b in zip(each, bases[part], strict=True)])
                for number in range(results["rounds"])
            ]
        rows.append(row)
    numbers = range(results["rounds"])
    return markdown(["", *(f"{part}, round {n}" for part in ("in", "out") for n in numbers)], rows)


def layers_of(results: Results) -> tuple[list[float], list[float]]:
    """Return each layer's share of importance, and its relative change by fine-tuning; means over the seeds."""
    shares, changes = [], []
    for seed in results["seeds"].values():
        importance = seed["importance"]
        shares.append([100 * value / sum(importance.values()) for value in importance.values()])
        layers = seed["arms"][IMM]["layers"]
        changes.append([100 * layers[name]["delta_norm"] / layers[name]["base_norm"] for name in importance])
    return [statistics.mean(c) for c in zip(*shares, strict=True)], [
        statistics.mean(c) for c in zip(*changes, strict=True)
    ]


def layers_table(results: Results) -> str:
    """Show importance and change by layer."""
    rows = [
        [str(number), f"{share:.0f} %", f"{change:.1f} %"]
        for number, (share, change) in enumerate(zip(*layers_of(results), strict=True))
    ]
    return markdown(["layer", "share of importance", "change by fine-tuning, of the layer's norm"], rows)


def held_out_table(results: Results) -> str:
    """Show which alphas the held-out score chose."""
    rows = []
    for seed, found in results["seeds"].items():
        if arm := found["arms"].get("held-out"):
            accepted = len(arm["alphas"]) - bool(arm["stopped"])
            alphas = ", ".join(f"{alpha:g}" for alpha in list(arm["alphas"].values())[:accepted])
            ended = "stopped there: no alpha was accepted" if arm["stopped"] else "all rounds"
            rows.append([seed, alphas or "none", ended])
    return markdown(["seed", "alpha of each round", ""], rows)


def colour(arm: str, label: str) -> str:
    """Blue for what merges, green for gentle training, orange for training as it is."""
    return "C0" if "IMM" in label else "C2" if arm in (GENTLE, STOPPED, "early-stop") else "C1"


def draw_arms(results: Results) -> Figure:
    """Plot every arm's change, in domain and out of domain, a row for each."""
    rows = []
    for arm, label in labels(results, results["questions"]).items():
        inside, out = (differences(results, arm, BASE, MEASURES[part]) for part in ("in", "out"))
        rows.append(Row(label, colour(arm, label), (with_error(inside), with_error(out))))
    return draw_rows(
        rows, f"change from the base after {results['rounds']} rounds, points (bars: one standard error over the seeds)"
    )


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def draw_rounds(results: Results) -> Figure:
    """Plot STaR and IMM over the rounds, a thin line for each seed."""
    figure = Figure(figsize=(8, 3.6))
    for column, (part, title) in enumerate((("in", "in domain"), ("out", "out of domain")), start=1):
        axes = figure.add_subplot(1, 2, column)
        bases = [seed["base"][part] for seed in results["seeds"].values()]
        for kind, label, tone in (("baseline", "STaR", "C1"), ("merged", "IMM", "C0")):
            each = [
                [0.0, *(value - base for value in values)]
                for values, base in zip(rounds_of(results, kind, part), bases, strict=True)
            ]
            for values in each:
                axes.plot(values, color=tone, lw=0.8, alpha=0.5)
            axes.plot([statistics.mean(c) for c in zip(*each, strict=True)], "o-", color=tone, label=label)
        axes.set_xticks(range(results["rounds"] + 1))
        axes.set_xlabel("rounds done")
        axes.set_title(f"{title}: change from the base, points")
        axes.legend()
    return figure


def draw_layers(results: Results) -> Figure:
    """Plot importance and change by layer."""
    figure = Figure(figsize=(8, 3))
    titles = ("share of importance, %", "change by fine-tuning, % of the layer's norm")
    for column, (title, values) in enumerate(zip(titles, layers_of(results), strict=True), start=1):
        axes = figure.add_subplot(1, 2, column)
        axes.bar(range(len(values)), values, color="C0")
        axes.set_xticks(range(len(values)))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("layer")
        axes.set_title(title)
    return figure


TABLES: dict[str, Callable[[Results], str]] = {
    "arms": arms_table,
    "gentle": gentle_table,
    "rounds": rounds_table,
    "pass": pass_table,
    "skills": skills_table,
    "pools": pools_table,
    "layers": layers_table,
    "held-out": held_out_table,
    "where": lambda results: where(results, results["seeds"]),
}
PICTURES = {"arms": draw_arms, "rounds": draw_rounds, "layers": draw_layers}


def tables(results: Results) -> dict[str, str]:
    """Make all tables; those of one arm alone if no other was run."""
    wanted = ["where", "rounds", "arms"] if list(results["arms"]) == [IMM] else list(TABLES)
    return {name: TABLES[name](results) for name in wanted}


def draw(results: Results) -> dict[str, Figure]:
    """Draw all pictures."""
    return {f"self-improvement-{name}": make(results) for name, make in PICTURES.items()}


if __name__ == "__main__":
    show(__doc__, tables, draw)
