"""The self-improvement example: its scripts end to end on a tiny input, and their functions."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "self_improvement"
# Two arms of two rounds, with six questions and two steps, from an existing base.
SMALL = """
import sys
from pathlib import Path
import experiment
experiment.ROUNDS = 2
experiment.ARMS = {
    "imm": experiment.Arm("IMM", "--alpha 0.5 --drop 0.2 --baseline", "--steps 2", 6, evaluate="test", own_start=True),
    "low-lr": experiment.Arm("gentle", "--alpha 0 --drop 0", "--steps 1 --mixture 0.5", 6, accumulate=True),
}
experiment.POOL, experiment.SAMPLES = 6, 3
experiment.QUESTIONS = "--questions 12 8"
experiment.run_seed(0, list(experiment.ARMS), Path(sys.argv[1], "seed-0").resolve(), "")
experiment.collect(Path(sys.argv[1]))
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the example or of its folder `real`."""
    monkeypatch.syspath_prepend(EXAMPLE / "real")
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module


@pytest.mark.thorough
def test_it_runs_from_the_base_to_the_report(example: Any, tmp_path: Path) -> None:
    toy = example("toy")
    base = tmp_path / "seed-0" / "base"
    tokenizer = toy.build_tokenizer()
    model = toy.build_model(tokenizer, layers=1, seed=0)
    learnt = toy.distinct("A", 6, random.Random(0), test=False)  # the questions of sample.py with this seed
    ids, labels = toy.encode(tokenizer, learnt)
    toy.train(model, ids, labels, steps=150, batch=6, lr=1e-2, seed=0)
    toy.save(model, tokenizer, str(base))

    done = subprocess.run([sys.executable, "-c", SMALL, str(tmp_path)], cwd=EXAMPLE, capture_output=True, text=True)
    log = tmp_path / "seed-0" / "log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

    folder = tmp_path / "seed-0" / "imm"
    rows = toy.read_examples(folder / "round-0" / "data")
    assert rows
    assert {row.prompt for row in rows} <= {row.prompt for row in learnt}
    right = {row.prompt: row.answer for row in learnt}
    assert all(row.answer.partition(">")[2] == right[row.prompt].partition(">")[2] for row in rows)
    state = json.loads((folder / "loop.json").read_text())
    assert set(state["metrics"]) == {"base", "0/sft", "0/merged", "1/sft", "1/merged", "1/baseline"}
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["seeds"]["0"]["arms"]["imm"]
    for distance in ("moved", "kl"):
        assert results["seeds"]["0"]["base"][distance] == 0
        assert 0 < found["final"][distance] < found["final STaR"][distance]
    assert found["final"]["in"] == found["metrics"]["1/merged"]["in"]

    report = example("report")
    tables = {name: make(results) for name, make in report.TABLES.items()}
    assert tables["arms"].splitlines()[3].startswith("| STaR | 1 |")
    assert tables["arms"].splitlines()[0].endswith("| moved | KL |")
    for name, draw in report.PICTURES.items():
        draw(results, tmp_path / f"{name}.png")


def test_answers_of_the_toy_are_right(example: Any) -> None:
    toy, rng = example("toy"), random.Random(1)
    solve: dict[str, Callable[[str], object]] = {
        "A": eval,
        "S": eval,
        "D": eval,
        "T": eval,
        "R": lambda t: t[::-1],
        "O": lambda t: "".join(sorted(t)),
        "C": lambda t: t + t[-1],
        "M": lambda t: max(t.split(",")),
    }
    for skill in toy.SKILLS:
        for _ in range(50):
            prompt, answer = toy.draw(skill, rng)
            assert answer.rpartition(">")[2] == f"{solve[skill](prompt[1:-1])}."
    assert toy.columns(482, 119, 1) == "11,10,6>601."


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ("11,10,6>601.", True),
        ("1,1>601.", True),  # only the result counts
        ("601.", True),
        ("11,10,6>601", False),  # no end mark
        ("11,10,6>602.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_by_its_result(example: Any, given: str, same: bool) -> None:
    assert example("toy").same_result(given, "11,10,6>601.") is same


def test_no_question_is_both_trained_on_and_tested_or_held_out_and_reported(example: Any) -> None:
    toy, evaluate = example("toy"), example("evaluate")
    test, held_out = (evaluate.questions(part, 60, 30) for part in ("test", "held-out"))
    trained = {row.prompt for row in toy.training_mix(4000, random.Random(0))}
    trained |= {row.prompt for row in toy.distinct("A", 600, random.Random(0), test=False)}
    for skill in toy.SKILLS:
        one, other = ({row.prompt for row in part[skill]} for part in (test, held_out))
        assert len(one) == len(other) == (60 if skill == "A" else 30)
        assert not one & other
        if skill != "D":  # there are 800 remainders in all
            assert not (one | other) & trained


def test_differences_are_of_the_same_seed_and_have_their_interval(example: Any) -> None:
    report = example("report")
    seeds = {
        str(n): {"base": {"in": 10.0 * n, "out": 0.0}, "arms": {"low-lr": {"final": {"in": 10.0 * n + n, "out": 0.0}}}}
        for n in (1, 2, 3)
    }
    seeds["4"] = {"base": {"in": 99.0, "out": 0.0}, "arms": {}}
    values = report.differences({"seeds": seeds}, "low-lr", "base", report.MEASURES["in"])
    assert values == [1, 2, 3]
    assert report.differences({"seeds": seeds}, "base", "low-lr", report.MEASURES["in"]) == [-1, -2, -3]
    assert report.spread(values) == "+2.0 ± 1.0"
    assert report.interval(values) == "+2.0 [-0.5, +4.5]"  # 4.30 / sqrt(3)
    assert report.interval([2.0, 2.1, 2.2]).startswith("**+2.1 [")
