"""Figures of the change of layers: per layer, per kind of module, and against importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.verdict import LEAST, ModelChange
from ..common.messages import shown
from .labels import label_points
from .tables import drawing, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"early": "#3b76af", "middle": "#c98a1b", "late": "#b0413e"}
HEAT_MAPS = 4  # are drawn in one figure, of the last checkpoints
PICTURED = 12  # checkpoints with panels of their own, the last
PANEL = 4.6  # inches wide: its text can be read on a phone
NUMBERED = 40  # layers at most have their numbers beside their points


def change_picture(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> dict[str, bytes]:
    """Draw importance (figure 3), change, share (figures 4 and 12) and kinds of modules, layer by layer.

    Returns file name -> content, PNG and SVG. Raises ExtraError without matplotlib.
    """
    with drawing():
        return saved(_change_figure(found, importance), "change")


def mismatch_picture(found: Sequence[ModelChange], importance: Mapping[str, float]) -> dict[str, bytes]:
    """Draw importance against change in a panel for each checkpoint, with a colour for each third of the layers.

    They must have enough layers, see `is_enough`. Returns and raises as `change_picture`.
    """
    with drawing():
        return saved(_mismatch_figure(found, importance), "mismatch")


def pictures_of(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> dict[str, bytes]:
    """Draw both figures; that of importance only of checkpoints with enough layers. Raises as they do."""
    against = [one for one in found if is_enough(one)]
    return change_picture(found, importance) | (mismatch_picture(against, importance) if importance and against else {})


def svgs_of(
    found: Sequence[ModelChange], importance: Mapping[str, float] | None
) -> tuple[list[bytes], dict[int, list[bytes]]]:
    """Draw the panels of a page: those of all checkpoints, and of each of the last ones by its index."""
    own = range(max(0, len(found) - PICTURED), len(found))
    return panels(found, importance), {i: panels_of(i + 1, found[i], importance) for i in own}


def panels(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> list[bytes]:
    """Draw what all checkpoints share as SVGs for a page, one panel each: importance, change, share of the change."""
    draw: list[tuple[str, Callable[[Any], Any]]] = [
        ("change", lambda axes: _lines(axes, found)),
        ("share", lambda axes: _lines(axes, found, share=True)),
    ]
    if importance:
        draw.insert(0, ("importance", lambda axes: _importance(axes, list(found[0].change.layers), importance)))
    return [_panel(name, each, list(found[0].change.layers), len(found)) for name, each in draw]


def panels_of(number: int, one: ModelChange, importance: Mapping[str, float] | None) -> list[bytes]:
    """Draw the panels of one checkpoint: kinds of modules, and change against importance of enough layers."""
    keys, kinds = list(one.change.layers), _kinds([one])
    most = max((x for each in one.change.kinds.values() for x in each.values()), default=0.0)
    height = 0.9 + 0.19 * max(3, min(40, len(kinds)))
    found = (
        [_panel(f"kinds {number}", lambda axes: _heat_map(axes, one, kinds, most), keys, 1, height)] if kinds else []
    )
    if importance and is_enough(one):
        with drawing():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(PANEL, 3.2), layout="constrained")
            axes = figure.add_subplot()
            _scatter(axes, one, importance)
            axes.legend(fontsize=7, title="layers", title_fontsize=7)
            _number(axes, one, importance)
            found.append(saved(figure, f"against {number}")[f"against {number}.svg"])
    return found


def is_enough(one: ModelChange) -> bool:
    """Whether a correlation of importance and change says anything: with fewer layers it is not shown."""
    return one.mismatch is not None and one.mismatch.rho.n >= LEAST


def _panel(name: str, draw: Callable[[Any], Any], keys: Sequence[str], lines: int, height: float = 2.1) -> bytes:
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(PANEL, height), layout="constrained")
        axes = figure.add_subplot()
        drawn = draw(axes)
        if lines > 1 and isinstance(drawn, list):
            labels = [str(i) for i in range(1, lines + 1)]
            figure.legend(drawn, labels, fontsize=7, loc="outside upper center", ncols=8, title_fontsize=7)
        _ticks(axes, keys, 5 * PANEL)
        _mark_stacks([axes], keys)
        return saved(figure, name)[f"{name}.svg"]


def _change_figure(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> Figure:
    from matplotlib.figure import Figure

    keys = list(found[0].change.layers)
    mapped = found[-HEAT_MAPS:]
    kinds = _kinds(mapped)
    heights = [*([1.6] if importance else []), 2.2, 2.2, *[0.6 + 0.22 * max(3, min(40, len(kinds)))] * len(mapped)]
    size = (max(6.4, min(12.0, 2.5 + 0.14 * len(keys))), sum(heights) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels: list[Any] = list(figure.subplots(len(heights), 1, height_ratios=heights, sharex=True).flat)
    at = iter(panels)
    if importance:
        _importance(next(at), keys, importance)
    lines = _lines(next(at), found)
    _lines(next(at), found, share=True)
    if len(found) > 1:
        legend = figure.legend(
            lines,
            [_label(i, one, int(20 * size[0] / min(3, len(found))) - 12) for i, one in enumerate(found, 1)],
            fontsize=7,
            loc="outside upper center",
            ncols=min(3, len(found)),
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    most = max((x for one in mapped for each in one.change.kinds.values() for x in each.values()), default=0.0)
    for number, one in enumerate(mapped, len(found) - len(mapped) + 1):
        axes = next(at)
        _heat_map(axes, one, kinds, most)
        if len(found) > 1:
            axes.set_title(_label(number, one), fontsize=8, parse_math=False)
    _ticks(panels[-1], keys, 5 * size[0])
    _mark_stacks(panels, keys)
    return figure


def _kinds(found: Sequence[ModelChange]) -> list[str]:
    return list(dict.fromkeys(kind for one in found for each in one.change.kinds.values() for kind in each))


def _importance(axes: Any, keys: Sequence[str], importance: Mapping[str, float]) -> None:
    axes.bar(range(len(keys)), [importance.get(key, float("nan")) for key in keys], color="0.6")
    axes.set_ylabel("importance")
    axes.set_ylim(bottom=0)


def _lines(axes: Any, found: Sequence[ModelChange], *, share: bool = False) -> list[Any]:
    """Draw the change of each checkpoint over its layers, or its share, and return the lines."""
    size = 4 if len(found[0].change.layers) <= 40 else 2.5
    lines = []
    for one in found:
        change = one.change
        shares = [100 * (value or 0.0) for value in change.share.values()]
        (line,) = axes.plot(shares if share else list(change.layers.values()), "o-", markersize=size, linewidth=1.2)
        lines.append(line)
    axes.set_ylabel("share of the\nchange (%)" if share else "change\n(sum of norms)")
    axes.set_ylim(0, 1.06 * axes.dataLim.ymax or 1)
    axes.grid(alpha=0.3)
    return lines


def _heat_map(axes: Any, one: ModelChange, kinds: Sequence[str], most: float) -> None:
    rows = [[each.get(kind, float("nan")) for each in one.change.kinds.values()] for kind in kinds]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=most or 1.0, interpolation="nearest")
    axes.grid(False)  # whatever the style
    axes.set_yticks(range(len(kinds)), [shown(kind, 24) for kind in kinds], fontsize=7, parse_math=False)
    axes.figure.colorbar(image, ax=axes, pad=0.01, label="change")


def _ticks(axes: Any, keys: Sequence[str], most: float) -> None:
    """Name the axis of layers, with at most so many numbers."""
    axes.set_xlabel("layer")
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(keys) / s <= most)
    ticks = [i for i, key in enumerate(keys) if int(key.rpartition(".")[2]) % step == 0]
    axes.set_xticks(ticks, [keys[i].rpartition(".")[2] for i in ticks], fontsize=8)


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
    panels = []
    for i, one in enumerate(found, 1):
        axes: Any = figure.add_subplot(lines, columns, i)
        _scatter(axes, one, importance)
        assert one.mismatch is not None
        rho = one.mismatch.rho
        interval = f" [{rho.low:+.2f}, {rho.high:+.2f}]" if rho.low == rho.low else ""
        value = f"rho {rho.value:+.2f}{interval}" if rho.value == rho.value else "rho is not defined"
        title = f"{_label(i, one, 40)}\n{value}" if len(found) > 1 else value
        axes.set_title(title, fontsize=8, parse_math=False)
        if i == 1:
            axes.legend(fontsize=7, title="layers", title_fontsize=7)
        panels.append(axes)
    for axes, one in zip(panels, found, strict=True):  # once all panels have their places
        _number(axes, one, importance)
    return figure


def _scatter(axes: Any, one: ModelChange, importance: Mapping[str, float]) -> None:
    """Draw a point for each layer, coloured by its third."""
    assert one.mismatch is not None
    for name, third in one.mismatch.thirds.items():
        x = [importance[key] for key in third.layers]
        y = [one.change.layers[key] for key in third.layers]
        axes.scatter(x, y, s=22, color=COLOURS[name], label=name)
    axes.set_xlabel("importance")
    axes.set_ylabel("change (sum of norms)")
    axes.grid(alpha=0.3)
    axes.margins(0.1)


def _number(axes: Any, one: ModelChange, importance: Mapping[str, float]) -> None:
    """Write the numbers of layers beside their points; the panel has its place by now."""
    assert one.mismatch is not None
    layers = [key for third in one.mismatch.thirds.values() for key in third.layers]
    if len(layers) <= NUMBERED:
        numbers = {i: key.rpartition(".")[2] for i, key in enumerate(layers)}
        label_points(axes, [(importance[key], one.change.layers[key]) for key in layers], numbers, color="0.5")


def _label(number: int, one: ModelChange, limit: int = 60) -> str:
    """Return a numbered label: labels may be equal, and a first `_` would hide one from the legend."""
    text = shown(one.label, 400)
    return f"{number}: {text if len(text) <= limit else '…' + text[-limit:]}"
