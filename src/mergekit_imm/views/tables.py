"""Tables of aligned text, and figures as files."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import extra_error

INK = "#808080"  # can be read on light and on dark pages


@contextmanager
def drawing() -> Iterator[None]:
    """Let figures be drawn without a ground of their own, for light and dark pages. Raises ExtraError."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise extra_error("a picture", "matplotlib") from error
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    grounds = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    settings = {"font.size": 9, "legend.framealpha": 0, **dict.fromkeys(inks, INK), **dict.fromkeys(grounds, "none")}
    with mpl.rc_context(settings):
        yield


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
