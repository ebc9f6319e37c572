"""Expected calibration error: the formula, the comparison of models, the picture, refusals."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm import ArgumentError, CheckpointError, MismatchError
from mergekit_imm.evaluation import Report, compare, expected_calibration_error, read_samples
from mergekit_imm.views.samples import FILES, pictures, table

Line = dict[str, Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def naive(confidences: list[float], correct: list[bool], bins: int) -> float:
    """Guo et al. (2017), Eq. 3, bin by bin; intervals are open below, and 0 is in the first."""
    total = 0.0
    for b in range(1, bins + 1):
        low, high = Fraction(b - 1, bins), Fraction(b, bins)
        # A confidence is the decimal as written, not the float next to it.
        here = [i for i, c in enumerate(confidences) if low < Fraction(repr(c)) <= high or (b == 1 and c == 0)]
        if here:
            accuracy = sum(correct[i] for i in here) / len(here)
            confidence = sum(confidences[i] for i in here) / len(here)
            total += len(here) / len(confidences) * abs(accuracy - confidence)
    return total


stated = st.one_of(
    st.integers(0, 100).map(lambda n: n / 100),
    st.floats(0, 1).map(lambda x: round(x, 6)),
)


@given(st.lists(st.tuples(stated, st.booleans()), min_size=1, max_size=40), st.sampled_from([1, 4, 10, 20]))
def test_the_formula(answers: list[tuple[float, bool]], bins: int) -> None:
    confidences, correct = [c for c, _ in answers], [right for _, right in answers]
    found = expected_calibration_error(confidences, correct, bins=bins)
    assert found == pytest.approx(naive(confidences, correct, bins), abs=1e-12)
    assert 0 <= found <= 1
    swapped = expected_calibration_error(confidences[::-1], correct[::-1], bins=bins)
    assert swapped == pytest.approx(found, abs=1e-12)


def test_known_values() -> None:
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1
    assert expected_calibration_error([0.75] * 4, [1, 1, 1, 0]) == 0
    assert expected_calibration_error([0.7, 0.65], [1, 0]) == pytest.approx(0.175)  # one bin: 0.7 ends it
    assert expected_calibration_error([0.7, 0.71], [1, 0]) == pytest.approx(0.505)  # two


@pytest.mark.parametrize(
    ("confidences", "correct", "message"),
    [
        ([], [], "0 confidences and 0 answers"),
        ([0.5], [1, 0], "1 confidences and 2 answers; give one confidence per answer"),
        ([0.5, 80], [1, 0], "a confidence is 80; it must be between 0 and 1"),
        ([0.5, math.nan], [1, 0], "a confidence is nan"),
        ([0.5, 0.5], [1, 2], "correct holds values other than 0 and 1"),
        (["high"], [1], "confidences and correct are not lists of numbers"),
    ],
)
def test_values_out_of_range(confidences: Any, correct: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        expected_calibration_error(confidences, correct)
    with pytest.raises(ArgumentError, match="bins is 0; it must be a whole number, 1 or more"):
        expected_calibration_error([0.5], [1], bins=0)


def made(model: str, sharpness: float, *, problems: int = 40, samples: int = 4, greedy: bool = True) -> list[Line]:
    """Answers that are right with probability p and claim to be with p ** (1 / sharpness)."""
    generator = np.random.default_rng(len(model))
    lines = []
    for number in range(problems):
        for sample in range(samples + greedy):
            p = float(generator.random())
            lines.append(
                {
                    "problem": f"q{number}",
                    "model": model,
                    "response": f"answer {sample}",
                    "correct": bool(generator.random() < p),
                    "confidence": round(p ** (1 / sharpness), 3),
                    "greedy": sample == samples,
                }
            )
    return lines


def report(*models: list[Line], resamples: int = 200) -> Report:
    for number, lines in enumerate(models):
        Path(f"f{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return compare(read_samples([f"f{number}.jsonl" for number in range(len(models))]), resamples=resamples)


def values(lines: list[Line], greedy: bool) -> tuple[list[float], list[bool]]:
    chosen = [line for line in lines if line["greedy"] is greedy]
    return [line["confidence"] for line in chosen], [line["correct"] for line in chosen]


def test_models_are_compared() -> None:
    models = made("one", 1), made("other", 4)
    found = report(*models)
    measures = {m.name: m for m in found.comparisons[0].measures}
    for of, greedy in (("greedy", True), ("sampled", False)):
        one, other = (naive(*values(lines, greedy), bins=10) for lines in models)
        measure = measures[f"ECE ({of})"]
        assert measure.reference.value == pytest.approx(one)
        assert measure.model.value == pytest.approx(other)
        assert measure.difference.value == pytest.approx(other - one)
        assert measure.difference.n == 40
        assert measure.difference.low < other - one < measure.difference.high
        assert f"ECE ({of})" in table(found)
    assert measures["ECE (sampled)"].difference.is_above
    plain = json.loads(json.dumps(found.to_dict()))["calibration"]
    assert [each["of"] for each in plain["one"]] == ["greedy", "sampled"]
    assert sum(b["answers"] for b in plain["other"][1]["bins"]) == 160
    assert all(0 <= b["accuracy"] <= 1 and 0 < b["confidence"] <= 1 for b in plain["other"][1]["bins"])


def test_the_interval_resamples_problems() -> None:
    """All answers to a problem are drawn together."""
    lines = made("one", 4, greedy=False)
    found = report(lines, resamples=2000).calibrations["one"][0].error
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        chosen = [f"q{i}" for i in generator.integers(0, 40, 40)]
        again = [line for name in chosen for line in lines if line["problem"] == name]
        drawn.append(naive(*values(again, False), bins=10))
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low  # two sets of draws: the quantiles of 1000 differ by a few hundredths of the width
    assert found.low == pytest.approx(low, abs=0.2 * width)
    assert found.high == pytest.approx(high, abs=0.2 * width)


def test_what_chance_alone_shows() -> None:
    """The mean ECE of 400 calibrated models with the same confidences has a standard error of about 2 %."""
    lines = made("one", 1, greedy=False)
    confidences, _ = values(lines, False)
    generator = np.random.default_rng(1)
    drawn = [
        expected_calibration_error(confidences, generator.random(len(confidences)) < confidences) for _ in range(400)
    ]
    found = report(lines)
    assert found.calibrations["one"][0].by_chance == pytest.approx(np.mean(drawn), rel=0.1)
    chance = f"{found.calibrations['one'][0].by_chance:.3f}"
    shown = table(found)
    assert f"note: ECE (sampled): by chance alone, a calibrated model with these confidences shows {chance}" in shown


def test_an_interval_that_lies_above_the_error_is_left_out() -> None:
    """The share of right answers is exactly the confidence in each bin; in a resample it hardly ever is."""
    shares = [(1, 5), (1, 4), (2, 5), (1, 2), (3, 5), (3, 4), (4, 5)]
    lines = [
        {"problem": f"q{number}-{n}", "response": "r", "correct": n < 2 * right, "confidence": right / of}
        for number, (right, of) in enumerate(shares)
        for n in range(2 * of)
    ]
    error = report(lines).calibrations["f0"][0].error
    assert error.value == pytest.approx(0, abs=1e-12)
    assert error.n == 60
    assert math.isnan(error.low)
    assert math.isnan(error.high)
    sure = report([line | {"confidence": 0.95} for line in lines]).calibrations["f0"][0].error
    assert sure.low < sure.value < sure.high


def test_confidences_of_one_model_alone() -> None:
    without = [{key: value for key, value in line.items() if key != "confidence"} for line in made("other", 1)]
    found = report(made("one", 1), without)
    assert not any("ECE" in m.name for m in found.comparisons[0].measures)
    assert "ECE (greedy): not measured: 'other' has no such answers with a confidence" in found.comparisons[0].notes
    assert list(found.calibrations) == ["one"]
    assert report(without).calibrations == {}


def test_the_picture() -> None:
    drawn = pictures(report(made("one", 1), made("other", 4)))
    assert sorted(["samples.json", *drawn]) == sorted(FILES)
    assert drawn["calibration.png"].startswith(b"\x89PNG")
    alone = report([{key: v for key, v in line.items() if key != "confidence"} for line in made("one", 1)])
    assert "calibration.png" not in pictures(alone)


@pytest.mark.parametrize("confidence", [1.5, -0.1, "0.9", True, [0.9], math.nan, 80])
def test_confidences_out_of_range(confidence: Any) -> None:
    line = {"problem": "p", "response": "r", "correct": True, "confidence": confidence}
    Path("a.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(CheckpointError, match=r"a.jsonl, line 1: confidence is .*; it must be a number from 0 to 1"):
        read_samples(["a.jsonl"])


@pytest.mark.parametrize("lacking", [{}, {"confidence": None}])
def test_confidences_partly_missing(lacking: Line) -> None:
    line = {"problem": "p", "response": "r", "correct": True}
    lines = [line | {"confidence": 1}, line | {"confidence": 0}, line | lacking]
    Path("a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(
        MismatchError,
        match=r"1 of 3 responses of one model have no confidence, first a.jsonl, line 3; give all of them",
    ):
        read_samples(["a.jsonl"])
