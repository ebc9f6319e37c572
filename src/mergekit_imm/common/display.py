"""How a result looks where a session or a notebook shows it: one line, or a small table with a picture.

A class of results derives from `Displayed` and says in `_summary` what matters of it, names escaped by `shown`. HTML is
self-contained: no scripts, nothing fetched, only the colours of the page around it, so that it suits light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .messages import shown

LINES, ROWS = 3, 12  # of notes and of a table; a result may have thousands
_FAINT = "opacity:.7"
_TABLE = "border-collapse:collapse;margin:.4em 0;font-variant-numeric:tabular-nums"
_CELL = "padding:.15em .7em;border-bottom:1px solid rgba(128,128,128,.35);vertical-align:top"
_WIDTH, _HEIGHT = 460, 110  # of a picture, in its own units


@dataclass(frozen=True)
class Summary:
    """What matters of a result: a line, up to three more (notes, problems), and a table for notebooks."""

    line: str
    more: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Displayed:
    """A result whose repr is a few lines, and which notebooks show as a small table. Its dataclass has repr=False."""

    def _summary(self) -> Summary:
        raise NotImplementedError

    def _picture(self) -> str:
        """Return an SVG, or "" for none."""
        return ""

    def __repr__(self) -> str:
        """Return a few lines, whatever the size of the result."""
        found = self._summary()
        return "\n  ".join([f"{type(self).__name__}: {_cut(found.line)}", *_few(found.more, LINES)])

    def _repr_html_(self) -> str:
        found = self._summary()
        lines = "".join(f'<div style="{_FAINT}">{escape(each)}</div>' for each in _few(found.more, LINES))
        title = f"<b>{type(self).__name__}</b>: {escape(_cut(found.line))}"
        return f"<div>{title}{lines}{_table(found.head, found.rows)}{self._picture()}</div>"


def _few(lines: Sequence[str], most: int) -> list[str]:
    """Return the first lines, cut, and how many are left out."""
    rest = len(lines) - most
    return [_cut(each) for each in lines[:most]] + ([f"… and {rest} more"] if rest > 0 else [])


def _cut(text: str, limit: int = 300) -> str:
    """Return a text on one line, cut; what cannot be printed is escaped, in texts that were not written here too."""
    line = "".join(c if c.isprintable() else shown(c) for c in text[: limit + 1])
    return line if len(text) <= limit else line[: limit - 1] + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    rest = len(rows) - ROWS
    cells = [_row("td", each) for each in rows[:ROWS]]
    if rest > 0:
        cells.append(f'<tr><td colspan="{len(rows[0])}" style="{_CELL};text-align:left">… and {rest} more</td></tr>')
    top = _row("th", head) if head else ""
    return f'<table style="{_TABLE}">{top}{"".join(cells)}</table>'


def _row(tag: str, cells: Sequence[str]) -> str:
    sides = ("left" if i == 0 else "right" for i in range(len(cells)))
    return "".join(
        [
            "<tr>",
            *(
                f'<{tag} style="{_CELL};text-align:{side}">{escape(_cut(each))}</{tag}>'
                for each, side in zip(cells, sides, strict=True)
            ),
            "</tr>",
        ]
    )


def bars(values: Mapping[str, float], title: str) -> str:
    """Return an SVG with a bar for each value, from 0; its keys are layers, of which the numbers are shown.

    >>> bars({"h.0": 1.0, "h.1": 2.0}, "change").count("<rect")
    2
    """
    most = max(values.values(), default=0.0) or 1.0
    width = _WIDTH / max(1, len(values))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if len(values) / s <= 24)
    parts = [f'<text x="0" y="12">{escape(title)}, at most {most:.4g}</text>']
    for i, (key, value) in enumerate(values.items()):
        height = (_HEIGHT - 36) * max(0.0, value) / most if math.isfinite(value) else 0.0
        said = escape(f"{shown(key)}: {value:.4g}")
        parts.append(
            f'<rect x="{i * width + width / 10:.2f}" y="{_HEIGHT - 16 - height:.2f}" width="{width * 0.8:.2f}"'
            f' height="{height:.2f}" fill-opacity=".55"><title>{said}</title></rect>'
        )
        number = key.rpartition(".")[2]
        if number.isdecimal() and int(number) % step == 0:
            parts.append(f'<text x="{(i + 0.5) * width:.2f}" y="{_HEIGHT - 2}" text-anchor="middle">{number}</text>')
    return _svg(title, parts)


def points(places: Sequence[tuple[float, float]], labels: Sequence[str], ringed: Sequence[int], title: str) -> str:
    """Return an SVG with a point for each place, more to the right and up, and a ring around some.

    >>> points([(0.1, 0.5), (0.2, 0.4)], ["a", "b"], [1], "x, y").count("<circle")
    3
    """
    parts, height = [f'<text x="0" y="12">{escape(title)}</text>'], 2 * _HEIGHT
    scaled = list(zip(*(_scaled(axis) for axis in zip(*places, strict=True)), strict=True))
    taken: list[tuple[float, float, int]] = []  # left end, baseline and letters of the labels
    for i, ((right, up), label) in enumerate(zip(scaled, labels, strict=True)):
        x, y = 12 + right * (_WIDTH - 110), height - 10 - up * (height - 40)
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="currentColor"/>'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>{ring if i in ringed else ""}')
        text = shown(label, 24)
        free = (
            y + by
            for by in (4, -6, 14)
            if y + by < height
            and all(abs(y + by - b) >= 10 or abs(x - a) >= 6 * (n if a < x else len(text)) for a, b, n in taken)
        )
        base = next(free, y + 4)
        taken.append((x, base, len(text)))
        parts.append(f'<text x="{x + 9:.1f}" y="{base:.1f}">{escape(text)}</text>')
    return _svg(title, parts, height)


def _scaled(values: Sequence[float]) -> list[float]:
    """Return values from 0 to 1; equal ones in the middle."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _svg(title: str, parts: Sequence[str], height: int = _HEIGHT) -> str:
    style = f"max-width:{_WIDTH}px;width:100%;height:auto;display:block;font:10px sans-serif"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}" fill="currentColor"'
        f' style="{style}">{"".join(parts)}</svg>'
    )
