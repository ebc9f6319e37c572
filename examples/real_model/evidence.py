"""Tables and pictures of what arms.py found: `python evidence.py results.json --pictures FOLDER`.

All models are tested on the same questions, so a difference of two arms is paired: by seed, and by question. Its 95 %
interval has both sources of chance: SE^2 = var(differences of the seeds) / seeds + sum over tasks of var(differences of
the questions, mean over the seeds) / questions / tasks^2, and Student's t with the degrees of freedom of Welch and
Satterthwaite.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))

from experiments import Row, draw_rows, markdown, show, where

Results = Mapping[str, Any]
Values = npt.NDArray[np.float64]
BASE, STAR, IMM, GENTLE, CHOSEN = "base", "star", "imm", "low-lr", "chosen"
COMPARED = (
    *((IMM, control) for control in (STAR, GENTLE, "half-lr", "pull", "best", "mixture", "from-base")),
    *((CHOSEN, control) for control in (GENTLE, "pull", "best")),
    *((kind, IMM) for kind in (CHOSEN, "no-drop", "importance")),
    *((control, STAR) for control in (GENTLE, "half-lr", "pull", "best", "mixture")),
    ("pull", GENTLE),
)
INSIDE = "sums"
THIRDS = ("early", "middle", "late")
MERGED, PLAIN, CONTROL, GREY = "C0", "C1", "C2", "0.5"  # colours


class Difference(NamedTuple):
    mean: float
    half: float  # of its 95 % interval; nan with one seed, which does not tell how much seeds differ

    def __str__(self) -> str:
        if math.isnan(self.half):
            return "" if math.isnan(self.mean) else f"{self.mean:+.1f}"
        text = f"{self.mean:+.1f} [{self.mean - self.half:+.1f}, {self.mean + self.half:+.1f}]"
        return f"**{text}**" if abs(self.mean) > self.half else text


def seeds_with(results: Results, *arms: str) -> list[str]:
    """Return the seeds that have all of these arms."""
    return [seed for seed, found in results["seeds"].items() if set(arms) <= {BASE, *found["arms"]}]


def models(results: Results, arm: str, seeds: Iterable[str]) -> list[Mapping[str, Any]]:
    """Return the scores of an arm's last model, for each seed; of the base, the same for all."""
    return [results[BASE] if arm == BASE else results["seeds"][seed]["arms"][arm]["test"] for seed in seeds]


def scores(results: Results, arm: str) -> list[Mapping[str, Any]]:
    """Return the scores of an arm's last model, for each seed that has it."""
    return models(results, arm, seeds_with(results, arm))


def outside(results: Results) -> list[str]:
    """Return the tasks out of domain that are scored in percent."""
    return [
        name
        for name, found in results["base"].items()
        if isinstance(found, dict) and "right" in found and name != INSIDE
    ]


def right(found: Mapping[str, Any], task: str) -> Values:
    """Return which questions a model answers, as 0 and 100."""
    return 100 * (np.frombuffer(found[task]["right"].encode(), np.uint8) - ord("0")).astype(np.float64)


def difference(results: Results, arm: str, other: str, tasks: Iterable[str]) -> Difference:
    """Return arm - other in percent, a plain mean over tasks, by the seeds that have both."""
    seeds_of_both = seeds_with(results, arm, other)
    pairs = list(zip(models(results, arm, seeds_of_both), models(results, other, seeds_of_both), strict=True))
    if not pairs:
        return Difference(math.nan, math.nan)
    each = [np.array([right(one, task) - right(two, task) for one, two in pairs]) for task in tasks]
    by_seed = np.mean([task.mean(axis=1) for task in each], axis=0)
    seeds, count = len(pairs), sum(task.shape[1] for task in each)
    if seeds < 2:
        return Difference(float(by_seed[0]), math.nan)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_questions = sum(float(task.mean(axis=0).var(ddof=1)) / task.shape[1] for task in each) / len(each) ** 2
    total = of_seeds + of_questions
    spread = of_seeds**2 / (seeds - 1) + of_questions**2 / (count - 1)
    return Difference(float(by_seed.mean()), t95(total**2 / spread) * math.sqrt(total) if total else 0.0)


def both_sides(results: Results, arm: str, other: str) -> tuple[Difference, Difference]:
    """Return arm - other in domain, and out of domain."""
    return difference(results, arm, other, [INSIDE]), difference(results, arm, other, outside(results))


def t95(freedom: float) -> float:
    """Return the two-sided 95 % point of Student's t."""
    x = np.linspace(0, 100, 200_001)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    below = (np.cumsum(density) - (density + density[0]) / 2) * (x[1] - x[0])
    return float(x[np.searchsorted(below, 0.475)])


def mean(results: Results, arm: str, value: Callable[[Mapping[str, Any]], float]) -> float:
    return float(np.mean([value(found) for found in scores(results, arm)]))


def labels(results: Results) -> dict[str, str]:
    return {name: arm["label"] for name, arm in results["arms"].items() if seeds_with(results, name)}


def arms_table(results: Results) -> str:
    """Show each arm's last model: change from the base, and how far it went."""
    tasks = outside(results)
    base = results[BASE]
    at = (base[INSIDE]["accuracy"], np.mean([base[task]["accuracy"] for task in tasks]))
    rows = [["base", "", *(f"{value:.1f}" for value in at), "", "", ""]]
    for arm, label in labels(results).items():
        inside, out = both_sides(results, arm, BASE)
        far = mean(results, arm, lambda found: 1000 * found["to base"]["moved"])
        kl = mean(results, arm, lambda found: found["kl"])
        seeds = str(len(seeds_with(results, arm)))
        rows.append(
            [label, seeds, str(inside), str(out), f"{(inside.mean + out.mean) / 2:+.1f}", f"{far:.2f}", f"{kl:.3f}"]
        )
    return markdown(["", "seeds", "in domain", "out of domain", "average", "moved, ‰", "KL"], rows)


def against_table(results: Results) -> str:
    """Show differences of arms: of merging and its controls, and of kinds of merging."""
    known = labels(results)
    rows = []
    for arm, other in COMPARED:
        if seeds_with(results, arm, other):
            seeds = str(len(seeds_with(results, arm, other)))
            rows.append([known[arm], known[other], seeds, *map(str, both_sides(results, arm, other))])
    return markdown(["", "less", "seeds", "in domain", "out of domain"], rows)


def tasks_table(results: Results) -> str:
    """Show every task: accuracy in percent, a mean over the seeds, and perplexity."""
    tasks = [INSIDE, *outside(results)]
    rows = []
    for arm, label in {BASE: "base", **labels(results)}.items():
        row = [f"{np.mean([found[task]['accuracy'] for found in scores(results, arm)]):.0f}" for task in tasks]
        rows.append([label, *row, f"{mean(results, arm, lambda found: found['text']['perplexity']):.1f}"])
    return markdown(["", *tasks, "perplexity"], rows)


def pass_table(results: Results) -> str:
    """Show pass@1, pass@8 and calibration."""
    rows = []
    many = next(key for key in results["base"][INSIDE] if key.startswith("pass@") and key != "pass@1")
    for arm, label in {BASE: "base", **labels(results)}.items():
        found = scores(results, arm)
        row = [np.mean([each[INSIDE][key] for each in found]) for key in ("pass@1", many, "ece")]
        row.append(np.mean([each["choices"]["ece"] for each in found]))
        rows.append([label, f"{row[0]:.1f}", f"{row[1]:.1f}", f"{100 * row[2]:.1f}", f"{100 * row[3]:.1f}"])
    return markdown(["", "pass@1", many, "calibration error, %", "of multiple choice"], rows)


def rounds_table(results: Results) -> str:
    """Show accuracy on the held-out questions over the rounds."""
    rows = []
    for arm, label in labels(results).items():
        each = [results["seeds"][seed]["arms"][arm]["rounds"] for seed in seeds_with(results, arm)]
        each = [one for one in each if len(one) == results["rounds"]]
        if each:
            cells = [
                f"{np.mean([one[number]['mean'][part] for one in each]):.1f}"
                for part in ("in", "out")
                for number in each[0]
            ]
            rows.append([label, *cells])
    return markdown(["", *(f"{part}, round {n}" for part in ("in", "out") for n in range(results["rounds"]))], rows)


def tried(results: Results) -> dict[str, list[dict[str, Mapping[str, float]]]]:
    """Return the held-out scores of each alpha of the arm that chooses: for each round, by the seeds that tried it."""
    found = {seed: results["seeds"][seed]["arms"][CHOSEN]["held-out"] for seed in seeds_with(results, CHOSEN)}
    names = {name.partition("/alpha-")[2] for one in found.values() for name in one if "/alpha-" in name}
    rounds = range(results["rounds"])

    def scored(name: str) -> list[dict[str, Mapping[str, float]]]:
        return [{seed: one[f"{n}/{name}"] for seed, one in found.items() if f"{n}/{name}" in one} for n in rounds]

    before = scored("sft")
    bases = [{seed: found[seed][BASE] for seed in each} for each in before]
    return {"0": before, **{alpha: scored(f"alpha-{alpha}") for alpha in sorted(names, key=float)}, "1": bases}


def middle(scores: Mapping[str, Mapping[str, float]], part: str) -> float:
    return float(np.mean([one[f"mean.{part}"] for one in scores.values()]))


def alphas_table(results: Results) -> str:
    """Show the held-out scores of every alpha that was tried, and how many seeds chose it."""
    chosen = [results["seeds"][seed]["arms"][CHOSEN]["alphas"] for seed in seeds_with(results, CHOSEN)]
    rows = []
    for alpha, rounds in tried(results).items():
        row = [{"0": "0: before the merge", "1": "1: the base"}.get(alpha, alpha)]
        for number, each in enumerate(rounds):
            row += [f"{middle(each, part):.1f}" if each else "" for part in ("in", "out")]
            chose = sum(one.get(str(number)) == float(alpha) for one in chosen)
            row[-1] += f" ({chose})" if chose else ""
        rows.append(row)
    head = (f"{part}, round {number}" for number in range(results["rounds"]) for part in ("in", "out"))
    return markdown(["alpha", *head], rows)


def beaten_table(results: Results) -> str:
    """Count the merges, one for each alpha, round and seed, that score better than the model before the merge."""
    rounds = tried(results)
    alphas = [alpha for alpha in rounds if 0 < float(alpha) < 1]
    rows = []
    for part, label in (("in", "in domain"), ("out", "out of domain")):
        for alpha in alphas:
            pairs = [
                (merged[f"mean.{part}"], before[f"mean.{part}"])
                for number, each in enumerate(rounds[alpha])
                for merged, before in ((each[seed], rounds["0"][number][seed]) for seed in each)
            ]
            counts = (sum(a > b for a, b in pairs), sum(a == b for a, b in pairs), sum(a < b for a, b in pairs))
            rows.append([label, alpha, *map(str, counts)])
    return markdown(["", "alpha", "better", "equal", "worse"], rows)


def points(results: Results) -> list[tuple[str, float, float, float, float, float]]:
    """Return for each model of each arm and seed: arm, change out of domain and in it, KL, distance, perplexity."""
    tasks = outside(results)
    base = results[BASE]
    found = []
    for arm in labels(results):
        for each in scores(results, arm):
            out = float(np.mean([each[task]["accuracy"] - base[task]["accuracy"] for task in tasks]))
            gain = each[INSIDE]["accuracy"] - base[INSIDE]["accuracy"]
            found.append((arm, out, gain, each["kl"], each["to base"]["moved"], each["text"]["perplexity"]))
    return found


def rank_correlation(one: Iterable[float], two: Iterable[float]) -> float:
    """Return Spearman's rank correlation of values without ties."""
    x, y = (np.argsort(np.argsort(np.array(list(values)))).astype(np.float64) for values in (one, two))
    return float(np.corrcoef(x, y)[0, 1])


def predictors_table(results: Results) -> str:
    """Show what predicts the loss out of domain, over all last models."""
    found = points(results)
    lost = [-out for _, out, *_ in found]
    rows = [
        ["KL to the base, in domain", f"{rank_correlation([kl for *_, kl, _, _ in found], lost):.2f}"],
        ["distance of the weights", f"{rank_correlation([far for *_, far, _ in found], lost):.2f}"],
        ["perplexity", f"{rank_correlation([perplexity for *_, perplexity in found], lost):.2f}"],
        ["gain in domain", f"{rank_correlation([gain for _, _, gain, *_ in found], lost):.2f}"],
    ]
    return markdown(["", f"rank correlation with the loss out of domain, {len(found)} models"], rows)


TRAINED_ON = {
    "star/round-0/sft": "own right answers, round 0",
    "star/round-2/merged": "own right answers, round 2",
    "ordinary-right-answers": "all right answers, as given",
    "ordinary-text": "ordinary text",
}
MEASURED_ON = {"answers": "own right answers", "text": "ordinary text"}


def diagnoses(results: Results) -> list[Mapping[str, Any]]:
    """Return the diagnosis of each seed that has one."""
    return [found["diagnosis"] for found in results["seeds"].values() if "diagnosis" in found]


def mismatch_table(results: Results) -> str:
    """Show importance against change over the layers, by the data of training and of importance."""
    rows = []
    for model, label in TRAINED_ON.items():
        for data, measured in MEASURED_ON.items():
            each = [found["change"][data][model]["mismatch"] for found in diagnoses(results)]
            rhos = [f"{one['rho']['value']:+.2f} [{one['rho']['low']:+.2f}, {one['rho']['high']:+.2f}]" for one in each]
            thirds = [
                ", ".join(f"{100 * np.mean([one['thirds'][third][key] for one in each]):.0f} %" for third in THIRDS)
                for key in ("importance", "change")
            ]
            verdicts = ", ".join(sorted({one["verdict"].partition(":")[0] for one in each}))
            rows.append([label, measured, ", ".join(rhos), *thirds, verdicts])
    head = [
        "fine-tuned on",
        "importance on",
        "rho, a seed each",
        "importance, by thirds",
        "change, by thirds",
        "verdict",
    ]
    return markdown(head, rows)


def colour(arm: str, label: str) -> str:
    return MERGED if "IMM" in label else PLAIN if arm in (STAR, "from-base") else CONTROL


def draw_arms(results: Results) -> Figure:
    """Plot every arm's change, in domain and out of domain, a row for each."""
    rows = []
    for arm, label in labels(results).items():
        seeds = "" if len(seeds_with(results, arm)) > 1 else " (1 seed)"
        rows.append(Row(f"{label}{seeds}", colour(arm, label), both_sides(results, arm, BASE)))
    return draw_rows(rows, f"change from the base after {results['rounds']} rounds, points (bars: 95 % intervals)")


def draw_alphas(results: Results) -> Figure:
    """Plot, for each round, the held-out scores from the model before the merge to the base, by alpha."""
    figure = Figure(figsize=(8, 3.6))
    panels: Any = figure.subplots(1, results["rounds"], sharex=True, sharey=True, squeeze=False)[0]
    for number, axes in enumerate(panels):
        at = {
            alpha: [middle(rounds[number], part) for part in ("in", "out")]
            for alpha, rounds in tried(results).items()
            if rounds[number]
        }
        axes.plot(*zip(*at.values(), strict=True), "-o", ms=4, color=MERGED)
        for alpha, (kind, label) in {"0": (PLAIN, "before the merge"), "1": (GREY, "base")}.items():
            if alpha in at:
                axes.plot(*at[alpha], "o", ms=6, color=kind, label=label)
        for alpha, (x, y) in at.items():
            if alpha not in ("0", "1"):
                axes.annotate(alpha, (x, y), (5, 4), textcoords="offset points", color=MERGED, fontsize=8)
        axes.set_title(f"round {number}", loc="left", fontsize=10)
        axes.set_xlabel("in domain, %")
    panels[0].set_ylabel("out of domain, %")
    panels[0].legend(fontsize=8)
    return figure


def draw_predictors(results: Results) -> Figure:
    """Plot the loss out of domain against KL and against the distance of the weights."""
    figure = Figure(figsize=(8, 3.6))
    found = points(results)
    axis = (("KL to the base, nats per token", 3), ("distance of the weights, ‰", 4))
    for column, (title, index) in enumerate(axis, start=1):
        axes = figure.add_subplot(1, 2, column)
        for kind, name in ((MERGED, "merged"), (CONTROL, "controls"), (PLAIN, "STaR")):
            some = [each for each in found if colour(each[0], labels(results)[each[0]]) == kind]
            scale = 1000 if index == 4 else 1
            x = [scale * float(each[index]) for each in some]
            axes.plot(x, [each[1] for each in some], "o" if kind == MERGED else "s", ms=4, color=kind, label=name)
        axes.set_xlabel(title)
        axes.set_title("out of domain: change, points" if column == 1 else "", loc="left", fontsize=10)
        if column == 1:
            axes.legend()
    return figure


def pilot_table(results: Results) -> str:
    """Show what one round did at two learning rates, before anything was fixed."""
    pilot = results["pilot"]
    base = pilot[BASE]
    rows = [
        [f"learning rate {name}", *(f"{found[part] - base[part]:+.1f}" for part in ("in", "out"))]
        for name, found in pilot.items()
        if name != BASE
    ]
    return markdown(["one round", "in domain", "out of domain, eight tasks"], rows)


def earlier_table(results: Results) -> str:
    """Show what two arms did in an earlier run, on another machine and with a laxer check of the answers."""
    return arms_table(results["earlier"])


TABLES: dict[str, Callable[[Results], str]] = {
    "real-arms": arms_table,
    "real-against": against_table,
    "real-tasks": tasks_table,
    "real-pass": pass_table,
    "real-rounds": rounds_table,
    "real-alphas": alphas_table,
    "real-beaten": beaten_table,
    "real-predictors": predictors_table,
    "real-mismatch": mismatch_table,
    "real-pilot": pilot_table,
    "real-earlier": earlier_table,
    "real-where": lambda results: where(results, results["seeds"]),
}
NEEDS: dict[str, Callable[[Results], Any]] = {
    "real-alphas": lambda results: seeds_with(results, CHOSEN),
    "real-beaten": lambda results: seeds_with(results, CHOSEN),
    "real-predictors": lambda results: seeds_with(results, GENTLE),  # else there is nothing between the extremes
    "real-mismatch": diagnoses,
    "real-pilot": lambda results: "pilot" in results,
    "real-earlier": lambda results: "earlier" in results,
}
PICTURES = {"real-arms": draw_arms, "real-alphas": draw_alphas, "real-predictors": draw_predictors}


def there(results: Results, names: Iterable[str]) -> list[str]:
    """Return which of these there are results for."""
    return [name for name in names if name not in NEEDS or NEEDS[name](results)]


def tables(results: Results) -> dict[str, str]:
    """Make all tables that there are results for."""
    return {name: TABLES[name](results) for name in there(results, TABLES)}


def draw(results: Results) -> dict[str, Figure]:
    """Draw all pictures that there are results for."""
    return {name.replace("real-", "real-model-"): PICTURES[name](results) for name in there(results, PICTURES)}


if __name__ == "__main__":
    show(__doc__, tables, draw)
