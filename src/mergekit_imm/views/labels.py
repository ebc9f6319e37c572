"""Labels of the points of a figure, where they cover nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from .tables import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # where a label may be, best first
_BESIDE, _AWAY = (7, 14), (24, 36)  # the distances of a label from its point, in points
_JOINT = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4}


def label_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Mapping[int, str], **look: Any) -> None:
    """Label the points with these numbers, the first ones first; leave out what finds no place.

    All points are obstacles, as are the legend, labels that have a place already, and, if possible, lines. A label
    without a place beside its point is further away, and joined to it.
    """
    from matplotlib.text import Text

    figure: Any = axes.figure
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    places = axes.transData.transform(points)
    taken = [_around(x, y, 5 * unit) for x, y in places]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent().extents)
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    on_lines = [
        _around(at[0], at[1], unit) for line in lines for a, b in pairwise(line) for at in _between(a, b, 3 * unit)
    ]
    for i, label in texts.items():
        free = [*taken, *on_lines]
        tries = [(free, far) for far in (*_BESIDE, *_AWAY)] + [(taken, far) for far in _BESIDE]
        for (obstacles, far), (right, up) in product(tries, _AROUND):
            text = axes.annotate(
                label,
                points[i],
                (far * right, far * up),
                textcoords="offset points",
                fontsize=7,
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
                arrowprops=_JOINT if far in _AWAY else None,
                **look,
            )
            text.get_window_extent()  # places the text
            box: Any = Text.get_window_extent(text).extents  # without the line to its point
            steps = range(9, far, 3) if far in _AWAY else ()
            x, y = places[i]
            joint = [_around(x + unit * step * right, y + unit * step * up, 0) for step in steps]
            inside: Any = axes.bbox.extents
            if (
                _are_apart([box], obstacles)
                and _are_apart(joint, taken)
                and (box[:2] >= inside[:2]).all()
                and (box[2:] <= inside[2:]).all()
            ):
                taken.append(box)
                on_lines += joint
                break
            text.remove()


def _are_apart(boxes: Sequence[Any], obstacles: Sequence[Any]) -> bool:
    return all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for a in boxes for b in obstacles)


def _around(x: float, y: float, size: float) -> tuple[float, float, float, float]:
    return x - size, y - size, x + size, y + size


def _between(a: Any, b: Any, step: float) -> list[Any]:
    """Return places on the line from a to b, at most a step apart."""
    count = 1 + int(max(abs(b - a)) / step)
    return [a + (b - a) * n / count for n in range(count + 1)]
