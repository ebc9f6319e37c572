"""Tables of aligned text, and figures as files."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import Any

_INK = "#808080"  # can be read on light and on dark pages
# Settings of matplotlib for figures without a ground of their own.
ON_ANY_PAGE = {
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none"),
    "legend.framealpha": 0,
}


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] | None = None) -> list[str]:
    """Return the lines of a table, these columns aligned to the right; by default all but the first.

    >>> aligned([["layer", "change"], ["h.0", "1.5"]])
    ['layer  change', 'h.0       1.5']
    """
    columns = list(zip(*rows, strict=True))
    right = range(1, len(columns)) if right is None else right
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def saved(figure: Any, name: str) -> dict[str, bytes]:
    """Return a figure as the files NAME.png and NAME.svg; the same data give the same bytes."""
    import matplotlib as mpl

    files = {}
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": f"mergekit_imm {name}"}):  # distinct ids for several on one page
            figure.savefig(content, format=form, dpi=150, metadata=metadata)
        files[f"{name}.{form}"] = content.getvalue()
    return files
