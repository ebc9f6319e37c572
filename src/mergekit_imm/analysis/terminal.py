"""The diagnosis on a terminal: a table of layers with bars, the kinds of weights, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import shown
from .change import Amount, WeightChange
from .mismatch import THIRDS, Mismatch

_BAR = 20


def view(
    changes: Mapping[str, WeightChange],
    importance: Mapping[str, float] | None = None,
    found: Mapping[str, Sequence[Mismatch]] | None = None,
) -> str:
    """Return the tables of one or several changes, and what is said of each against an importance."""
    parts = [_layers(changes, importance), _kinds(changes), _outside(changes)]
    for name, verdicts in (found or {}).items():
        parts.append("\n".join(_verdict(name if len(changes) > 1 else "", each) for each in verdicts))
    left_out = {name: change.left_out for name, change in changes.items() if change.left_out}
    parts += [f"not compared, as one of the models lacks them: {_named(names)}" for names in left_out.values()]
    return "\n\n".join(part for part in parts if part)


def _layers(changes: Mapping[str, WeightChange], importance: Mapping[str, float] | None) -> str:
    names = list(changes)
    first = changes[names[0]]
    single = len(names) == 1
    head = ["layer", *(["importance"] if importance else [])]
    head += ["change", "relative", "share"] if single else [shown(name, 24) for name in names]
    rows = [head]
    total = sum(importance.values()) if importance else 0.0
    for layer in first.layers:
        row = [shown(layer)]
        if importance:
            row.append(f"{100 * importance[layer] / total:.1f} %" if layer in importance else "")
        amounts = [changes[name].layers[layer] for name in names]
        if single:
            row += [f"{amounts[0].change:.4g}", _percent(amounts[0].relative), _percent(amounts[0].share)]
        else:
            row += [_percent(amount.relative) for amount in amounts]
        rows.append(row)
    lines = _table(rows)
    if single:
        shares = [amount.share or 0.0 for amount in first.layers.values()]
        most = max(shares, default=0.0) or 1.0
        bars = ["", *("#" * round(_BAR * share / most) for share in shares)]
        lines = [f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]
    else:
        lines.insert(0, "relative change, ||W' - W|| of a layer's linear weights over ||W||")
    return "\n".join(lines)


def _kinds(changes: Mapping[str, WeightChange]) -> str:
    names = list(changes)
    rows = [["kind of weight", *(["relative"] if len(names) == 1 else [shown(name, 24) for name in names])]]
    rows += [
        [shown(kind), *(_percent(_all(changes[name].kinds[kind])) for name in names)]
        for kind in changes[names[0]].kinds
    ]
    return "\n".join(_table(rows))


def _outside(changes: Mapping[str, WeightChange]) -> str:
    names = list(changes)
    rows = [["outside", *(["relative"] if len(names) == 1 else [shown(name, 24) for name in names])]]
    for bucket in changes[names[0]].outside:
        amounts = [changes[name].outside.get(bucket) for name in names]
        rows.append([bucket, *(_percent(amount.relative if amount else None) for amount in amounts)])
    return "\n".join(_table(rows)) if len(rows) > 1 else ""


def _all(amounts: Mapping[str, Amount]) -> float | None:
    norm = sum(amount.norm for amount in amounts.values())
    return sum(amount.change for amount in amounts.values()) / norm if norm else None


def _verdict(name: str, each: Mismatch) -> str:
    rows = [["", "layers", "importance", "change"]]
    rows += [
        [third, str(found.layers), _percent(found.importance), _percent(found.change)]
        for third, found in ((third, each.thirds[third]) for third in THIRDS)
    ]
    title = f"{shown(name)}, {shown(each.stack)}" if name else shown(each.stack)
    return "\n".join([f"{title}:", *(f"  {line}" for line in _table(rows)), each.verdict])


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.3g} %"


def _named(names: Sequence[str]) -> str:
    listed = ", ".join(map(shown, names[:4]))
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
