"""The statistics of a merge (imm_report.json), and the report that `merge_checkpoints` returns."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.display import Displayed, Summary, bars
from ..common.json_files import parse_json
from ..common.messages import bytes_text, count_text, shown
from ..errors import MergeError
from ..model.tensor_names import layer_key
from ..options.recipe import CARD_FILE, RECIPE_FILE, REPORT_FILE, read_recipe, to_json
from ..plan.plan import Item, Plan
from .model_card import model_card

OUTSIDE = "outside the layers"


@dataclass(frozen=True, repr=False)
class MergeReport(Displayed):
    """What `merge_checkpoints` did; `imm-merge --json` prints it.

    `status`: "merged", "already merged" or "dry run". `tensors`: counts of `merged`, `kept` (base's), `taken` (sft's),
    `copied` (integer and bool). `bytes_read`, `bytes_written`: tensors read and files written by the streaming phase of
    this run; planned bytes if nothing was merged. `disk_needed`, `disk_free`: bytes at the output when planned.
    `memory`: bytes at most, about. `seconds`: plan, total and, of a merge, stream (first read to last sync). The
    merges of a sweep share one read and one clock; each report has the whole amounts. `renamed`: renaming rules applied
    to sft and start, with the number of tensors. `notes`: worth knowing, not errors. `refused`: the shortage of space
    that would stop the merge (dry runs). `verified`: every byte was recomputed and compared before the folder appeared.
    `digests`: the sha256 of every file, if asked for.
    """

    status: str
    out: str
    parameters: dict[str, Any]
    parameter_count: int
    tensors: dict[str, int]
    files: list[str]
    bytes_read: int
    bytes_written: int
    disk_needed: int
    disk_free: int
    memory: int
    workers: int
    device: str
    seconds: dict[str, float]
    kinds: list[dict[str, Any]]
    config_changes: dict[str, Any]
    side_files: dict[str, list[str]]
    left_out: dict[str, list[str]]
    renamed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    verified: bool = False
    digests: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def _summary(self) -> Summary:
        given = self.parameters
        counts = ", ".join(f"{count} {action}" for action, count in self.tensors.items() if count)
        done = {"dry run": "would merge into", "merged": "merged into"}.get(self.status, f"{self.status}:")
        what = ", ".join(f"{name} {given[name]}" for name in ("alpha", "drop", "seed", "iteration") if name in given)
        moved = f"{bytes_text(self.bytes_read)} read, {bytes_text(self.bytes_written)} written"
        rows = [
            ["parameters", what],
            ["tensors", f"{counts}; {count_text(self.parameter_count)} parameters"],
            ["bytes", moved if self.status == "merged" else f"{moved}, if merged again"],
            ["time", f"{self.seconds.get('total', 0):.1f} s, {self.workers} workers on {self.device}"],
            *([["verified", "every byte compared"]] if self.verified else []),
        ]
        more = [*([self.refused] if self.refused else []), *self.notes]
        return Summary(f"{done} {shown(self.out)}, {what}; {counts}", more, (), rows)

    def _picture(self) -> str:
        """Draw how far each layer is from the base, from the report in `out`, if that still holds this merge."""
        try:
            recipe = None if self.status == "dry run" else read_recipe(Path(self.out))
            given = json.loads(to_json(self.parameters))
            if recipe is None or any(given[name] != value for name, value in recipe["parameters"].items()):
                return ""
            layers = parse_json((Path(self.out) / REPORT_FILE).read_bytes())["layers"]
            far = {
                key: 100 * each["change_norm"] / each["base_norm"]
                for key, each in layers.items()
                if key != OUTSIDE and each["change_norm"] is not None and each["base_norm"]
            }
        except (MergeError, OSError, ValueError, LookupError, TypeError):
            return ""  # moved, merged anew, or edited since
        return bars(far, "norm of merged - base in % of the base's, by layer") if far else ""


def statistics(plan: Plan, records: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Combine the records of all segments (one row each) into statistics per tensor and per layer.

    Sums of squares are added with math.fsum, so the order does not matter. A value that is not finite is None.
    The entries of the tensors are an iterator of pairs, made as they are written.
    """
    layers: dict[str, array[int]] = defaultdict(lambda: array("q"))  # segments
    counts: dict[str, int] = defaultdict(int)
    for item, of_item in _segments(plan):
        if item.action == "merge":
            layer = layer_key(item.name) or OUTSIDE
            layers[layer].extend(of_item)
            counts[layer] += item.source.count
    return {
        "format": "mergekit_imm report",
        "version": 2,
        "layers": {
            layer: {"elements": counts[layer], **_summary(records[of_layer], counts[layer])}
            for layer, of_layer in layers.items()
        },
        "tensors": (
            (item.name, _entry(item, records[of_item.start : of_item.stop])) for item, of_item in _segments(plan)
        ),
        # Only if true, so that reports of earlier versions still compare equal.
        **({"sft_equals_start": True} if layers and not plan.options.as_adapter and not records[:, 0].any() else {}),
        # Not for hub ids: there it depends on the cache.
        "left_out": {
            role: list(each.left_out) for role, each in plan.models.items() if not each.repo and role != "start"
        },
    }


def _segments(plan: Plan) -> Iterator[tuple[Item, range]]:
    """Yield each item with the indices of its segments."""
    at = 0
    for item in plan.items:
        yield item, range(at, at := at + item.segment_count)


def _entry(item: Item, rows: npt.NDArray[np.float64]) -> dict[str, Any]:
    count = item.source.count
    return {"action": item.action, "elements": count, **(_summary(rows, count) if item.action == "merge" else {})}


def _summary(rows: npt.NDArray[np.float64], elements: int) -> dict[str, Any]:
    *squares, largest, kept = rows.T.tolist()
    delta, base, change = (math.fsum(column) if all(map(math.isfinite, column)) else math.nan for column in squares)
    return {
        "kept_share": math.fsum(kept) / elements if elements else None,
        "delta_norm": _number(delta**0.5),
        "base_norm": _number(base**0.5),
        "change_norm": _number(change**0.5),
        "largest_change": max(largest, default=0.0) if all(map(math.isfinite, largest)) else None,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def actions(plan: Plan) -> dict[str, int]:
    """Count the tensors of a plan by action."""
    words = {"merge": "merged", "keep": "kept", "take": "taken", "copy": "copied"}
    counts = dict.fromkeys(words.values(), 0)
    for item in plan.items:
        counts[words[item.action]] += 1
    return counts


def written_files(plan: Plan, recipe: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the small files that a merge generates, the recipe last. `found` are its statistics."""
    files: dict[str, bytes] = {**plan.indexes, **plan.configs}
    files[REPORT_FILE] = to_json(found)
    files[CARD_FILE] = model_card(plan, recipe)
    files[RECIPE_FILE] = to_json(recipe)
    return files
