"""In- against out-of-domain: a table with the Pareto front marked, and a figure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..common.messages import shown
from ..evaluation.results import Result, Tradeoff
from ..loop.state import without_sign
from .labels import label_points
from .tables import INK, aligned, drawing, saved

FILES = ("pareto.json", "pareto.png", "pareto.svg")
LABELS = 60  # beyond the front, more are a cloud
_FRONT = "#dd7b33"  # as INK a tone that can be read on light and on dark pages
_SERIES = ("#3584d6", "#36a57a", "#a06cc8", "#b8860b", "#c2527a", "#5f9ea0")


def table(found: Tradeoff) -> str:
    """Return a line for each result, and whether it is on the front."""
    cells = [["model", "alpha", "drop", *(shown(without_sign(name)[0]) for name in (found.inside, found.outside)), ""]]
    for number, each in enumerate(found.results):
        values = ["" if value is None else f"{value:g}" for value in (each.alpha, each.drop)]
        mark = "front" if number in found.front else ""
        cells.append([shown(each.name), *values, *(f"{value:.4g}" for value in found.point(each)), mark])
    return "\n".join(aligned(cells))


def front_lines(found: Tradeoff) -> str:
    """Return a line for each result on the front: its name, and its alpha."""
    return "\n".join(
        aligned([[shown(each.name), _label(each)] for each in (found.results[i] for i in found.front)], right=())
    )


def picture(found: Tradeoff) -> dict[str, bytes]:
    """Draw the results, better to the right and up, with the front and the results of a series joined by alpha.

    Returns file name -> content, PNG and SVG. Raises ExtraError without matplotlib.
    """
    points = [found.point(each) for each in found.results]
    signs = [without_sign(name)[1] for name in (found.inside, found.outside)]
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        names = list(dict.fromkeys(each.series for each in found.results))
        for number, name in enumerate(names):
            own = [i for i, each in enumerate(found.results) if each.series == name]
            merged = [points[i] for i in own if found.results[i].alpha is not None]
            colour = _SERIES[number % len(_SERIES)]
            if len(merged) > 1:
                axes.plot(*zip(*merged, strict=True), "-", color=colour, linewidth=0.8, alpha=0.6)
            label = _plain(name) if len(names) > 1 and name else None
            axes.plot(*zip(*(points[i] for i in own), strict=True), "o", color=colour, markersize=5, label=label)
        front = sorted((points[i] for i in found.front), key=lambda point: signs[0] * point[0])
        steps = [front[0], *(corner for a, b in pairwise(front) for corner in ((a[0], b[1]), b))]
        axes.plot(*zip(*steps, strict=True), color=_FRONT, linewidth=1.4, zorder=1)
        ring: Any = {"markersize": 10, "markerfacecolor": "none", "color": _FRONT, "label": "front", "zorder": 1}
        axes.plot(*zip(*front, strict=True), "o", **ring)
        for axis, sign, name in zip((axes.xaxis, axes.yaxis), signs, (found.inside, found.outside), strict=True):
            axis.set_inverted(sign < 0)
            axis.set_label_text(f"{_plain(without_sign(name)[0])} ({'more' if sign > 0 else 'less'} is better)")
        axes.margins(0.12)
        axes.grid(alpha=0.25, color=INK)
        axes.legend(fontsize=8, loc="best", framealpha=0)
        others = [i for i in range(len(points)) if i not in found.front]
        order = [*found.front, *others][: max(LABELS, len(found.front))]
        label_points(axes, points, {i: _plain(_label(found.results[i])) for i in order})
        return saved(figure, "pareto")


def _label(result: Result) -> str:
    """Return the alpha of a merge, else the name; a figure says the rest by its colours."""
    return shown(result.name, 30) if result.alpha is None else f"alpha {result.alpha:g}"


def _plain(text: str) -> str:
    """Return a text in which `$` starts no formula."""
    return shown(text, 60).replace("$", r"\$")
