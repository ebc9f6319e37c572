"""Improvement or reversal: what a model gained and lost, and a rule for the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.checks import as_items, described
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError
from .bootstrap import Interval, text_of

FEWEST = 6  # problems: with fewer, a sign test cannot go below 2.5 %, even if all agree (2^-5 > 0.025 > 2^-6)
UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)


def improvement_set(model: Sequence[bool], reference: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return the improvement set (IS) and the regression set (RS) of a model against a reference.

        IS = {x: model right, reference wrong},  RS = {x: reference right, model wrong}

    Args: `model` and `reference`, whether the greedy answer to each problem is right, in the same order. Returns the
    indices of IS and RS. Raises ArgumentError for different lengths.

    Source: IS, "Self-Improvement Reversal", 2024 (arXiv 2407.05013). RS is ours: two models that differ only by chance
    gain about as many problems as they lose.

    >>> improvement_set([True, True, False], [True, False, True])
    ([1], [2])
    """
    for name, answers in (("model", model), ("reference", reference)):
        for each in as_items(name, answers, "True and False, one per problem"):
            if each not in (True, False):
                raise ArgumentError(f"{name} holds {shown(repr(each), 60)}; give True and False, one per problem")
    if len(model) != len(reference):
        raise ArgumentError(
            f"{len(model)} answers of the model, {len(reference)} of the reference; give one per problem"
        )
    pairs = list(zip(model, reference, strict=True))
    return (
        [i for i, (now, before) in enumerate(pairs) if now and not before],
        [i for i, (now, before) in enumerate(pairs) if before and not now],
    )


def group_disparity(solved: npt.ArrayLike, levels: npt.ArrayLike) -> float:
    """Return the relative drop in accuracy from the easiest level to the hardest.

        (acc(lowest level) - acc(highest level)) / acc(lowest level)

    Args: `solved`, for each problem 1 or 0, or the share of right answers; `levels`, the problems' levels, as long.
    NaN if there is only one level, or nothing of the lowest is solved. Raises ArgumentError for different lengths or
    none.

    Source: "Self-Improvement Reversal", 2024 (arXiv 2407.05013), for levels 1 and 5 of MATH.

    >>> group_disparity([1, 1, 0, 1, 0, 0], [1, 1, 1, 5, 5, 5])
    0.5
    """
    try:
        share, level = np.asarray(solved, np.float64), np.asarray(levels, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"solved and levels must be numbers, one per problem: {shown(error)}") from error
    if share.shape != level.shape or share.ndim != 1 or not len(share):
        raise ArgumentError(f"{share.size} problems and {level.size} levels; give one level per problem")
    if not (np.all((share >= 0) & (share <= 1)) and np.all(np.isfinite(level))):
        raise ArgumentError("solved must hold shares from 0 to 1, and levels finite numbers")
    easiest, hardest = level.min(), level.max()
    easy, hard = float(share[level == easiest].mean()), float(share[level == hardest].mean())
    return (easy - hard) / easy if easy > 0 and easiest != hardest else math.nan


@dataclass(frozen=True, repr=False)
class Reversal(Displayed):
    """A verdict: whether pass@1 rose, and what got worse. None means unknown.

    `evidence` holds the differences, model - reference; `sentence` states the verdict with its numbers.
    """

    improved: bool | None
    diversity_fell: bool | None
    ood_fell: bool | None
    disparity_rose: bool | None
    pass_k_fell: bool | None
    evidence: Mapping[str, Interval]
    sentence: str

    @property
    def is_reversal(self) -> bool | None:
        """Whether pass@1 rose and something else got worse; None if unknown."""
        signs = (self.diversity_fell, self.ood_fell, self.disparity_rose, self.pass_k_fell)
        if self.improved is None:
            return None
        if not self.improved or any(signs):
            return self.improved
        return False if any(sign is not None for sign in signs) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        names = ("improved", "diversity_fell", "ood_fell", "disparity_rose", "pass_k_fell")
        return {
            "reversal": self.is_reversal,
            **{name: getattr(self, name) for name in names},
            "evidence": {name: interval.to_dict() for name, interval in self.evidence.items()},
            "sentence": self.sentence,
        }

    def _summary(self) -> Summary:
        rows = [[shown(name, 40), text_of(each)] for name, each in self.evidence.items()]
        return Summary(self.sentence, (), ("measure", "difference"), rows)


def judge(
    pass_1: Interval,
    *,
    diversity: Interval = UNKNOWN,
    ood: Interval = UNKNOWN,
    disparity: Interval = UNKNOWN,
    pass_k: Interval = UNKNOWN,
    names: Mapping[str, str] | None = None,
) -> Reversal:
    """Judge whether an improvement is a reversal: pass@1 is better, but something else is worse.

        reversal = [low(pass@1) > 0] and any of
                   [high(diversity) < 0], [high(OOD) < 0], [low(disparity) > 0], [high(pass@k) < 0]

    Args: differences model - reference, each with its paired bootstrap interval over problems; leave out what was not
    measured. Differences over fewer than 6 problems do not count. `names`: what the sentence calls pass_1, diversity,
    ood, disparity and pass_k. If its interval is accurate, each of the four signs appears by chance in at most about
    one case in 40; any of them in one in 10.

    Source: the definition of a reversal, "Self-Improvement Reversal", 2024 (arXiv 2407.05013), which has no test and no
    threshold. The rule is ours.

    >>> verdict = judge(Interval(0.12, 0.05, 0.19, 200), pass_k=Interval(-0.08, -0.13, -0.03, 200))
    >>> verdict.is_reversal, verdict.ood_fell
    (True, None)
    >>> verdict.sentence
    'reversal: pass@1 rose by 0.120 [0.050, 0.190] (n = 200), but pass@k fell by 0.080 [0.030, 0.130] (n = 200)'
    """
    called = {"pass_1": "pass@1", "diversity": "diversity", "ood": "OOD pass@1", "disparity": "group disparity"}
    if not isinstance(names, Mapping | None):
        raise ArgumentError(f"names is {described(names)}; give a mapping, such as {{'pass_k': 'pass@8'}}")
    called |= {"pass_k": "pass@k", **(names or {})}
    measured = {"pass_1": pass_1, "diversity": diversity, "ood": ood, "disparity": disparity, "pass_k": pass_k}
    for name, each in measured.items():
        if not isinstance(each, Interval):
            raise ArgumentError(f"{name} is {described(each)}; give an Interval, or leave out what was not measured")
    worse = {
        name: None if not _is_usable(each) else each.is_above if name in ("pass_1", "disparity") else each.is_below
        for name, each in measured.items()
    }
    improved = worse.pop("pass_1")
    stated = {name: _described(called[name], each) for name, each in measured.items() if _is_usable(each)}
    bad = [stated[name] for name, sign in worse.items() if sign]
    good = [called[name] for name, sign in worse.items() if sign is False]
    unknown = [called[name] for name, sign in worse.items() if sign is None]
    rest = f"; not measured: {', '.join(unknown)}" if unknown else ""
    if improved is None:
        sentence = f"no verdict: {called['pass_1']} has no interval over at least {FEWEST} problems"
    elif not improved:
        fell = f"; {' and '.join(bad)}" if bad else ""
        sentence = f"no improvement shown: {stated['pass_1']}{fell}"
    elif bad:
        sentence = f"reversal: {stated['pass_1']}, but {' and '.join(bad)}"
    elif good:
        sentence = f"no reversal shown: {stated['pass_1']}, and no harm shown in {', '.join(good)}{rest}"
    else:
        sentence = f"no verdict: {stated['pass_1']}, but nothing else was measured"
    evidence = {name: each for name, each in measured.items() if each.n}
    return Reversal(improved, worse["diversity"], worse["ood"], worse["disparity"], worse["pass_k"], evidence, sentence)


def _is_usable(each: Interval) -> bool:
    return each.n >= FEWEST and not math.isnan(each.low)


def _described(name: str, each: Interval) -> str:
    if each.is_below:
        change, low, high = f"fell by {-each.value:.3f}", -each.high, -each.low
    else:
        change = f"rose by {each.value:.3f}" if each.is_above else f"changed by {each.value:+.3f}"
        low, high = each.low, each.high
    return f"{name} {change} [{low:.3f}, {high:.3f}] (n = {each.n})"
