"""What the commands print of a report."""

from __future__ import annotations

import json

from .errors import bytes_text, shown
from .recipe import MergeReport


def finished(report: MergeReport, several: bool) -> str:
    """What a merge says at its end."""
    if report.status == "already merged":
        compared = ", every byte compared" if report.verified else ""
        return f"{shown(report.out)} already merged: it holds this very recipe{compared}"
    seconds, moved = report.seconds["total"], report.bytes_read + report.bytes_written
    rate = f" ({moved / seconds / 1e9:.2f} GB/s read and written)" if moved >= 1e8 and not several else ""
    return (
        f"merged {sum(report.tensors.values())} tensors, {count_text(report.parameter_count)} parameters, into"
        f" {shown(report.out)} in {seconds:.1f} s{rate}{', every byte compared' if report.verified else ''}"
    )


def planned(report: MergeReport, base: str, sft: str, start: str | None) -> str:
    """What a dry run prints."""
    p = report.parameters
    counts = ", ".join(f"{count} {action}" for action, count in report.tensors.items() if count)
    rows: list[tuple[str, ...]] = [("kind of tensor", "tensors", "parameters", "base", "start", "sft", "out", "what")]
    for kind in report.kinds:
        what = {"merge": f"merge, drop {kind['drop']:.4g}" if kind["drop"] else "merge", "keep": "keep the base's",
                "take": "take the sft's", "copy": "copy, must be equal"}[kind["action"]]  # fmt: skip
        read = [kind["read"].get(role, "-") for role in ("base", "start", "sft")]
        rows.append(
            (shown(kind["name"]), str(kind["tensors"]), count_text(kind["elements"]), *read, kind["write"], what)
        )
    if start is None:
        rows = [(*row[:4], *row[5:]) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  " + "  ".join(c.ljust(w) if i not in (1, 2) else c.rjust(w) for i, (c, w) in
             enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]  # fmt: skip
    inputs = [f"  base   {shown(base)}", f"  sft    {shown(sft)}", *([f"  start  {shown(start)}"] if start else [])]
    renamed = [
        f"  {each['tensors']} tensors '{shown(each['name'])}' of {each['role']} are '{shown(each['in_base'])}' in base"
        for each in report.renamed
    ]
    side = [
        f"  {len(names)} other files from {role}: {', '.join(map(shown, names))}"
        for role, names in report.side_files.items()
    ]
    left = [f"  left out of {role}: {', '.join(map(shown, names))}" for role, names in report.left_out.items()]
    changes = [f"  config.json: {key} = {json.dumps(value)}" for key, value in report.config_changes.items()]
    lines = [
        f"would merge {count_text(report.parameter_count)} parameters ({counts}) into {shown(report.out)}"
        if report.status == "dry run" else f"{shown(report.out)} already merged: it holds this very recipe",
        *inputs,
        f"  alpha {p['alpha']:g}, drop {p['drop']:g}, seed {p['seed']}, iteration {p['iteration']}"
        + (f", reference {p['reference']}" if p["reference"] != "start" else "")
        + (f", importance of {len(p['importance'])} layers" if p["importance"] is not None else ""),
        "",
        *table,
        "",
        f"  reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)} to"
        f" {', '.join(report.files[:3])}"
        + (f", … ({len(report.files)} files)" if len(report.files) > 3 else ""),
        *renamed,
        *side,
        *changes,
        *left,
        f"  memory about {bytes_text(report.memory)} at its peak, with {report.workers} workers on {report.device}",
        f"  disk needed {bytes_text(report.disk_needed)}, free {bytes_text(report.disk_free)}",
        "nothing was written",
    ]  # fmt: skip
    return "\n".join(lines)


def count_text(count: int) -> str:
    """Return a number of parameters as people say it: 1.54 B."""
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
