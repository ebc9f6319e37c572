"""What the commands print of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.messages import bytes_text, shown
from ..engine.report import MergeReport
from ..plan.describe import CheckReport

_WHAT = {"keep": "keep the base's", "take": "take the sft's", "copy": "copy, must be equal"}


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
    inputs = [f"  base   {shown(base)}", f"  sft    {shown(sft)}", *([f"  start  {shown(start)}"] if start else [])]
    lines = [
        f"would merge {count_text(report.parameter_count)} parameters ({counts}) into {shown(report.out)}"
        if report.status == "dry run" else f"{shown(report.out)} already merged: it holds this very recipe",
        *inputs,
        f"  alpha {p['alpha']:g}, drop {p['drop']:g}, seed {p['seed']}, iteration {p['iteration']}"
        + (f", reference {p['reference']}" if p["reference"] != "start" else "")
        + (f", importance of {len(p['importance'])} layers" if p["importance"] is not None else "")
        + (f", shrink {p['shrink']:g}" if p["shrink"] != 1 else "")
        + (f", clip {p['clip'][0]:g} to {p['clip'][1]:g}" if p["clip"] else "")
        + (f", layer factors {_factors_text(p['layer_factors'])}" if p["layer_factors"] is not None else "")
        + (f", sparsify {p['sparsify']}" if p["sparsify"] != "dare" else ""),
        "",
        *table(report.kinds, start is not None),
        "",
        f"  reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)} to"
        f" {', '.join(report.files[:3])}"
        + (f", … ({len(report.files)} files)" if len(report.files) > 3 else ""),
        *_renamed(report),
        *_beside(report),
        f"  memory about {bytes_text(report.memory)} at its peak, with {report.workers} workers on {report.device}",
        f"  disk needed {bytes_text(report.disk_needed)}, free {bytes_text(report.disk_free)}",
        "nothing was written",
    ]  # fmt: skip
    return "\n".join(lines)


def checked(report: CheckReport) -> str:
    """What a check prints."""
    lines = []
    for each in report.inputs:
        files = each["files"]
        told = f"{', '.join(map(shown, files[:3]))}{f', … ({len(files)} files)' if len(files) > 3 else ''}"
        counts = f"{each['tensors']} tensors, {count_text(each['parameters'])} parameters"
        lines.append(f"  {each['role'].ljust(5)}  {shown(each['path'])}: {each['form']}, {counts}, in {told}")
    kinds = [{**kind, "drop": None} for kind in report.kinds]  # how much is dropped is no matter here
    lines += ["", *table(kinds, any(each["role"] == "start" for each in report.inputs)), ""] if lines else []
    lines += _renamed(report)
    lines += _beside(report)
    lines += [f"  {note}" for note in report.notes]
    lines += [f"  refused: {problem}" for problem in report.problems]
    can = "cannot" if report.problems else "can"
    unread = "" if report.problems else ", as far as headers tell: values are not read"
    verdict = f"{shown(report.sft)} {can} be merged into {shown(report.base)}{unread}"
    return "\n".join([verdict, *lines])


def _renamed(report: MergeReport | CheckReport) -> list[str]:
    return [
        f"  {each['tensors']} tensors '{shown(each['name'])}' of {each['role']} are '{shown(each['in_base'])}' in base"
        for each in report.renamed
    ]


def _factors_text(factors: Mapping[str, float] | str) -> str:
    return shown(factors) if isinstance(factors, str) else f"of {len(factors)} layers"


def _beside(report: MergeReport | CheckReport) -> list[str]:
    """The files beside the weights, and what is changed or left out of them."""
    return [
        *(f"  {len(names)} other files from {role}: {', '.join(map(shown, names))}"
          for role, names in report.side_files.items()),
        *(f"  config.json: {key} = {json.dumps(value)}" for key, value in report.config_changes.items()),
        *(f"  left out of {role}: {', '.join(map(shown, names))}" for role, names in report.left_out.items()),
    ]  # fmt: skip


def table(kinds: Sequence[Mapping[str, Any]], with_start: bool) -> list[str]:
    """Return the lines of a table of tensors, a row for each kind of them."""
    roles = ("base", "start", "sft") if with_start else ("base", "sft")
    rows: list[tuple[str, ...]] = [("kind of tensor", "tensors", "parameters", *roles, "out", "what")]
    for kind in kinds:
        what = _WHAT.get(kind["action"], kind["action"]) + (f", drop {kind['drop']:.4g}" if kind["drop"] else "")
        read = [kind["read"].get(role, "-") for role in roles]
        counts = str(kind["tensors"]), count_text(kind["elements"])
        rows.append((shown(kind["name"]), *counts, *read, kind["write"], what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in (1, 2) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def count_text(count: int) -> str:
    """Return a number of parameters as people say it: 1.54 B."""
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
