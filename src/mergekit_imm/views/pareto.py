"""In- against out-of-domain: a table with the Pareto front marked, and a figure."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from ..common.messages import shown
from ..evaluation.results import Result, Tradeoff
from ..loop.state import without_sign
from .tables import INK, aligned, drawing, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        _annotate(axes, found, points)
        return saved(figure, "pareto")


def _annotate(axes: Axes, found: Tradeoff, points: list[tuple[float, float]]) -> None:
    """Label the points, the front first, where they cover nothing else; leave out what finds no place."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    taken = [_around(x, y, 5 * unit) for x, y in axes.transData.transform(points)]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent().extents)
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    on_lines = [
        _around(at[0], at[1], unit) for line in lines for a, b in pairwise(line) for at in _between(a, b, 3 * unit)
    ]
    others = [i for i in range(len(points)) if i not in found.front]
    for i in [*found.front, *others][: max(LABELS, len(found.front))]:
        for obstacles, (right, up) in product(([*taken, *on_lines], taken), _AROUND):
            text = axes.annotate(
                _plain(_label(found.results[i])),
                points[i],
                (7 * right, 7 * up),
                textcoords="offset points",
                fontsize=7,
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
            )
            box: Any = text.get_window_extent().extents
            inside: Any = axes.bbox.extents
            apart = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in obstacles)
            if apart and (box[:2] >= inside[:2]).all() and (box[2:] <= inside[2:]).all():
                taken.append(box)
                break
            text.remove()


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # where a label may be, best first


def _around(x: float, y: float, size: float) -> tuple[float, float, float, float]:
    return x - size, y - size, x + size, y + size


def _between(a: Any, b: Any, step: float) -> list[Any]:
    """Return places on the line from a to b, at most a step apart."""
    count = 1 + int(max(abs(b - a)) / step)
    return [a + (b - a) * n / count for n in range(count + 1)]


def _label(result: Result) -> str:
    """Return the alpha of a merge, else the name; a figure says the rest by its colours."""
    return shown(result.name, 30) if result.alpha is None else f"alpha {result.alpha:g}"


def _plain(text: str) -> str:
    """Return a text in which `$` starts no formula."""
    return shown(text, 60).replace("$", r"\$")
