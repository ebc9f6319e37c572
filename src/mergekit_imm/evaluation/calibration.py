"""Calibration: whether answers given with a confidence of 80 % are right in 80 % of cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.checks import check_count
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError
from .bootstrap import Indices, Interval, bootstrap, text_of
from .samples import Model

BINS = 10
KINDS = ("greedy", "sampled")
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence lies in one bin: how many, their mean confidence, and the share of right ones."""

    answers: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, repr=False)
class Calibration(Displayed):
    """Expected calibration error of a model, with its interval over problems, and the bins that have answers.

    `of`: the answers that count, "greedy" or "sampled". `by_chance`: the error to expect if the model were perfectly
    calibrated, its answers being right by chance with the probabilities that it states. Near that, the error says
    nothing, and its interval is too high, as resampling adds chance once more; an interval without the error itself is
    left out.
    """

    error: Interval
    bins: tuple[Bin, ...]
    of: str
    by_chance: float

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as plain data."""
        bins = [{"answers": b.answers, "confidence": b.confidence, "accuracy": b.accuracy} for b in self.bins]
        return {"of": self.of, "error": self.error.to_dict(), "by_chance": self.by_chance, "bins": bins}

    def _summary(self) -> Summary:
        rows = [[str(each.answers), f"{each.confidence:.3f}", f"{each.accuracy:.3f}"] for each in self.bins]
        line = f"error {text_of(self.error, '')} of {self.of} answers, {self.by_chance:.3f} by chance alone"
        return Summary(line, (), ("answers", "confidence", "share of right ones"), rows)


def expected_calibration_error(confidences: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = BINS) -> float:
    """Return the expected calibration error (ECE) of answers.

        ECE = sum_b n_b / N * |acc_b - conf_b|,   bins b of equal width: ((b - 1) / B, b / B], the first with 0

    Args: `confidences`, each from 0 to 1; `correct`, whether the answer is right, 1 or 0, as long. acc_b is the share
    of right answers in bin b, conf_b their mean confidence. With few answers it is too large: even those of a perfectly
    calibrated model differ from their confidences by chance, in each bin in its own direction. Compare equal numbers of
    answers. Raises ArgumentError for values out of range, different lengths, or none.

    Source: Naeini et al., 2015 (AAAI), with 10 bins; Guo et al., 2017 (arXiv 1706.04599), Eq. 3, with 15.

    >>> expected_calibration_error([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 0])
    0.25
    """
    try:
        stated, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"confidences and correct are not lists of numbers: {shown(error, 200)}") from error
    if stated.ndim != 1 or stated.shape != right.shape or not len(stated):
        raise ArgumentError(f"{stated.size} confidences and {right.size} answers; give one confidence per answer")
    if not ((stated >= 0) & (stated <= 1)).all():
        wrong = stated[~((stated >= 0) & (stated <= 1))][0]
        raise ArgumentError(f"a confidence is {wrong:g}; it must be between 0 and 1")
    if not np.isin(right, (0, 1)).all():
        raise ArgumentError("correct holds values other than 0 and 1; give whether each answer is right")
    return error_of(bin_sums(stated, right, bins)[None], np.zeros(1, np.int64))


def calibration(model: Model, problems: Sequence[str], of: str, *, resamples: int) -> Calibration | None:
    """Return the calibration of a model's answers to some problems, None if one has none or they have no confidence."""
    sums = problem_sums(model, problems, of)
    if sums is None:
        return None
    error = bootstrap(lambda i: error_of(sums, i), len(sums), resamples=resamples)
    if not error.low <= error.value <= error.high:
        error = replace(error, low=math.nan, high=math.nan)
    return Calibration(error, filled_bins(sums), of, by_chance(sums))


def problem_sums(model: Model, problems: Sequence[str], of: str) -> Sums | None:
    """Return `bin_sums` of the answers to each problem: (problems, bins, 4); None as for `calibration`."""
    found = []
    for name in problems:
        problem = model.problems[name]
        answers = problem.sampled if of == "sampled" else (problem.greedy,) if problem.greedy else ()
        stated = [each.confidence for each in answers if each.confidence is not None]
        if not stated or len(stated) < len(answers):
            return None
        found.append(bin_sums(np.array(stated), np.array([float(each.correct) for each in answers])))
    return np.stack(found)


def bin_sums(confidences: Sums, correct: Sums, bins: int = BINS) -> Sums:
    """Return sums over the answers in each bin: of 1, of confidence c, of right ones, of c (1 - c): (bins, 4)."""
    check_count("bins", bins, 1)
    ends = np.arange(1, bins) / bins
    which = np.searchsorted(ends, confidences)  # 0.7 is in the bin that ends at 0.7
    each = np.stack([np.ones_like(confidences), confidences, correct, confidences * (1 - confidences)], axis=1)
    sums = np.zeros((bins, 4))
    np.add.at(sums, which, each)
    return sums


def error_of(sums: Sums, problems: Indices) -> float:
    """Return the ECE of all answers to some problems, from `bin_sums` of each problem: (problems, bins, 4)."""
    answers, confidence, right, _ = sums[problems].sum(axis=0).T
    total = answers.sum()
    return float(np.abs(right - confidence).sum() / total) if total else math.nan


def filled_bins(sums: Sums) -> tuple[Bin, ...]:
    """Return the bins that hold answers."""
    return tuple(Bin(int(n), float(stated / n), float(right / n)) for n, stated, right, _ in sums.sum(axis=0) if n)


def by_chance(sums: Sums) -> float:
    """Return the ECE to expect of a calibrated model: sum_b sqrt(2 / pi * sum of c (1 - c) in b) / N, by normality."""
    total = sums.sum(axis=0)
    return float(np.sqrt(2 / np.pi * total[:, 3]).sum() / total[:, 0].sum())
