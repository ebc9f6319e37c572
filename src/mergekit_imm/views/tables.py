"""What tables on a terminal and pictures have in common."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right.

    >>> aligned([["layer", "change"], ["h.0", "1.5"]])
    ['layer  change', 'h.0       1.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def saved(figure: Any, name: str) -> dict[str, bytes]:
    """Return a picture as the files NAME.png and NAME.svg, of the same bytes for the same data."""
    import matplotlib as mpl

    files = {}
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": f"mergekit_imm {name}"}):  # ids of its own, in a page of several
            figure.savefig(content, format=form, dpi=150, metadata=metadata)
        files[f"{name}.{form}"] = content.getvalue()
    return files
