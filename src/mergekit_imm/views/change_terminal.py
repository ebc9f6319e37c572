"""Importance and change of layers as text: a line with a bar for each layer, kinds of modules, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..analysis.verdict import LEAST, ModelChange
from ..common.messages import shown
from ..options.layer_factors import Importance, importance_factors
from .tables import aligned

MEASURES = ("change", "relative", "share")
BARS = 3  # with more checkpoints side by side there is no room for bars
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(part: float, width: int) -> str:
    """Return a bar that fills part of a width, to an eighth of a character.

    >>> bar(0.5, 5)
    '██▌'
    """
    eighths = round(max(0.0, min(1.0, part)) * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def percent(value: float | None) -> str:
    """Return a share in three significant digits; a dash for None.

    >>> percent(0.1234), percent(0.000123), percent(None)
    ('12.3%', '0.0123%', '-')
    """
    return "-" if value is None else f"{100 * value:#.3g}".rstrip(".") + "%"


def number(value: float) -> str:
    """Return a norm or an importance in four significant digits.

    >>> number(1.32456), number(0.0000123)
    ('1.325', '1.230e-05')
    """
    return f"{value:#.4g}".rstrip(".")


def importance_table(found: Importance) -> str:
    """Return a line for each layer: its importance, the factor that a merge would use, a bar."""
    factors = importance_factors(found.layers)
    rows = [[shown(key, 40), number(value), f"{factors[key]:.3f}"] for key, value in found.layers.items()]
    head, *lines = aligned([["layer", "importance", "factor"], *rows])
    most = max(found.layers.values())
    of = f"{found.sequences} sequences, {found.tokens} tokens, loss {found.loss:.4f} nats a token"
    bars = (f"{line}  {bar(value / most, 30)}" for line, value in zip(lines, found.layers.values(), strict=True))
    outside = ", ".join(f"{key} {number(value)}" for key, value in found.outside.items() if value)
    return "\n".join(
        [f"order {found.order}, {of}", head, *bars, f"outside the layers' linear weights: {outside or 'nothing'}"]
    )


def kind_cells(one: ModelChange) -> dict[str, tuple[str, str, str]]:
    """Return change, relative and share of each kind of module, over all layers; in brackets what no layer counts."""
    cells = {
        kind: (number(each.change), percent(each.relative), percent(each.share))
        for kind, each in one.change.modules.items()
    }
    return cells | {f"({kind})": (number(value), "-", "-") for kind, value in one.change.elsewhere.items()}


def render(found: Sequence[ModelChange], importance: Mapping[str, float] | None, width: int = 100) -> str:
    """Return the tables of all checkpoints, side by side, then the verdicts. `importance` is by full layer key."""
    lines = (
        [f"{i}  {shown(one.label)}" for i, one in enumerate(found, 1)] if len(found) > 1 else [shown(found[0].label)]
    )
    lines += ["", *_layers(found, importance, width), "", *_kinds(found)]
    for i, one in enumerate(found, 1):
        if one.mismatch is not None:
            lines += ["", *_verdict(one, f"{i}  " if len(found) > 1 else "")]
    return "\n".join(line.rstrip() for line in lines)


def _layers(found: Sequence[ModelChange], importance: Mapping[str, float] | None, width: int) -> list[str]:
    head = ["layer", *(["importance"] if importance else [])]
    head += [f"{what}{end}" for end in ends(found) for what in MEASURES]
    rows = []
    for key in found[0].change.layers:
        row = [shown(key, 40), *([number(importance[key]) if key in importance else "-"] if importance else [])]
        for one in found:
            change = one.change
            row += [number(change.layers[key]), percent(change.relative[key]), percent(change.share[key])]
        rows.append(row)
    lines = aligned([head, *rows])
    if len(found) <= BARS:
        room = max(6, min(30, (width - len(lines[0])) // len(found) - 2))
        most = max(max(one.change.layers.values()) for one in found) or 1.0
        width = len(lines[0])
        for at, key in enumerate(found[0].change.layers, 1):
            bars = (bar(one.change.layers[key] / most, room).ljust(room) for one in found)
            lines[at] = "  ".join([lines[at].ljust(width), *bars])
    return lines


def _kinds(found: Sequence[ModelChange]) -> list[str]:
    cells = [kind_cells(one) for one in found]
    names = list(dict.fromkeys(name for each in cells for name in each))
    head = ["module", *(f"{what}{end}" for end in ends(found) for what in MEASURES)]
    body = [[shown(name, 40), *(c for each in cells for c in each.get(name, ("-", "-", "-")))] for name in names]
    return [*aligned([head, *body]), "in brackets: tensors not counted in any layer's change"]


def ends(found: Sequence[ModelChange]) -> list[str]:
    """Return what the column titles of each checkpoint end in: its number, if there are several."""
    return [f" {i}" for i in range(1, len(found) + 1)] if len(found) > 1 else [""]


def _verdict(one: ModelChange, label: str) -> list[str]:
    found = one.mismatch
    assert found is not None
    rows = [["third", "layers", "importance", "change"]]
    rows += [
        [name, str(len(third.layers)), percent(third.importance), percent(third.change)]
        for name, third in found.thirds.items()
    ]
    return [*aligned(rows), f"{label}{found.verdict}", *([relative_line(one)] if relative_line(one) else [])]


def relative_line(one: ModelChange) -> str:
    """Return a line with the correlation of importance and relative change; "" if undefined, or of too few layers."""
    if one.mismatch is None or math.isnan(one.mismatch.relative.value) or one.mismatch.relative.n < LEAST:
        return ""
    rho = one.mismatch.relative
    interval = "" if math.isnan(rho.low) else f" [{rho.low:+.2f}, {rho.high:+.2f}]"
    return f"For the relative change: rho {rho.value:+.2f}{interval}."
