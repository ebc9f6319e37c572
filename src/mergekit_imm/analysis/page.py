"""The diagnosis as one HTML file that needs nothing else: pictures, tables, what each number means, and is of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .change import WeightChange
from .mismatch import THIRDS, Mismatch

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #666; --line: #ddd; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --soft: #9aa0a8; --line: #3a3f47; --card: #22262c; }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 68rem;
  padding: 1.5rem;
}
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.verdict { background: var(--card); border-left: 4px solid #3366cc; padding: .7rem 1rem; margin: .6rem 0; }
figure {
  margin: .5rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem;
  overflow-x: auto;
}
figure svg { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
.wide { overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; } .soft { color: var(--soft); overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--soft); }
"""

_MEANINGS = {
    "change of a layer": "DeltaW = the sum over its linear weights W of ||W' - W||, Frobenius norms (Eq. 4 of arXiv"
    " 2503.02103; the paper does not name the norm). Embeddings, head, norms and biases are apart.",
    "relative": "that sum, divided by the sum of ||W|| over the same weights.",
    "share": "a layer's part of the change, or of the importance, of all layers of its stack of layers.",
    "importance of a layer": "I = the sum over its linear weights of |G * W|, G the gradient of the mean loss on the"
    " data named below (Eq. 3), unless its order says otherwise.",
    "rho": "Spearman's rank correlation of importance and change over the layers, with a 95 % bootstrap interval over"
    " layers. Ours: the paper compares plots.",
    "thirds": "layer l of L belongs to third floor(3 l / L).",
    "verdict": "superficial if all of the interval of rho lies below 0, not so if all of it lies above, else it cannot"
    " be told; nor can it with fewer than 6 layers. A rule of thumb of ours, not a test: it says where weights moved,"
    " and not whether the model got better.",
}


def html_page(
    changes: Mapping[str, WeightChange],
    pictures: Mapping[str, bytes],
    provenance: Mapping[str, str],
    importance: Mapping[str, float] | None = None,
    found: Mapping[str, Sequence[Mismatch]] | None = None,
) -> bytes:
    """Return the report: `pictures` are SVG by their titles, `provenance` what the numbers are of."""
    models = ", ".join(changes)
    body = [f"<h1>Where the weights changed</h1><p class='soft'>{escape(models)}</p>"]
    for name, verdicts in (found or {}).items():
        for each in verdicts:
            title = f"<b>{escape(name)}</b>, {escape(each.stack)}: " if len(changes) > 1 or len(verdicts) > 1 else ""
            body.append(f"<p class='verdict'>{title}{escape(each.verdict)}</p>")
    for number, (title, svg) in enumerate(pictures.items()):
        body.append(f"<h2>{escape(title)}</h2><figure>{_inline(svg, f'p{number}-')}</figure>")
    body += [
        f"<h2>Thirds of {escape(each.stack)}, {escape(name)}</h2>{_thirds(each)}"
        for name, verdicts in (found or {}).items()
        for each in verdicts
    ]
    body.append(f"<h2>Layers</h2>{_layers(changes, importance)}")
    body.append(f"<h2>Kinds of weights, relative change</h2>{_kinds(changes)}")
    body.append(f"<h2>Outside the layers' linear weights, relative change</h2>{_outside(changes)}")
    meanings = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _MEANINGS.items())
    body.append(f"<h2>What the numbers are</h2><dl>{meanings}</dl>")
    rows = "".join(f"<dt>{escape(key)}</dt><dd class='soft'>{escape(value)}</dd>" for key, value in provenance.items())
    body.append(f"<h2>What they are of</h2><dl>{rows}</dl>")
    page = (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(models)}: where the weights changed</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    return page.encode()


def _inline(svg: bytes, prefix: str) -> str:
    """Return an SVG as it may stand in a page beside others: ids of its own, no header, no word of its maker."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', text)
    return text.replace("url(#", f"url(#{prefix}")


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.3g} %"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = rows
    lines = ["<div class='wide'><table><tr>", *(f"<th>{escape(str(cell))}</th>" for cell in head), "</tr>"]
    for row in body:
        lines += ["<tr>", *(f"<td>{escape(str(cell))}</td>" for cell in row), "</tr>"]
    return "".join([*lines, "</table></div>"])


def _layers(changes: Mapping[str, WeightChange], importance: Mapping[str, float] | None) -> str:
    names = list(changes)
    fields = ("change", "relative", "share")
    several = len(names) > 1
    head = ["layer", *(["importance", "share"] if importance else [])]
    head += [f"{field} {name}" if several else field for name in names for field in fields]
    rows = [head]
    total = sum(importance.values()) if importance else 0.0
    for layer in changes[names[0]].layers:
        row = [layer]
        if importance:
            there = layer in importance
            row += [f"{importance[layer]:.4g}", _percent(importance[layer] / total)] if there else ["", ""]
        for name in names:
            amount = changes[name].layers[layer]
            row += [f"{amount.change:.4g}", _percent(amount.relative), _percent(amount.share)]
        rows.append(row)
    return _table(rows)


def _kinds(changes: Mapping[str, WeightChange]) -> str:
    rows = [["kind", *changes]]
    for kind in next(iter(changes.values())).kinds:
        cells = []
        for change in changes.values():
            amounts = change.kinds[kind].values()
            norm = sum(amount.norm for amount in amounts)
            cells.append(_percent(sum(amount.change for amount in amounts) / norm if norm else None))
        rows.append([kind, *cells])
    return _table(rows)


def _outside(changes: Mapping[str, WeightChange]) -> str:
    rows = [["", *changes]]
    for bucket in next(iter(changes.values())).outside:
        found = [change.outside.get(bucket) for change in changes.values()]
        rows.append([bucket, *(_percent(amount.relative if amount else None) for amount in found)])
    return _table(rows)


def _thirds(each: Mismatch) -> str:
    rows: list[list[Any]] = [["", "layers", "share of importance", "share of change"]]
    for third in THIRDS:
        found = each.thirds[third]
        rows.append([third, found.layers, _percent(found.importance), _percent(found.change)])
    return _table(rows)
