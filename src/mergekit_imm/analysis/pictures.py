"""Pictures of the diagnosis: importance and change, layer by layer (the paper's figures 3, 4 and 12)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.disk import replace_file
from ..errors import CheckpointError, shown
from .change import Amount, WeightChange, by_stack
from .mismatch import THIRDS, Mismatch

_COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00")
_OF_THIRDS = dict(zip(THIRDS, ("#1b9e77", "#d95f02", "#7570b3"), strict=True))
_MAPS = 4  # heat maps of kinds side by side


def draw_change(changes: Mapping[str, WeightChange]) -> Any:
    """Draw the change of each layer, absolute, relative, and as a share, for one or several models (figures 4, 12)."""
    stacks = list(by_stack(next(iter(changes.values())).layers))
    panels = (("change", "||W' - W||, summed", 1.0), ("relative", "relative change, %", 100.0),
              ("share", "share of the change, %", 100.0))  # fmt: skip
    with _figure(3.7 * len(panels), 2.9 * max(1, len(stacks))) as figure:
        for line, (stack, keys) in enumerate(stacks):
            for column, (field, label, unit) in enumerate(panels):
                axes = figure.add_subplot(len(stacks), len(panels), line * len(panels) + column + 1)
                for number, (name, change) in enumerate(changes.items()):
                    values = [getattr(change.layers[key], field) for key in keys]
                    drawn = [float("nan") if value is None else unit * value for value in values]
                    _line(axes, keys, drawn, _COLOURS[number % len(_COLOURS)], name)
                axes.set_ylim(bottom=0)
                axes.set_ylabel(label)
                axes.set_title(shown(stack, 40) if len(stacks) > 1 else "", parse_math=False)
                if line == column == 0 and len(changes) > 1:
                    axes.legend(fontsize=7)
        return figure


def draw_kinds(changes: Mapping[str, WeightChange]) -> Any:
    """Draw the relative change of each kind of weight in each layer, as a map, of the last models."""
    last = dict(list(changes.items())[-_MAPS:])
    first = next(iter(last.values()))
    kinds, layers = list(first.kinds), list(first.layers)
    with _figure(1.6 + max(2.6, 0.18 * len(layers)) * len(last), 1.3 + 0.24 * len(kinds)) as figure:
        worth = [a.relative for change in last.values() for kind in change.kinds.values() for a in kind.values()]
        most = 100 * max((value for value in worth if value is not None), default=0.0) or 1.0
        for number, (name, change) in enumerate(last.items()):
            axes = figure.add_subplot(1, len(last), number + 1)
            grid = [[_percent(change.kinds[kind].get(layer)) for layer in layers] for kind in kinds]
            image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
            axes.set_title(shown(name, 40) if len(last) > 1 else "", parse_math=False)
            axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds] if number == 0 else [])
            _ticks(axes, layers)
        figure.colorbar(image, ax=figure.axes, label="relative change, %", shrink=0.9)
        return figure


def draw_mismatch(importance: Mapping[str, float], change: WeightChange, found: Sequence[Mismatch]) -> Any:
    """Draw importance and change of each layer, and one against the other (figures 3 and 4 in one)."""
    with _figure(9.6, 3.3 * len(found)) as figure:
        for line, each in enumerate(found):
            keys = dict(by_stack(importance))[each.stack]
            sizes, changes = [importance[key] for key in keys], [change.layers[key].change for key in keys]
            shares = [[100 * v / (sum(values) or 1) for v in values] for values in (sizes, changes)]
            third = [THIRDS[3 * n // len(keys)] for n in range(len(keys))]
            axes = figure.add_subplot(len(found), 2, 2 * line + 1)
            for name in THIRDS:
                places = [n for n, of in enumerate(third) if of == name]
                if places:
                    axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=_OF_THIRDS[name], alpha=0.08, linewidth=0)
            _line(axes, keys, shares[0], "#333333", "importance", "o-")
            _line(axes, keys, shares[1], "#dc3912", "change", "s--")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("share of all layers, %")
            axes.legend(fontsize=7)
            axes = figure.add_subplot(len(found), 2, 2 * line + 2)
            for name in THIRDS:
                places = [n for n, of in enumerate(third) if of == name]
                axes.scatter(
                    [shares[0][n] for n in places], [shares[1][n] for n in places], s=22, color=_OF_THIRDS[name],
                    label=f"{name} layers",
                )  # fmt: skip
            if len(keys) <= 40:
                for n in range(len(keys)):
                    axes.annotate(
                        keys[n].rpartition(".")[2], (shares[0][n], shares[1][n]), fontsize=6, xytext=(3, 3),
                        textcoords="offset points",
                    )  # fmt: skip
            axes.set_xlabel("share of the importance, %")
            axes.set_ylabel("share of the change, %")
            interval = f"{each.rho.low:+.2f} to {each.rho.high:+.2f}"
            axes.set_title(f"{shown(each.stack, 40)}: rho {each.rho.value:+.2f} ({interval})", parse_math=False)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        return figure


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CheckpointError(
            "matplotlib is not installed, which draws the pictures; pip install 'mergekit-imm[analyze]'"
        ) from error
    with mpl.rc_context({"svg.hashsalt": "mergekit_imm", "font.size": 9}):
        yield Figure(figsize=(width, height), layout="constrained")


def _line(axes: Any, keys: Sequence[str], values: Sequence[float], colour: str, label: str, style: str = "o-") -> None:
    size = 3.5 if len(keys) <= 40 else 1.5
    axes.plot(range(len(keys)), values, style, color=colour, label=shown(label, 40), markersize=size, linewidth=1.2)
    _ticks(axes, keys)
    axes.grid(alpha=0.3)


def _ticks(axes: Any, keys: Sequence[str]) -> None:
    step = max(1, -(-len(keys) // 12))
    axes.set_xticks(range(0, len(keys), step), [key.rpartition(".")[2] for key in keys[::step]])
    axes.set_xlabel("layer")


def _percent(amount: Amount | None) -> float:
    return float("nan") if amount is None or amount.relative is None else 100 * amount.relative


def _short(kind: str) -> str:
    """The end of a kind's name that tells it from others."""
    parts = kind.removesuffix(".weight").split(".*.", 1)
    return shown(parts[-1], 30)


def to_png(figure: Any) -> bytes:
    """Return a picture as PNG, the same bytes for the same data."""
    return _saved(figure, "png", {"Software": None})


def to_svg(figure: Any) -> bytes:
    """Return a picture as SVG, the same bytes for the same data."""
    return _saved(figure, "svg", {"Date": None})


def _saved(figure: Any, kind: str, metadata: Mapping[str, Any]) -> bytes:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "mergekit_imm", "font.size": 9}), io.BytesIO() as file:
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
        return file.getvalue()


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a picture as NAME.png and NAME.svg, each whole or not at all."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path, content in zip(paths, (to_png(figure), to_svg(figure)), strict=True):
        replace_file(path, content)
    return paths
