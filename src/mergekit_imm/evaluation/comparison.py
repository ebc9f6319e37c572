"""Compare models by their samples: every measure with a paired interval over problems."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.checks import check_count, described
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError, MismatchError
from .bootstrap import RESAMPLES, Indices, Interval, bootstrap, text_of
from .calibration import KINDS, Calibration, by_chance, calibration, error_of, problem_sums
from .diversity import (
    cosine_diversity,
    distinct_equations,
    expectation_adjusted_distinct,
    mean_distinct,
)
from .embeddings import unit_rows
from .passk import pass_at_k, powers_of_two
from .rates import difference_interval, rate_interval
from .reversal import FEWEST, UNKNOWN, Reversal, group_disparity, improvement_set, judge
from .samples import Model, Problem

Encoder = Callable[[list[str]], npt.ArrayLike]
Numbers = npt.NDArray[np.float64]
FORMAT = "mergekit_imm samples 1"


@dataclass(frozen=True)
class Measure:
    """A measure of the reference and a model on the same problems, and their paired difference, model - reference."""

    name: str
    reference: Interval
    model: Interval
    difference: Interval


@dataclass(frozen=True, repr=False)
class ProblemSet(Displayed):
    """A subset of the problems: its size, and pass@k of both models on it."""

    problems: int
    reference: Mapping[int, Interval]
    model: Mapping[int, Interval]

    def _summary(self) -> Summary:
        rows = [[f"pass@{k}", f"{each.value:.3f}", f"{self.model[k].value:.3f}"] for k, each in self.reference.items()]
        return Summary(f"{self.problems} problems", (), ("", "reference", "model"), rows)


@dataclass(frozen=True, repr=False)
class Comparison(Displayed):
    """A model compared with the reference. `notes` lists what could not be measured, and why.

    `gained`: problems that only the model solves greedily; `lost`: those that only the reference solves. None without
    greedy answers.
    """

    model: str
    measures: tuple[Measure, ...]
    gained: ProblemSet | None
    lost: ProblemSet | None
    verdict: Reversal
    notes: tuple[str, ...]

    def _summary(self) -> Summary:
        rows = [
            [
                each.name,
                *("-" if math.isnan(x.value) else f"{x.value:.3f}" for x in (each.reference, each.model)),
                text_of(each.difference),
            ]
            for each in self.measures
        ]
        line = f"{shown(self.model, 40)}: {self.verdict.sentence}"
        return Summary(line, self.notes, ("measure", "reference", "model", "difference"), rows)


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """The result of `compare`: pass@k and calibration of each model, and each model compared with the reference."""

    reference: str
    problems: int
    ood_problems: int
    curves: Mapping[str, Mapping[int, Interval]]
    comparisons: tuple[Comparison, ...]
    calibrations: Mapping[str, tuple[Calibration, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, with None for undefined values."""

        def plain(curve: Mapping[int, Interval]) -> dict[str, Any]:
            return {str(k): each.to_dict() for k, each in curve.items()}

        def problem_set(found: ProblemSet | None) -> dict[str, Any] | None:
            if found is None:
                return None
            curves = {"reference_pass_at_k": plain(found.reference), "model_pass_at_k": plain(found.model)}
            return {"problems": found.problems, **curves}

        return {
            "format": FORMAT,
            "reference": self.reference,
            "problems": self.problems,
            "ood_problems": self.ood_problems,
            "pass_at_k": {name: plain(curve) for name, curve in self.curves.items()},
            "calibration": {name: [each.to_dict() for each in found] for name, found in self.calibrations.items()},
            "comparisons": [
                {
                    "model": each.model,
                    "measures": [
                        {
                            "name": m.name,
                            "reference": m.reference.to_dict(),
                            "model": m.model.to_dict(),
                            "difference": m.difference.to_dict(),
                        }
                        for m in each.measures
                    ],
                    "improvement_set": problem_set(each.gained),
                    "regression_set": problem_set(each.lost),
                    "verdict": each.verdict.to_dict(),
                    "notes": list(each.notes),
                }
                for each in self.comparisons
            ],
        }

    def _summary(self) -> Summary:
        line = f"{len(self.curves)} models on {self.problems} problems, {shown(self.reference, 40)} the reference"
        verdicts = [f"{shown(each.model, 40)}: {each.verdict.sentence}" for each in self.comparisons]
        ks = list(next(iter(self.curves.values()), {}))
        rows = [
            [shown(name, 40), *(f"{each.value:.3f}" for each in curve.values())] for name, curve in self.curves.items()
        ]
        return Summary(line, verdicts, ("model", *(f"pass@{k}" for k in ks)), rows if ks else ())


def compare(
    models: Sequence[Model],
    *,
    reference: str | None = None,
    encoder: Encoder | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Compare each model with a reference by their samples of the same problems.

        difference = mean_j (model_j - reference_j),  interval: paired, over the problems j

    Args: `models` from `read_samples`; `reference`, the name of one of them, the first by default; `encoder`, from a
    list of texts to an array of shape (texts, width), for diversity in meaning; `resamples`, of the bootstrap; `seed`,
    of the samples drawn for diversity.

    pass@k is given for k = 1, 2, 4, ... up to the fewest samples of a problem. Diversity is measured per problem, for
    right and wrong samples separately, and averaged over problems where both models have at least two. More texts
    repeat more, so of the model with more of them as many as the other has are drawn, each with the same probability:
    the first ones would differ from the rest if the file is in an order, such as that of temperature. V of EAD is the
    number of distinct tokens in all samples of both models. Intervals of rates are those of `rates`, others bootstrap.
    The verdict comes from `judge`: its diversity is the cosine diversity of right responses, or without an encoder
    their EAD, unless responses became longer; its pass@k uses the largest k of at most half of the samples.

    Raises MismatchError if the models have different problems, ArgumentError for an unknown reference, a faulty encoder
    or values of other kinds.

    Source: "Self-Improvement Reversal", 2024 (arXiv 2407.05013); intervals, equal numbers and the verdict are ours.

    >>> from mergekit_imm.evaluation.samples import Response
    >>> before = Model("base", {str(i): Problem(str(i), None, False, (), Response("2", i < 3)) for i in range(9)})
    >>> after = Model("round 0", {str(i): Problem(str(i), None, False, (), Response("2", i < 8)) for i in range(9)})
    >>> report = compare([before, after])
    >>> report.comparisons[0].measures[0].difference.value, report.comparisons[0].gained.problems
    (0.5555555555555556, 5)
    """
    if not isinstance(models, Sequence) or not all(isinstance(model, Model) for model in models):
        raise ArgumentError(f"models is {described(models)}; give a list of models, as read_samples returns it")
    check_count("resamples", resamples, 1)
    check_count("seed", seed, 0)
    if not models:
        raise ArgumentError("models is empty; give samples of at least one model")
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ArgumentError(f"two models have the name '{shown(twice)}'; give each its own name")
    base = models[0] if reference is None else next((m for m in models if m.name == reference), None)
    if base is None:
        raise ArgumentError(f"reference is '{shown(reference)}'; it must be one of {', '.join(map(shown, names))}")
    for model in models:
        _refuse_others(base, model)
    order = list(base.problems)
    inside = [name for name in order if not base.problems[name].ood]
    outside = [name for name in order if base.problems[name].ood]
    if not inside:
        raise MismatchError("all problems are marked ood; at least one must be in the training's domain")
    sampled = {m.name: [r.text for name in inside for r in m.problems[name].sampled] for m in models}
    embedded = {name: unit_rows(encoder(t), "the encoder", t) for name, t in sampled.items() if t} if encoder else {}
    ks = powers_of_two(min(len(m.problems[name].sampled) for m in models for name in inside))
    curves = {m.name: {k: rate_interval(_pass_k(m, inside, k)) for k in ks} for m in models}
    comparisons = []
    for model in models:
        if model is not base:
            texts = chain(sampled[base.name], sampled[model.name])
            vocabulary = len({token for text in texts for token in text.split()})
            pair = _Pair(base, model, inside, outside, ks, vocabulary, embedded, resamples, seed)
            comparisons.append(pair.compare())
    calibrations = {m.name: _calibrations(m, inside, resamples) for m in models}
    calibrations = {name: found for name, found in calibrations.items() if found}
    return Report(base.name, len(inside), len(outside), curves, tuple(comparisons), calibrations)


def _calibrations(model: Model, names: Sequence[str], resamples: int) -> tuple[Calibration, ...]:
    found = (calibration(model, names, of, resamples=resamples) for of in KINDS)
    return tuple(each for each in found if each is not None)


def _refuse_others(base: Model, model: Model) -> None:
    for one, other in ((base, model), (model, base)):
        missing = [name for name in one.problems if name not in other.problems]
        if missing:
            some = ", ".join(f"'{shown(name, 40)}'" for name in missing[:3])
            raise MismatchError(
                f"'{shown(other.name)}' lacks {len(missing)} of the {len(one.problems)} problems of "
                f"'{shown(one.name)}': {some}{', ...' if len(missing) > 3 else ''}; give all models the same problems"
            )
    for name, problem in base.problems.items():
        twin = model.problems[name]
        if (problem.level, problem.ood) != (twin.level, twin.ood):
            raise MismatchError(
                f"problem '{shown(name)}' has level {problem.level} and ood {problem.ood} in '{shown(base.name)}', "
                f"level {twin.level} and ood {twin.ood} in '{shown(model.name)}'; give both the same"
            )


def _pass_k(model: Model, names: Sequence[str], k: int) -> Numbers:
    return np.array([pass_at_k(*model.problems[name].counts, k) for name in names])


def _drawn(indices: list[int], count: int, seed: str) -> list[int]:
    """As many of some indices, each with the same probability, in order."""
    generator = random.Random(seed)  # not its sample: that may change between versions of Python
    return sorted(sorted(indices, key=lambda _: generator.random())[:count])


def _rate(name: str, base: Numbers, model: Numbers, *, k: int = 1) -> Measure:
    return Measure(name, rate_interval(base), rate_interval(model), difference_interval(base, model, k=k))


@dataclass(frozen=True)
class _Pair:
    """A model and the reference, with what all pairs share."""

    base: Model
    model: Model
    inside: Sequence[str]
    outside: Sequence[str]
    ks: Sequence[int]
    vocabulary: int
    embedded: Mapping[str, npt.NDArray[Any]]
    resamples: int
    seed: int

    def compare(self) -> Comparison:
        """Measure everything that the samples allow."""
        notes: list[str] = []
        measures: list[Measure] = []
        first = self.solved(self.inside, "pass@1", notes)
        measures += [first] if first and "greedy" in first.name else []
        for k in self.ks:
            of = (_pass_k(self.base, self.inside, k), _pass_k(self.model, self.inside, k))
            measures.append(_rate(f"pass@{k} (sampled)", *of, k=k))
        if not self.ks:
            notes.append("a problem has a greedy answer but no samples: pass@k and diversity are not measured")
        fewest = min(len(m.problems[name].sampled) for m in (self.base, self.model) for name in self.inside)
        usable = [f"pass@{k} (sampled)" for k in self.ks if 1 < k <= fewest / 2]  # near n it is noisy, and saturates
        pass_k = next((each for each in measures if usable and each.name == usable[-1]), None)
        diversity = None
        for right in (True, False):
            found = self.diversity(right, notes)
            measures += found.values()
            if right:
                diversity = found.get("cosine diversity", found.get("EAD"))
                if diversity is found.get("EAD") and diversity and found["tokens"].difference.is_above:
                    diversity = None
                    notes.append("responses are longer, which lowers EAD: EAD does not count in the verdict; --encoder")
        ood = self.solved(self.outside, "OOD pass@1", notes) if self.outside else None
        disparity = self.disparity(notes)
        measures += [each for each in (ood, disparity) if each]
        measures += self.calibration(notes)
        gained, lost = self.sets(notes)
        signs = {"pass_1": first, "diversity": diversity, "ood": ood, "disparity": disparity, "pass_k": pass_k}
        verdict = judge(
            **{name: each.difference if each else UNKNOWN for name, each in signs.items()},
            names={name: each.name for name, each in signs.items() if each},
        )
        return Comparison(self.model.name, tuple(measures), gained, lost, verdict, tuple(notes))

    def measure(
        self, name: str, base: Numbers, model: Numbers, statistic: Callable[[Numbers, Indices], float] | None = None
    ) -> Measure:
        """Both values and their difference, on the same resamples of problems."""
        of = statistic or (lambda values, i: float(values[i].mean()))
        if not len(base):
            return Measure(name, UNKNOWN, UNKNOWN, UNKNOWN)
        draw = {"n": len(base), "resamples": self.resamples}
        return Measure(
            name,
            bootstrap(lambda i: of(base, i), **draw),
            bootstrap(lambda i: of(model, i), **draw),
            bootstrap(lambda i: of(model, i) - of(base, i), **draw),
        )

    def rates(self, names: Sequence[str], title: str, notes: list[str]) -> tuple[str, Numbers, Numbers] | None:
        """How each problem is answered, and both models' rates per problem: greedy if possible, else sampled."""
        both = [[model.problems[name] for name in names] for model in (self.base, self.model)]
        lacking = [
            (m.name, problem.name)
            for m, problems in zip((self.base, self.model), both, strict=True)
            for problem in problems
            if problem.greedy is None
        ]
        if not lacking:
            base, model = (np.array([float(p.greedy.correct) for p in each if p.greedy]) for each in both)
            return "greedy", base, model
        notes.append(
            f"{title}: {len(lacking)} greedy answers are missing, first that of '{shown(lacking[0][0])}' to "
            f"'{shown(lacking[0][1])}', so samples are used"
        )
        if any(not p.sampled for each in both for p in each):
            notes.append(f"{title}: a problem has no samples either, so it is not measured")
            return None
        base, model = (np.array([pass_at_k(*p.counts, 1) for p in each]) for each in both)
        return "sampled", base, model

    def solved(self, names: Sequence[str], title: str, notes: list[str]) -> Measure | None:
        """pass@1, greedy or sampled."""
        found = self.rates(names, title, notes)
        return _rate(f"{title} ({found[0]})", found[1], found[2]) if found else None

    def disparity(self, notes: list[str]) -> Measure | None:
        """The group disparity on ood problems if they have levels, else on the others."""
        levels = {name: problem.level for name, problem in self.base.problems.items() if problem.level is not None}
        title = "OOD group disparity" if any(name in levels for name in self.outside) else "group disparity"
        names = self.outside if title.startswith("OOD") else self.inside
        graded = [levels[name] for name in names if name in levels]
        if not graded:
            return None
        if len(graded) < len(names):
            notes.append(f"{title}: {len(names) - len(graded)} of {len(names)} problems have no level and are left out")
        extremes = [name for name in names if levels.get(name) in (min(graded), max(graded))]
        found = self.rates(extremes, title, notes)
        if not found:
            return None
        level = np.array([levels[name] for name in extremes])
        measured = self.measure(
            f"{title} ({found[0]})", found[1], found[2], lambda values, i: group_disparity(values[i], level[i])
        )
        if min(np.count_nonzero(level == end) for end in (min(graded), max(graded))) < FEWEST:
            notes.append(f"{title}: fewer than {FEWEST} problems of a level, so it does not count in the verdict")
            return replace(measured, difference=replace(measured.difference, low=math.nan, high=math.nan))
        if np.isnan(measured.difference.value):
            notes.append(f"{title}: undefined: there is only one level, or no problem of the lowest level is solved")
        return measured

    def calibration(self, notes: list[str]) -> list[Measure]:
        """The expected calibration error, of greedy answers and of samples, where both models give confidences."""
        measures = []
        for of in KINDS:
            base, model = (problem_sums(m, self.inside, of) for m in (self.base, self.model))
            if base is not None and model is not None:
                measures.append(self.measure(f"ECE ({of})", base, model, error_of))
                chance = f"{by_chance(base):.3f} and {by_chance(model):.3f}"
                notes.append(f"ECE ({of}): by chance alone, calibrated models with these confidences show {chance}")
            elif base is not None or model is not None:
                lacking = self.base.name if base is None else self.model.name
                notes.append(f"ECE ({of}): not measured: '{shown(lacking)}' has no such answers with a confidence")
        return measures

    def diversity(self, right: bool, notes: list[str]) -> dict[str, Measure]:
        """Measures of diversity of the right responses, or of the wrong ones."""
        columns: dict[str, list[list[float]]] = {}
        places = {self.base.name: 0, self.model.name: 0}  # where a problem's embeddings begin
        compared = 0
        for name in self.inside:
            both = [m.problems[name] for m in (self.base, self.model)]
            chosen = [[i for i, r in enumerate(p.sampled) if r.correct == right] for p in both]
            count = min(map(len, chosen))
            if count >= 2:
                compared += 1
                chosen = [_drawn(indices, count, f"{self.seed} {name}") for indices in chosen]
                for m, problem, indices in zip((self.base, self.model), both, chosen, strict=True):
                    rows = [places[m.name] + i for i in indices]
                    for title, value in self.values(problem, indices, m.name, rows).items():
                        columns.setdefault(title, []).append([value]) if m is self.base else columns[title][-1].append(
                            value
                        )
            for m, problem in zip((self.base, self.model), both, strict=True):
                places[m.name] += len(problem.sampled)
        kind = "correct" if right else "incorrect"
        notes.append(
            f"diversity, {kind}: on {compared} of {len(self.inside)} problems, where both models have two such samples"
        )
        found = {}
        for title, pairs in columns.items():
            table = np.array(pairs)
            table = table[~np.isnan(table).any(axis=1)]
            if len(table) < compared:
                notes.append(f"{title}, {kind}: undefined for {compared - len(table)} problems, which are left out")
            found[title] = self.measure(f"{title}, {kind}", table[:, 0], table[:, 1])
        return found

    def values(self, problem: Problem, indices: Sequence[int], model: str, rows: list[int]) -> dict[str, float]:
        """Each measure of diversity for some responses to one problem, and their mean length."""
        texts = [problem.sampled[i].text for i in indices]
        found = {
            "distinct-n": mean_distinct(texts),
            "EAD": expectation_adjusted_distinct(texts, vocabulary=max(1, self.vocabulary)),
            "distinct equations": distinct_equations(texts),
        }
        if self.embedded:
            found["cosine diversity"] = cosine_diversity(self.embedded[model][rows])
        return {**found, "tokens": statistics.fmean(len(text.split()) for text in texts)}

    def sets(self, notes: list[str]) -> tuple[ProblemSet | None, ProblemSet | None]:
        """The improvement and the regression set, with pass@k of both models on each."""
        greedy = [[m.problems[name].greedy for name in self.inside] for m in (self.model, self.base)]
        right = [[each.correct for each in answers if each] for answers in greedy]
        if any(len(each) < len(self.inside) for each in right):
            notes.append("improvement and regression set: not measured, as greedy answers are missing")
            return None, None
        gained, lost = (self.on([self.inside[i] for i in at]) for at in improvement_set(*right))
        return gained, lost

    def on(self, names: list[str]) -> ProblemSet:
        """pass@k of both models on some problems."""
        ks = self.ks if names else ()
        base, model = ({k: rate_interval(_pass_k(m, names, k)) for k in ks} for m in (self.base, self.model))
        return ProblemSet(len(names), base, model)
