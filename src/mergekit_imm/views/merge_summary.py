"""The text that `imm-merge` prints: of a merge, a dry run, a check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.messages import bytes_text, count_text, first_few, shown
from ..engine.report import MergeReport
from ..options.recipe import STATEMENT_FILE
from ..plan.describe import CheckReport
from .tables import aligned

_WHAT = {"keep": "keep the base's", "take": "take the sft's", "copy": "copy, must be equal"}


def finished(report: MergeReport, several: bool) -> str:
    """Return the line that ends a merge."""
    if report.status == "already merged":
        compared = ", every byte compared" if report.verified else ""
        return f"{shown(report.out)} already merged: it holds exactly this merge{compared}{_stated(report)}"
    seconds, moved = report.seconds["total"], report.bytes_read + report.bytes_written
    rate = f" ({moved / seconds / 1e9:.2f} GB/s read and written)" if moved >= 1e8 and not several else ""
    return (
        f"merged {sum(report.tensors.values())} tensors, {count_text(report.parameter_count)} parameters, into"
        f" {shown(report.out)} in {seconds:.1f} s{rate}{', every byte compared' if report.verified else ''}"
        f"{_stated(report)}"
    )


def _stated(report: MergeReport) -> str:
    return f", digests of {len(report.digests)} files in {STATEMENT_FILE}" if report.digests else ""


def planned(report: MergeReport, base: str, sft: str, start: str | None) -> str:
    """Return the text of a dry run."""
    p = report.parameters
    given = p["layer_factors"]
    factors = shown(given) if isinstance(given, str) else f"of {len(given or ())} layers"
    counts = ", ".join(f"{count} {action}" for action, count in report.tensors.items() if count)
    beside = "" if report.device == "cpu" else " and what torch needs"
    inputs = [f"  base   {shown(base)}", f"  sft    {shown(sft)}", *([f"  start  {shown(start)}"] if start else [])]
    lines = [
        f"would merge {count_text(report.parameter_count)} parameters ({counts}) into {shown(report.out)}"
        if report.status == "dry run"
        else f"{shown(report.out)} already merged: it holds exactly this merge",
        *inputs,
        f"  alpha {p['alpha']:g}, drop {p['drop']:g}, seed {p['seed']}, iteration {p['iteration']}"
        + (f", reference {p['reference']}" if p["reference"] != "start" else "")
        + (f", importance of {len(p['importance'])} layers" if p["importance"] is not None else "")
        + (f", shrink {p['shrink']:g}" if p["shrink"] != 1 else "")
        + (f", clip {p['clip'][0]:g} to {p['clip'][1]:g}" if p["clip"] else "")
        + (f", layer factors {factors}" if p["layer_factors"] is not None else "")
        + (f", sparsify {p['sparsify']}" if p["sparsify"] != "dare" else ""),
        "",
        *table(report.kinds, start is not None),
        "",
        f"  reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)} to"
        f" {_files_text(report.files)}",
        *_renamed(report),
        *_beside(report),
        f"  memory at most about {bytes_text(report.memory)}{beside}, with {report.workers} workers on {report.device}",
        f"  disk needed {bytes_text(report.disk_needed)}, free {bytes_text(report.disk_free)}",
        "nothing was written",
    ]
    return "\n".join(lines)


def checked(report: CheckReport) -> str:
    """Return the text of a check: the verdict, then what it rests on."""
    lines = []
    for each in report.inputs:
        counts = f"{each['tensors']} tensors, {count_text(each['parameters'])} parameters"
        files = _files_text(each["files"])
        lines.append(f"  {each['role'].ljust(5)}  {shown(each['path'])}: {each['form']}, {counts}, in {files}")
    kinds = [{**kind, "drop": None} for kind in report.kinds]  # a check does not depend on the drop rate
    lines += ["", *table(kinds, any(each["role"] == "start" for each in report.inputs)), ""] if lines else []
    lines += _renamed(report)
    lines += _beside(report)
    lines += [f"  {note}" for note in report.notes]
    lines += [f"  refused: {problem}" for problem in report.problems]
    can = "cannot" if report.problems else "can"
    unread = "" if report.problems else ", judging by headers alone: values are not read"
    verdict = f"{shown(report.sft)} {can} be merged into {shown(report.base)}{unread}"
    return "\n".join([verdict, *lines])


def _files_text(files: Sequence[str]) -> str:
    return first_few([*map(shown, files)], ", ") + (f" ({len(files)} files)" if len(files) > 3 else "")


def _renamed(report: MergeReport | CheckReport) -> list[str]:
    return [
        f"  {each['tensors']} tensors '{shown(each['name'])}' of {each['role']} are '{shown(each['in_base'])}' in base"
        for each in report.renamed
    ]


def _beside(report: MergeReport | CheckReport) -> list[str]:
    """Return lines on the files beside the weights: which travel, what changes in them, what stays behind."""
    return [
        *(
            f"  {len(names)} other files from {role}: {', '.join(map(shown, names))}"
            for role, names in report.side_files.items()
        ),
        *(f"  {_config_of(key)}: {key} = {json.dumps(value)}" for key, value in report.config_changes.items()),
        *(f"  left out of {role}: {', '.join(map(shown, names))}" for role, names in report.left_out.items()),
    ]


def _config_of(key: str) -> str:
    return "adapter_config.json" if key in ("lora_alpha", "alpha_pattern") else "config.json"


def table(kinds: Sequence[Mapping[str, Any]], with_start: bool) -> list[str]:
    """Return the lines of a table with a row for each kind of tensor."""
    roles = ("base", "start", "sft") if with_start else ("base", "sft")
    rows: list[tuple[str, ...]] = [("kind of tensor", "tensors", "parameters", *roles, "out", "what")]
    for kind in kinds:
        what = _WHAT.get(kind["action"], kind["action"]) + (f", drop {kind['drop']:.4g}" if kind["drop"] else "")
        read = [kind["read"].get(role, "-") for role in roles]
        counts = str(kind["tensors"]), count_text(kind["elements"])
        rows.append((shown(kind["name"]), *counts, *read, kind["write"], what))
    return [f"  {line}" for line in aligned(rows, right=(1, 2))]
