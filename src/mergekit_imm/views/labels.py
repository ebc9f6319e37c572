"""Labels of the points of a figure, where they cover nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # where a label may be, best first
_DISTANCES = (7, 14)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Mapping[int, str], **look: Any) -> None:
    """Label the points with these numbers, the first ones first; leave out what finds no place.

    All points are obstacles, as are the legend, labels that have a place already, and, if possible, lines.
    """
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
    for i, label in texts.items():
        for obstacles, far, (right, up) in product(([*taken, *on_lines], taken), _DISTANCES, _AROUND):
            text = axes.annotate(
                label,
                points[i],
                (far * right, far * up),
                textcoords="offset points",
                fontsize=7,
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
                **look,
            )
            box: Any = text.get_window_extent().extents
            inside: Any = axes.bbox.extents
            apart = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in obstacles)
            if apart and (box[:2] >= inside[:2]).all() and (box[2:] <= inside[2:]).all():
                taken.append(box)
                break
            text.remove()


def _around(x: float, y: float, size: float) -> tuple[float, float, float, float]:
    return x - size, y - size, x + size, y + size


def _between(a: Any, b: Any, step: float) -> list[Any]:
    """Return places on the line from a to b, at most a step apart."""
    count = 1 + int(max(abs(b - a)) / step)
    return [a + (b - a) * n / count for n in range(count + 1)]
