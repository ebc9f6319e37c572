"""The report of a change as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from ..analysis.verdict import ModelChange
from ..common.messages import shown
from .change_terminal import MEASURES, ends, kind_cells, number, percent, relative_line

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d6d9de; --soft: #f3f4f6; --bar: #b9cbe8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e5e8; --paper: #17191c; --line: #3a3e45; --soft: #22252a;
  --bar: #46689c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.text { white-space: normal; text-align: left; overflow-wrap: anywhere }
td.bar { background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)) }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); padding: .5rem; overflow-x: auto }
figure svg { max-width: 100%; height: auto; display: block; margin: auto }
.verdict { background: var(--soft); border-left: 4px solid var(--bar); padding: .6rem 1rem; overflow-wrap: anywhere }
dt { font-weight: 600; margin-top: .6rem } dd { margin-left: 1.2rem }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # heat maps are images in the SVG

DEFINITIONS = (
    (
        "change",
        "For layer n: the sum over its weight matrices of ||W - W'||_F (arXiv 2503.02103, Eq. 4; that norm"
        " is our choice). A sum of norms, so larger and more matrices count for more.",
    ),
    ("relative", "The change divided by the sum of ||W||_F over the same matrices. Ours."),
    ("share", "The change of a layer divided by that of all layers (figure 12)."),
    ("module", "One kind of matrix over all layers: its change, relative to its norms, and its share of all change."),
    ("in brackets", "Embeddings, heads, norms, biases and others: measured the same way, in no layer's change."),
    ("importance", "For each layer, as in the file; only ratios and ranks count."),
    (
        "rho",
        "Spearman's rank correlation of importance and change over layers, equal values sharing their average rank."
        " In brackets its 95% bootstrap interval over layers, only a guide: layers are not independent draws. Ours.",
    ),
    ("thirds", "With N layers, third t (from 0) holds layers floor(t N / 3) to floor((t + 1) N / 3) - 1."),
    (
        "verdict",
        "Looks superficial: the whole interval of rho lies below 0. Does not look superficial: it lies above 0."
        " Otherwise, and with fewer than 6 layers, undecided. The rule is ours: the paper compares pictures by eye.",
    ),
)


def html_page(
    found: Sequence[ModelChange],
    importance: Mapping[str, float] | None,
    pictures: Sequence[bytes],
    provenance: Mapping[str, str],
) -> str:
    """Return the report as HTML. `pictures` are SVG files, `provenance` says what was measured, and from where."""
    several = len(found) > 1
    parts = ["<h1>Weight change</h1>"]
    for i, one in enumerate(found, 1):
        if one.mismatch is not None:
            name = f"<b>{i}: {_text(one.label)}</b><br>" if several else ""
            more = f"<br>{_text(relative_line(one))}" if relative_line(one) else ""
            parts.append(f'<p class="verdict">{name}{_text(one.mismatch.verdict)}{more}</p>')
    parts += [f"<figure>{inline_svg(svg)}</figure>" for svg in pictures]
    parts += ["<h2>Layers</h2>", _layers(found, importance), "<h2>Kinds of modules</h2>", _kinds(found)]
    thirds = [_thirds(one, f"{i}: {one.label}" if several else "") for i, one in enumerate(found, 1) if one.mismatch]
    parts += ["<h2>Thirds of the layers</h2>", *thirds] if thirds else []
    rows = [[_cell(key), f'<td class="text">{_text(value)}</td>'] for key, value in provenance.items()]
    rows += [
        [_cell("note"), f'<td class="text">{_text(note.removeprefix("note: "))}</td>']
        for note in dict.fromkeys(note for one in found for note in one.change.notes)
    ]
    parts += ["<h2>What was measured</h2>", _table([], rows), "<h2>How each number is defined</h2>", "<dl>"]
    parts += [f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in DEFINITIONS]
    body = "\n".join([*parts, "</dl>"])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Weight change</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def inline_svg(svg: bytes) -> str:
    """Return an SVG file of matplotlib for use in HTML: without prologue and metadata."""
    text = svg.decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _text(value: object) -> str:
    return escape(shown(value, 1000))


def _cell(value: object) -> str:
    return f"<td>{_text(value)}</td>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{_text(each)}</th>' for each in head)}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


def _layers(found: Sequence[ModelChange], importance: Mapping[str, float] | None) -> str:
    most = max(max(one.change.layers.values()) for one in found) or 1.0
    head = ["layer", *(["importance"] if importance else [])]
    head += [f"{what}{end}" for end in ends(found) for what in MEASURES]
    rows = []
    for key in found[0].change.layers:
        row = [_cell(key), *([_cell(number(importance[key]) if key in importance else "-")] if importance else [])]
        for one in found:
            value = one.change.layers[key]
            row.append(f'<td class="bar" style="--part:{100 * value / most:.1f}%">{number(value)}</td>')
            row += [_cell(percent(one.change.relative[key])), _cell(percent(one.change.share[key]))]
        rows.append(row)
    return _table(head, rows)


def _kinds(found: Sequence[ModelChange]) -> str:
    cells = [kind_cells(one) for one in found]
    names = dict.fromkeys(name for each in cells for name in each)
    head = [
        "module",
        *(f"{what} {i}" if len(found) > 1 else what for i in range(1, len(found) + 1) for what in MEASURES),
    ]
    rows = [[_cell(n), *(_cell(c) for each in cells for c in each.get(n, ("-", "-", "-")))] for n in names]
    return _table(head, rows)


def _thirds(one: ModelChange, label: str) -> str:
    assert one.mismatch is not None
    rows = [
        [_cell(name), _cell(len(third.layers)), _cell(percent(third.importance)), _cell(percent(third.change))]
        for name, third in one.mismatch.thirds.items()
    ]
    title = f"<p>{_text(label)}</p>" if label else ""
    return title + _table(["third", "layers", "importance", "change"], rows)
