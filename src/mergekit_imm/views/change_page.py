"""The report of a change as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from ..analysis.verdict import ModelChange
from ..common.messages import shown
from .change_figure import is_enough
from .change_terminal import MEASURES, kind_cells, number, percent, relative_line

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d6d9de; --soft: #f3f4f6; --bar: #b9cbe8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e5e8; --paper: #17191c; --line: #3a3e45; --soft: #22252a;
  --bar: #46689c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  overflow-wrap: normal }
th:first-child, td:first-child, td.text { text-align: left; overflow-wrap: anywhere }
td:first-child { min-width: 6.2em }
td.bar { background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)) }
.answer { font-size: 1.1rem; background: var(--soft); border-left: 4px solid var(--bar); padding: .6rem 1rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .5rem 1rem;
  margin: 1rem 0 }
figure { margin: 0; min-width: 0 } figure svg { width: 100%; max-width: 34rem; height: auto; display: block }
summary { cursor: pointer; font-weight: 600; padding: .35rem 0 } details { border-bottom: 1px solid var(--line) }
dt { font-weight: 600; margin-top: .6rem } dd { margin-left: 1.2rem }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .7rem } table { font-size: .78rem }
  th, td { padding: .2rem .3rem } }
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
        " Otherwise, and with fewer than 6 layers, undecided. The rule is ours: the paper compares pictures by eye."
        " Ordinary fine-tuning can look superficial too, so measure some beside it.",
    ),
)


def html_page(
    found: Sequence[ModelChange],
    importance: Mapping[str, float] | None,
    provenance: Mapping[str, str],
    shared: Sequence[bytes] = (),
    own: Mapping[int, Sequence[bytes]] | None = None,
) -> str:
    """Return the report as HTML. `provenance` says what was measured, and from where.

    `shared` are SVG files of all checkpoints, `own` those of each, by its index.
    """
    several = len(found) > 1
    parts = ["<h1>Weight change</h1>", f'<p class="answer">{_text(answer(found))}</p>']
    parts += [_models(found)] if several else []
    parts += [_figures(shared)]
    for i, one in enumerate(found):
        section = _section(one, importance, (own or {}).get(i, ()), with_verdict=several)
        title = f"<summary>{i + 1}: {_text(one.label)}</summary>"
        parts.append(f"<details>{title}{section}</details>" if several else section)
    rows = [[_cell(key), f'<td class="text">{_text(value)}</td>'] for key, value in provenance.items()]
    rows += [
        [_cell("note"), f'<td class="text">{_text(note.removeprefix("note: "))}</td>']
        for note in dict.fromkeys(note for one in found for note in one.change.notes)
    ]
    parts += ["<h2>What was measured</h2>", _table([], rows)]
    terms = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in DEFINITIONS)
    parts += [f"<h2>How each number is defined</h2>\n<dl>{terms}</dl>"]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Weight change</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def described(about: Mapping[str, object]) -> dict[str, str]:
    """Return what an importance file says of itself as rows for people: its plain values, those of a mapping joined."""
    rows = {}
    for key, value in about.items():
        if isinstance(value, Mapping):
            inside = {k: v for k, v in value.items() if isinstance(v, str | int | float)}
            value = ", ".join(f"{shown(k, 40)} {shown(v, 80)}" for k, v in inside.items())
        if key not in _BESIDE and isinstance(value, str | int | float) and value != "":
            rows[f"importance: {shown(key, 40)}"] = shown(value, 400)
    return rows


_BESIDE = ("format", "version")  # of the file, not of what was measured


def answer(found: Sequence[ModelChange]) -> str:
    """Return what the report says, with its numbers, in one or two sentences; or what is missing to say it."""
    words = Counter(_word(one) for one in found if one.mismatch is not None)
    if not words:
        moved = sorted(x for x in map(_relative, found) if x is not None)
        shares = {layer: share or 0.0 for layer, share in found[0].change.share.items()}
        most = max(shares, key=shares.__getitem__)
        if not any(any(one.change.layers.values()) for one in found):
            return "No weight matrix of a layer changed."
        by = f"{percent(moved[0])}" + (f" to {percent(moved[-1])}" if len(found) > 1 else "") if moved else "-"
        alike = shares[most] - min(shares.values()) < 0.01
        where = ", all alike" if alike else f", most in {shown(most, 60)}: {percent(shares[most])} of all change"
        return (
            f"The weights of the layers moved by {by} of their norms{where if len(found) == 1 else ''}. Whether they"
            " moved where it matters needs --importance FILE."
        )
    first = found[0].mismatch
    assert first is not None
    if not any(map(is_enough, found)):
        return first.verdict
    if len(found) > 1:
        said = ", ".join(f"{words[word]} {_WORDS[word][words[word] > 1]}" for word in _WORDS if words[word])
        rhos = sorted(
            one.mismatch.rho.value for one in found if one.mismatch and not math.isnan(one.mismatch.rho.value)
        )
        what = f"Rho, the rank correlation of importance and change over {first.rho.n} layers"
        between = f" {what}, is {rhos[0]:+.2f} to {rhos[-1]:+.2f}." if rhos else ""
        return f"Of {len(found)} models, {said}.{between}"
    name, third = max(first.thirds.items(), key=lambda item: item[1].importance)
    return (
        f"{first.verdict} The {name} third of the layers has {percent(third.importance)} of the importance and"
        f" {percent(third.change)} of the change."
    )


_WORDS = {  # of one model, of several
    "superficial": ("looks superficial", "look superficial"),
    "not superficial": ("does not look superficial", "do not look superficial"),
    "undecided": ("is undecided", "are undecided"),
}


def _word(one: ModelChange) -> str:
    assert one.mismatch is not None
    rho = one.mismatch.rho
    if not is_enough(one) or not (rho.is_below or rho.is_above):
        return "undecided"
    return "superficial" if rho.is_below else "not superficial"


def _relative(one: ModelChange) -> float | None:
    """Return the change of all layers relative to their norms; None without norms."""
    weight = math.fsum(one.change.weights.values())
    return math.fsum(one.change.layers.values()) / weight if weight else None


def _models(found: Sequence[ModelChange]) -> str:
    with_importance = any(one.mismatch is not None for one in found)
    head = ["model", "relative change", *(["rho", "looks"] if with_importance else ["largest share"])]
    rows = []
    for i, one in enumerate(found, 1):
        row = [_cell(f"{i}: {one.label}"), _cell(percent(_relative(one)))]
        if one.mismatch is not None:
            rho = one.mismatch.rho
            interval = "" if math.isnan(rho.low) else f" [{rho.low:+.2f}, {rho.high:+.2f}]"
            row.append(_cell(f"{rho.value:+.2f}{interval}" if is_enough(one) and rho.value == rho.value else "-"))
            row.append(_cell(_word(one)))
        elif not with_importance:
            share = max((x for x in one.change.share.values() if x is not None), default=None)
            row.append(_cell(percent(share)))
        rows.append(row)
    return _table(head, rows)


def _section(
    one: ModelChange, importance: Mapping[str, float] | None, pictures: Sequence[bytes], *, with_verdict: bool
) -> str:
    """Return pictures and tables of one checkpoint."""
    parts = [_figures(pictures)]
    if one.mismatch is not None:
        said = [one.mismatch.verdict if with_verdict else "", relative_line(one)]
        parts += [f"<p>{_text(each)}</p>" for each in said if each]
        parts += ["<h3>Thirds of the layers</h3>", _thirds(one)]
    parts += ["<h3>Layers</h3>", _layers(one, importance), "<h3>Kinds of modules</h3>", _kinds(one)]
    return "\n".join(parts)


def _figures(pictures: Sequence[bytes]) -> str:
    each = "\n".join(f"<figure>{inline_svg(svg)}</figure>" for svg in pictures)
    return f'<div class="panels">{each}</div>' if pictures else ""


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
    return f"<table>{top}<tbody>\n{body}\n</tbody></table>"


def _layers(one: ModelChange, importance: Mapping[str, float] | None) -> str:
    change = one.change
    most = max(change.layers.values()) or 1.0
    stacks = {key.rpartition(".")[0] for key in change.layers}
    rows = []
    for key, value in change.layers.items():
        row = [
            _cell(key.rpartition(".")[2] if len(stacks) == 1 else key),
            *([_cell(number(importance[key]) if key in importance else "-")] if importance else []),
        ]
        row.append(f'<td class="bar" style="--part:{100 * value / most:.1f}%">{number(value)}</td>')
        row += [_cell(percent(change.relative[key])), _cell(percent(change.share[key]))]
        rows.append(row)
    stack = f"layer of {shown(next(iter(stacks)), 40)}" if len(stacks) == 1 and "" not in stacks else "layer"
    return _table([stack, *(["importance"] if importance else []), *MEASURES], rows)


def _kinds(one: ModelChange) -> str:
    return _table(["module", *MEASURES], [[_cell(kind), *map(_cell, each)] for kind, each in kind_cells(one).items()])


def _thirds(one: ModelChange) -> str:
    assert one.mismatch is not None
    rows = [
        [_cell(name), _cell(len(third.layers)), _cell(percent(third.importance)), _cell(percent(third.change))]
        for name, third in one.mismatch.thirds.items()
    ]
    return _table(["third", "layers", "importance", "change"], rows)
