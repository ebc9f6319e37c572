"""How well answers are judged, and how well intervals hold: the tables of docs/evaluation.md.

    python docs/scripts/judging.py [--check]     renews the tables from judging.json
    python docs/scripts/judging.py --measure     measures again: a quarter of an hour

Answers: those of tests/evaluation/judged_answers.json, labelled by hand, judged by `is_correct` and by math-verify
alone. Intervals: how often they hold the true rate, for problems whose rates follow a beta distribution. Reversals: how
often `compare` says so if pass@1 rises and nothing else changes.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pages import update

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "judging.json"
CASES = SCRIPTS.parents[1] / "tests" / "evaluation" / "judged_answers.json"
PROBLEMS, MEANS, DRAWS = (10, 20, 50, 100, 200), (0.5, 0.8, 0.95, 0.99), 1000
KINDS = {"pass@1, one sample": (1, 1), "pass@1, 8 samples": (8, 1), "pass@8, 16 samples": (16, 8)}
RUNS = {100: 400, 400: 100}  # problems -> repetitions of the reversal


def answers() -> dict[str, Any]:
    """Wrong verdicts by kind of case: [cases, ours accepts, ours rejects, alone accepts, alone rejects]."""
    from math_verify import parse, verify

    from mergekit_imm.evaluation import is_correct

    logging.disable(logging.CRITICAL)
    found: dict[str, list[int]] = {}
    for case in json.loads(CASES.read_text(encoding="utf-8"))["cases"]:
        row = found.setdefault(case["kind"], [0] * 5)
        row[0] += 1
        for at, verdict in (
            (1, is_correct(case["response"], case["answer"])),
            (3, bool(verify(parse(f"${case['answer']}$"), parse(case["response"])))),
        ):
            if verdict != case["right"]:
                row[at if verdict else at + 1] += 1
    return found


def coverage() -> dict[str, Any]:
    """Share of intervals that hold the true mean: kind -> problems -> [lowest over the means, and of the bootstrap]."""
    from mergekit_imm.evaluation.passk import pass_at_k
    from mergekit_imm.evaluation.rates import difference_interval, rate_interval

    rng = np.random.default_rng(0)

    def percentile(values: np.ndarray[Any, Any]) -> tuple[float, float]:
        """The percentile bootstrap of a mean, as `bootstrap` has it, with all 500 resamples at once."""
        drawn = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), 500) @ values / len(values)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)

    found: dict[str, Any] = {}
    for kind, (n, k) in KINDS.items():
        table = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
        for problems in PROBLEMS:
            held: list[list[float]] = []
            for mean in MEANS:
                truth = float((1 - (1 - rng.beta(mean, 1 - mean, 10**6)) ** k).mean())
                counts = np.zeros(4)
                for _ in range(DRAWS):
                    rates = rng.beta(mean, 1 - mean, problems)
                    a, b = (table[rng.binomial(n, rates)] for _ in range(2))
                    rate, difference = rate_interval(a), difference_interval(a, b, k=k)
                    intervals = (
                        (truth, rate.low, rate.high),
                        (truth, *percentile(a)),
                        (0.0, difference.low, difference.high),
                        (0.0, *percentile(b - a)),
                    )
                    counts += [low <= true <= high for true, low, high in intervals]
                held.append(list(counts / DRAWS))
            found.setdefault(kind, {})[str(problems)] = np.min(held, axis=0).tolist()
            print(kind, problems, found[kind][str(problems)], flush=True)
    return found


def reversals() -> dict[str, Any]:
    """Problems -> the share of reversals, and of each sign, among the runs in which pass@1 was found to rise."""
    from mergekit_imm.evaluation import Model, Problem, Response, compare

    def model(name: str, problems: int, greedy: float, rng: random.Random) -> Model:
        made = {}
        for number in range(problems):
            rate = random.Random(number).betavariate(1, 1)
            texts = [" ".join(f"w{rng.randrange(40)}" for _ in range(8)) for _ in range(8)]
            sampled = tuple(Response(text, rng.random() < rate) for text in texts)
            made[f"in-{number}"] = Problem(f"in-{number}", None, False, sampled, Response("", rng.random() < greedy))
            level = 1 if number % 2 else 5
            out = Response("", rng.random() < (0.7 if level == 1 else 0.4))
            made[f"out-{number}"] = Problem(f"out-{number}", level, True, (), out)
        return Model(name, made)

    signs = ("diversity_fell", "ood_fell", "disparity_rose", "pass_k_fell")
    found: dict[str, Any] = {}
    for problems, runs in RUNS.items():
        counts: dict[str, int] = dict.fromkeys(("runs", "rose", "reversal", *signs), 0)
        for run in range(runs):
            rng = random.Random(1000 * problems + run)
            pair = [model(name, problems, greedy, rng) for name, greedy in (("before", 0.4), ("after", 0.7))]
            verdict = compare(pair, resamples=400).comparisons[0].verdict
            counts["runs"] += 1
            if verdict.improved:
                counts["rose"] += 1
                counts["reversal"] += bool(verdict.is_reversal)
                for sign in signs:
                    counts[sign] += bool(getattr(verdict, sign))
        found[str(problems)] = counts
        print(problems, counts, flush=True)
    return found


def tables() -> dict[str, str]:
    """The parts of the page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = found["answers"]
    total = [sum(row[at] for row in rows.values()) for at in range(5)]
    lines = [
        "| kind of answer | cases | wrongly accepted | wrongly rejected | math-verify alone: accepted | rejected |"
    ]
    lines.append("|---|---|---|---|---|---|")
    lines += [f"| {kind} | {' | '.join(map(str, row))} |" for kind, row in [*rows.items(), ("all", total)]]
    head = [f"| | intervals | {' | '.join(f'{n} problems' for n in PROBLEMS)} |", "|---" * 7 + "|"]
    covered = []
    for kind, sizes in found["coverage"].items():
        for name, at in (("of a rate", 0), ("of a difference", 2)):
            cells = [
                f"{100 * ours:.0f} ({100 * theirs:.0f})"
                for ours, theirs in (sizes[str(n)][at : at + 2] for n in PROBLEMS)
            ]
            covered.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    named = {
        "reversal": "a reversal",
        "diversity_fell": "diversity fell",
        "ood_fell": "OOD pass@1 fell",
        "disparity_rose": "group disparity rose",
        "pass_k_fell": "pass@k fell",
    }
    sizes = found["reversals"]
    wrong = [
        f"| found, of the runs in which pass@1 rose | {' | '.join(f'{n} problems' for n in sizes)} |",
        "|---|---|---|",
    ]
    for sign, name in named.items():
        cells = [f"{each[sign]} of {each['rose']} ({100 * each[sign] / each['rose']:.1f} %)" for each in sizes.values()]
        wrong.append(f"| {name} | {' | '.join(cells)} |")
    return {"judged": "\n".join(lines), "coverage": "\n".join([*head, *covered]), "reversals": "\n".join(wrong)}


def measure() -> None:
    parts: tuple[Callable[[], dict[str, Any]], ...] = (answers, reversals, coverage)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in parts:
        found[part.__name__] = part()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        measure()
    else:
        update("evaluation.md", tables(), __doc__)
