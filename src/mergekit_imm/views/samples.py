"""A comparison of samples: tables, and three figures."""

from __future__ import annotations

import math
from typing import Any

from ..common.messages import shown
from ..evaluation.bootstrap import number_text, range_text
from ..evaluation.calibration import KINDS
from ..evaluation.comparison import Comparison, Report
from .tables import aligned, drawing, saved

FIGURES = ("pass-at-k", "differences", "calibration")
FILES = ("samples.json", *(f"{name}.{form}" for name in FIGURES for form in ("png", "svg")))


def table(report: Report) -> str:
    """Return a table for each model against the reference, or of pass@k if there is one model."""
    if not report.comparisons:
        rows = [["measure", shown(report.reference, 24), "95 % interval", "n"]]
        for k, each in report.curves[report.reference].items():
            rows.append([f"pass@{k} (sampled)", number_text(each.value), range_text(each), str(each.n)])
        found = report.calibrations.get(report.reference, ())
        errors = [(f"ECE ({each.of})", each.error) for each in found]
        rows += [[name, number_text(error.value), range_text(error), str(error.n)] for name, error in errors]
        by_chance = "by chance alone, a calibrated model with these confidences shows"
        lines = [f"note: ECE ({each.of}): {by_chance} {each.by_chance:.3f}" for each in found]
        return "\n".join([*aligned(rows), *lines, "one model: nothing to compare it with"])
    return "\n\n".join(_comparison(report.reference, each) for each in report.comparisons)


def verdicts(report: Report) -> str:
    """Return a line for each model with its verdict."""
    return "\n".join(f"{shown(each.model)}: {each.verdict.sentence}" for each in report.comparisons)


def _comparison(reference: str, each: Comparison) -> str:
    rows = [["measure", shown(reference, 24), shown(each.model, 24), "difference", "95 % interval", "n"]]
    for m in each.measures:
        values = [number_text(m.reference.value), number_text(m.model.value), number_text(m.difference.value, "+")]
        rows.append([m.name, *values, range_text(m.difference, "+"), str(m.difference.n)])
    lines = [f"{shown(each.model)} against {shown(reference)}", *aligned(rows)]
    if each.gained and each.lost:
        counts = f"{each.gained.problems} problems gained (greedy); regression set: {each.lost.problems} lost"
        lines.append(f"improvement set: {counts}")
        curves = [
            (f"{shown(name, 24)}, on the {what}", curve)
            for what, found in (("gained", each.gained), ("lost", each.lost))
            for name, curve in ((reference, found.reference), (each.model, found.model))
            if curve
        ]
        rows = [[title, *(number_text(at.value) for at in curve.values())] for title, curve in curves]
        lines += aligned([["pass@k there", *map(str, curves[0][1])], *rows]) if curves else []
    return "\n".join([*lines, *(f"note: {note}" for note in each.notes)])


def pictures(report: Report) -> dict[str, bytes]:
    """Draw pass@k with bands, the differences to the reference, and reliability diagrams, as PNG and SVG.

    Returns file name -> content, only for what was measured. Raises ExtraError without matplotlib.
    """
    found: dict[str, bytes] = {}
    with drawing():
        from matplotlib.figure import Figure

        if any(report.curves.values()):
            figure = Figure(figsize=(5.2, 3.6), layout="constrained")
            axes = figure.add_subplot()
            for name, curve in report.curves.items():
                ks, values = list(curve), [each.value for each in curve.values()]
                (line,) = axes.plot(ks, values, "o-", markersize=4, label=_label(name))
                low, high = ([getattr(each, end) for each in curve.values()] for end in ("low", "high"))
                axes.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, map(str, ks))
            axes.set_xlabel("k")
            axes.set_ylabel("pass@k (sampled)")
            axes.set_title(f"{report.problems} problems; bands: 95 % intervals", fontsize=8)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            found |= saved(figure, "pass-at-k")
        rows = [
            name
            for name in dict.fromkeys(m.name for each in report.comparisons for m in each.measures)
            if not name.startswith("tokens")  # in another unit
        ]
        if rows:
            count = len(report.comparisons)
            figure = Figure(figsize=(6.4, 1.1 + 0.16 * len(rows) * (1 + 0.5 * count)), layout="constrained")
            axes = figure.add_subplot()
            axes.axvline(0, color="0.5", linewidth=1, linestyle=":")
            for number, each in enumerate(report.comparisons):
                drawn = [m for m in each.measures if m.name in rows and not math.isnan(m.difference.low)]
                at = [rows.index(m.name) + 0.7 * (number - (count - 1) / 2) / count for m in drawn]
                values = [m.difference.value for m in drawn]
                error = [[m.difference.value - m.difference.low for m in drawn]]
                error.append([m.difference.high - m.difference.value for m in drawn])
                axes.errorbar(
                    values,
                    at,
                    xerr=[[max(0.0, e) for e in side] for side in error],
                    fmt="o",
                    markersize=4,
                    linewidth=1.2,
                    color=f"C{number + 1}",
                    label=_label(each.model),
                )
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlabel(f"difference to {shown(report.reference, 40)}".replace("$", r"\$"))
            left, right = axes.get_xlim()  # rates differ by at most 1, a disparity may differ by more
            axes.set_xlim(max(left, -1.05), min(right, 1.05))
            cut = "; ends beyond 1 are not shown" if left < -1.05 or right > 1.05 else ""
            axes.set_title(f"95 % paired intervals over problems{cut}", fontsize=8)
            axes.grid(alpha=0.3, axis="x")
            axes.legend(fontsize=8)
            found |= saved(figure, "differences")
        if report.calibrations:
            found |= saved(_reliability(report, Figure), "calibration")
    return found


def _reliability(report: Report, figure_class: Any) -> Any:
    """Accuracy against confidence in each bin; the area of a point grows with its share of the answers."""
    kinds = [of for of in KINDS if any(each.of == of for found in report.calibrations.values() for each in found)]
    figure = figure_class(figsize=(3.8 * len(kinds), 3.9), layout="constrained")
    names = list(report.curves)
    for column, of in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), column + 1)
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
        for number, name in enumerate(names):
            for each in report.calibrations.get(name, ()):
                if each.of == of:
                    stated, right = ([getattr(b, key) for b in each.bins] for key in ("confidence", "accuracy"))
                    total = sum(b.answers for b in each.bins)
                    label = f"{_label(name)}, ECE {each.error.value:.3f}"
                    axes.plot(stated, right, color=f"C{number}", linewidth=1, label=label)
                    axes.scatter(stated, right, [8 + 250 * b.answers / total for b in each.bins], color=f"C{number}")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_aspect("equal")
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of right answers")
        axes.set_title(f"{of} answers; area: share of the answers", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _label(name: str) -> str:
    """Return a label for a legend: `$` starts no formula, and a first `_` does not hide it."""
    text = shown(name, 40).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
