"""Figures of the change of layers: per layer, per kind of module, and against importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.verdict import ModelChange
from ..common.messages import shown
from .labels import label_points
from .tables import saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"early": "#3b76af", "middle": "#c98a1b", "late": "#b0413e"}
HEAT_MAPS = 4  # are drawn, of the last checkpoints
NUMBERED = 40  # layers at most have their numbers beside their points


def change_picture(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> dict[str, bytes]:
    """Draw importance (figure 3), change, share (figures 4 and 12) and kinds of modules, layer by layer.

    Returns file name -> content, PNG and SVG. Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 9}):
        return saved(_change_figure(found, importance), "change")


def mismatch_picture(found: Sequence[ModelChange], importance: Mapping[str, float]) -> dict[str, bytes]:
    """Draw importance against change in a panel for each checkpoint, with a colour for each third of the layers.

    Returns file name -> content, PNG and SVG. Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 9}):
        return saved(_mismatch_figure(found, importance), "mismatch")


def _change_figure(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> Figure:
    from matplotlib.figure import Figure

    keys = list(found[0].change.layers)
    mapped = found[-HEAT_MAPS:]
    kinds = list(dict.fromkeys(kind for one in mapped for each in one.change.kinds.values() for kind in each))
    heights = [*([1.6] if importance else []), 2.2, 2.2, *[0.6 + 0.22 * max(3, min(40, len(kinds)))] * len(mapped)]
    size = (max(6.4, min(12.0, 2.5 + 0.14 * len(keys))), sum(heights) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels: list[Any] = list(figure.subplots(len(heights), 1, height_ratios=heights, sharex=True).flat)
    at = iter(panels)
    if importance:
        axes = next(at)
        values = [importance.get(key, float("nan")) for key in keys]
        axes.bar(range(len(keys)), values, color="0.6")
        axes.set_ylabel("importance")
        axes.set_ylim(bottom=0)
    size_of_marker = 4 if len(keys) <= 40 else 2.5
    absolute, share = next(at), next(at)
    lines = []
    for one in found:
        change = one.change
        (line,) = absolute.plot(list(change.layers.values()), "o-", markersize=size_of_marker, linewidth=1.2)
        shares = [100 * (value or 0.0) for value in change.share.values()]
        share.plot(shares, "o-", markersize=size_of_marker, linewidth=1.2)
        lines.append(line)
    absolute.set_ylabel("change\n(sum of norms)")
    share.set_ylabel("share of the\nchange (%)")
    for axes in (absolute, share):
        axes.set_ylim(0, 1.06 * axes.dataLim.ymax or 1)
        axes.grid(alpha=0.3)
    if len(found) > 1:
        legend = figure.legend(
            lines,
            [_label(i, one) for i, one in enumerate(found, 1)],
            fontsize=7,
            loc="outside upper center",
            ncols=min(3, len(found)),
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    most = max((x for one in mapped for each in one.change.kinds.values() for x in each.values()), default=0.0) or 1.0
    for number, one in enumerate(mapped, len(found) - len(mapped) + 1):
        axes = next(at)
        rows = [[one.change.kinds[key].get(kind, float("nan")) for key in keys] for kind in kinds]
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axes.set_yticks(range(len(kinds)), [shown(kind, 24) for kind in kinds], fontsize=7, parse_math=False)
        if len(found) > 1:
            axes.set_title(_label(number, one), fontsize=8, parse_math=False)
        figure.colorbar(image, ax=axes, pad=0.01, label="change")
    panels[-1].set_xlabel("layer")
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(keys) / s <= 5 * size[0])
    ticks = [i for i, key in enumerate(keys) if int(key.rpartition(".")[2]) % step == 0]
    panels[-1].set_xticks(ticks, [keys[i].rpartition(".")[2] for i in ticks], fontsize=8)
    _mark_stacks(panels, keys)
    return figure


def _mark_stacks(panels: Sequence[Any], keys: Sequence[str]) -> None:
    """Draw a line between stacks of layers, and name each, if there are several."""
    prefixes = [key.rpartition(".")[0] for key in keys]
    begins = [i for i, prefix in enumerate(prefixes) if i == 0 or prefix != prefixes[i - 1]]
    if len(begins) < 2:
        return
    for begin in begins:
        for axes in panels:
            axes.axvline(begin - 0.5, color="0.5", linewidth=0.8, linestyle=":")
        panels[0].annotate(
            shown(prefixes[begin], 30),
            (begin - 0.4, 1.02),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            parse_math=False,
        )


def _mismatch_figure(found: Sequence[ModelChange], importance: Mapping[str, float]) -> Figure:
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    size = (max(4.6, 3.6 * columns), 3.5 * lines + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    numbered: list[tuple[Any, dict[str, tuple[float, float]]]] = []
    for i, one in enumerate(found, 1):
        axes: Any = figure.add_subplot(lines, columns, i)
        assert one.mismatch is not None
        points: dict[str, tuple[float, float]] = {}
        for name, third in one.mismatch.thirds.items():
            points |= {key: (importance[key], one.change.layers[key]) for key in third.layers}
            axes.scatter(
                *zip(*(points[key] for key in third.layers), strict=True), s=22, color=COLOURS[name], label=name
            )
        rho = one.mismatch.rho
        interval = f" [{rho.low:+.2f}, {rho.high:+.2f}]" if rho.low == rho.low else ""
        value = f"rho {rho.value:+.2f}{interval}" if rho.value == rho.value else "rho is not defined"
        title = f"{_label(i, one, 40)}\n{value}" if len(found) > 1 else value
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.set_xlabel("importance")
        axes.set_ylabel("change (sum of norms)")
        axes.grid(alpha=0.3)
        axes.margins(0.1)
        if i == 1:
            axes.legend(fontsize=7, title="layers", title_fontsize=7)
        numbered.append((axes, points))
    for axes, points in numbered:  # once all panels have their places
        if len(points) <= NUMBERED:
            numbers = {i: key.rpartition(".")[2] for i, key in enumerate(points)}
            label_points(axes, list(points.values()), numbers, color="0.5")
    return figure


def _label(number: int, one: ModelChange, limit: int = 60) -> str:
    """Return a numbered label: labels may be equal, and a first `_` would hide one from the legend."""
    text = shown(one.label, 400)
    return f"{number}: {text if len(text) <= limit else '…' + text[-limit:]}"
