"""How far fine-tuning moved each layer (Eq. 4), from tensors in memory, checkpoints, or a merge's report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.checks import check_state, why_no_folder
from ..common.display import Displayed, Summary, bars
from ..common.messages import shown
from ..common.progress import Watched, check_progress, watched
from ..errors import CheckpointError, MismatchError, NonFiniteError
from ..model.tensor_names import is_embedding_or_head, layer_key, layer_order, only_in, ready_option, weight_kind

if TYPE_CHECKING:
    import torch

CURE = "give two models of the same finite float tensors"
MEASURE = "measure it from the models: imm-analyze change START SFT"


class Norms(NamedTuple):
    """Shape and Frobenius norms ||W - W'|| and ||W|| of one tensor; None for a norm that is not finite."""

    shape: Sequence[int]
    change: float | None
    weight: float | None


class KindChange(NamedTuple):
    """Change of one kind of module over all layers, relative to its sum of ||W||_F, and as a share of the total."""

    change: float
    relative: float | None
    share: float | None


@dataclass(frozen=True, repr=False)
class WeightChange(Displayed):
    """The change of each layer, and of tensors outside Eq. 4.

    `layers`: Eq. 4 per layer key. `weights`: the same sum of ||W||_F. `kinds`, `kind_weights`: both split by module
    (q_proj, up_proj). `elsewhere`: sums of norms of the change of embeddings, heads, norms, biases and other tensors,
    which count in no layer.
    """

    layers: dict[str, float]
    weights: dict[str, float]
    kinds: dict[str, dict[str, float]]
    elsewhere: dict[str, float]
    notes: tuple[str, ...] = ()
    kind_weights: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, KindChange]:
        """Change of each kind of module over all layers; relative is None if the sum of ||W||_F is 0."""
        total = math.fsum(self.layers.values())
        found = {}
        for kind in dict.fromkeys(kind for each in self.kinds.values() for kind in each):
            change, weight = (
                math.fsum(each.get(kind, 0.0) for each in of.values()) for of in (self.kinds, self.kind_weights)
            )
            found[kind] = KindChange(change, change / weight if weight else None, change / total if total else None)
        return found

    @property
    def relative(self) -> dict[str, float | None]:
        """Change of each layer divided by its sum of ||W||_F; None if that is 0."""
        return {key: value / self.weights[key] if self.weights[key] else None for key, value in self.layers.items()}

    @property
    def share(self) -> dict[str, float | None]:
        """Each layer's share of the total change (figure 12); None if nothing changed."""
        total = math.fsum(self.layers.values())
        return {key: value / total if total else None for key, value in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the change as plain data."""
        modules = {kind: each._asdict() for kind, each in self.modules.items()}
        return {
            **asdict(self),
            "relative": self.relative,
            "share": self.share,
            "modules": modules,
            "notes": list(self.notes),
        }

    def _summary(self) -> Summary:
        total, weight = (math.fsum(of.values()) for of in (self.layers, self.weights))
        relative = f", {100 * total / weight:.3g} % of the weights' norms" if weight else ""
        rows = [
            [shown(kind, 40), f"{each.change:.4g}", *("-" if x is None else f"{100 * x:.3g} %" for x in each[1:])]
            for kind, each in self.modules.items()
        ]
        line = f"{total:.4g} in all, over {len(self.layers)} layers{relative}"
        return Summary(line, self.notes, ("module", "change", "relative", "share"), rows)

    def _picture(self) -> str:
        return bars(self.layers, "change by layer") if self.layers else ""


def module_kind(name: str) -> str:
    """Return the module of a weight: the last component of its name; for a number, with the component before.

    >>> module_kind("model.layers.3.mlp.experts.7.up_proj.weight"), module_kind("h.0.mlp.2.weight")
    ('up_proj', 'mlp.*')
    """
    parts = name.removesuffix(".weight").split(".")
    return f"{parts[-2]}.*" if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def change_of(norms: Mapping[str, Norms], notes: Sequence[str] = (), cure: str = CURE) -> WeightChange:
    """Sum the norms of tensors per layer. Raises NonFiniteError, and MismatchError if no tensor is a layer's weight."""
    parts: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    elsewhere: dict[str, list[float]] = defaultdict(list)
    for name, (shape, change, weight) in norms.items():
        if change is None or weight is None or not (math.isfinite(change) and math.isfinite(weight)):
            raise NonFiniteError(f"tensor '{shown(name)}': the norm of its change or weight is not finite; {cure}")
        kind, layer = weight_kind(name, shape), layer_key(name)
        if kind == "linear" and layer is not None:
            parts[layer][module_kind(name)].append((change, weight))
        else:
            elsewhere[kind].append(change)
    if not parts:
        raise MismatchError(f"none of {len(norms)} tensors is a weight matrix of a layer (model.layers.0.*); {CURE}")
    order = sorted(parts, key=layer_order)
    layers, weights = (
        {key: math.fsum(pair[at] for each in parts[key].values() for pair in each) for key in order} for at in (0, 1)
    )
    kinds, kind_weights = (
        {key: {kind: math.fsum(pair[at] for pair in each) for kind, each in parts[key].items()} for key in order}
        for at in (0, 1)
    )
    outside = {kind: math.fsum(x) for kind, x in sorted(elsewhere.items())}
    return WeightChange(layers, weights, kinds, outside, tuple(notes), kind_weights)


def weight_change(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> WeightChange:
    """Return how far the weights of each layer moved: a sum of norms, not the norm of all weights together.

        DeltaW^n = sum_k || W^{k,n} - W'^{k,n} ||_F          k: the linear weights of layer n

    Args: `before`, `after`, name -> float tensor, with the same names and shapes. Differences are float32 (float64 for
    float64 tensors), sums of squares float64. Raises MismatchError if names, shapes or kinds of dtype differ (nothing
    is broadcast), NonFiniteError for NaN and infinity. The Frobenius norm is ours: the paper names no norm.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 4.

    >>> import torch
    >>> name = "model.layers.0.mlp.up_proj.weight"
    >>> weight_change({name: torch.zeros(2, 2)}, {name: torch.ones(2, 2)}).layers
    {'model.layers.0': 2.0}
    """
    import torch

    check_state("before", before)
    check_state("after", after)
    for one, other, labels in ((before, after, ("before", "after")), (after, before, ("after", "before"))):
        surplus = only_in(one, other, *labels)
        if surplus:
            raise MismatchError(f"{surplus}; give the same tensors of both")
    norms = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise MismatchError(
                f"tensor '{shown(name)}' has shape {tuple(old.shape)} before and {tuple(new.shape)} after; give tensors"
                " of equal shapes"
            )
        if not (old.is_floating_point() and new.is_floating_point()):
            raise MismatchError(
                f"tensor '{shown(name)}' is {old.dtype} before and {new.dtype} after; give float tensors only"
            )
        wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
        first = old.detach().to(wide)
        delta = (first - new.detach().to(first.device, wide)).double()
        norms[name] = Norms(tuple(old.shape), *(float(x.double().norm()) for x in (delta, first)))
    return change_of(norms)


def checkpoint_change(
    base: str | Path,
    sft: str | Path,
    *,
    rename: Sequence[str] = (),
    vocab: str = "base",
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    workers: int | None = None,
    progress: Watched = None,
) -> WeightChange:
    """Return the change from one checkpoint to another, read once in constant memory; nothing is written.

    Inputs are those of `merge_checkpoints`: folders, hub ids, an adapter as `sft`. Norms are accurate to about seven
    digits. Of vocabularies of different sizes only the common rows count, with a note; `vocab="strict"` refuses them.
    `keep` and `take` leave out tensors of `base` and of `sft`, `leave_out` files of either. Raises MergeError.

    >>> len(checkpoint_change(base_folder, sft_folder).layers) > 0
    True
    """
    import numpy as np

    from ..checkpoint.reader import check_inputs
    from ..common.threads import default_workers
    from ..engine.report import statistics
    from ..engine.workers import run_segments
    from ..numerics.devices import pick_device
    from ..numerics.statistics import RECORD
    from ..options.options import MergeOptions, RunOptions
    from ..plan.make_plan import make_plans
    from ..plan.open_inputs import open_inputs
    from ..plan.plan import segments

    patterns: dict[str, Any] = {"rename": rename, "keep": keep, "take": take, "leave_out": leave_out}
    options = MergeOptions(
        alpha=0.0, drop=0.0, dtype="float32", vocab=vocab, dequantize=dequantize, allow_nonfinite=True, **patterns
    )
    threads = RunOptions(workers=workers, progress=check_progress(progress)).workers or default_workers()
    (plan,) = make_plans(open_inputs({"base": base, "sft": sft}, options))
    # Notes on the merged vocabulary do not apply: nothing is merged.
    notes = [str(note) for note in plan.notes if note.code != "vocabulary"]
    rows = sorted({each.rows[0] for each in plan.models.values() if each.rows})
    if len(rows) > 1:
        notes.append(f"note: the vocabularies have {rows[0]} and {rows[-1]} rows; the first {rows[0]} are compared")
    measured = tuple(item for item in plan.items if item.action == "merge")
    if len(measured) < len(plan.items):
        notes.append(f"note: {len(plan.items) - len(measured)} tensors are not measured: left out, or not floats")
    plan = replace(plan, items=measured)
    todo = list(segments(plan))
    records = np.zeros((len(todo), RECORD))
    total, done_bytes = sum(item.source.count * 4 * len(item.outs) for item in measured), 0
    tasks = ((each, (0,)) for each in todo)
    results = run_segments([plan], tasks, lambda *_: None, workers=threads, device=pick_device("cpu"))
    label, rate = f"measuring {shown(sft, 40)}", lambda x: f"{x / 1e9:.2f} GB/s of float32"
    with closing(results), watched(progress, label, rate=rate) as update:
        for done in results:
            if done is not None:
                records[done.segment.index] = done.records[0]
                done_bytes += done.bytes_written
                if update is not None:
                    update(done_bytes, total)
    check_inputs(plan.models)
    found = dict(statistics(plan, records)["tensors"])
    shapes = {item.name: item.source.shape for item in measured}
    bad = next((name for name, each in found.items() if None in (each["delta_norm"], each["base_norm"])), None)
    if bad is not None:
        label = plan.models["base" if found[bad]["base_norm"] is None else "sft"].label
        raise NonFiniteError(
            f"tensor '{shown(bad)}' of {label} holds NaN or infinity; train or save the model again, or leave it out:"
            f" {ready_option('--keep', bad)}"
        )
    return change_of({n: Norms(shapes[n], each["delta_norm"], each["base_norm"]) for n, each in found.items()}, notes)


def reported_change(merged: str | Path) -> WeightChange:
    """Return the change ||sft - start|| of the round that made a merged folder, from its imm_report.json.

    Reads only the report and the headers of the merged files. Relative changes refer to the norms of the base, the only
    ones in the report. Raises CheckpointError if there is no report, a linear weight was not merged, or the sparsifier
    was not DARE.

    >>> from mergekit_imm import merge_checkpoints
    >>> report = merge_checkpoints(base_folder, sft_folder, out_folder)
    >>> len(reported_change(out_folder).layers) > 0
    True
    """
    from ..checkpoint.open_checkpoint import open_checkpoint
    from ..common.json_files import parse_json, without_duplicates
    from ..options.recipe import REPORT_FILE, read_recipe

    folder, cure = Path(merged).expanduser(), MEASURE
    if not folder.is_dir():
        raise CheckpointError(
            f"{shown(merged)} {why_no_folder(folder)}; give BASE and SFT, or a folder made by imm-merge"
        )
    recipe = read_recipe(folder)
    if recipe is None or not (folder / REPORT_FILE).is_file():
        raise CheckpointError(f"{shown(merged)} holds no merge with {REPORT_FILE}; {cure}")
    sparsify = recipe["parameters"].get("sparsify", "dare")
    if sparsify != "dare":
        raise CheckpointError(
            f"{shown(merged)} was merged with sparsify {shown(sparsify)}, so its report covers only kept elements;"
            f" {cure}"
        )
    try:
        report = parse_json((folder / REPORT_FILE).read_bytes(), without_duplicates)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(folder / REPORT_FILE)} cannot be read: {shown(error, 200)}; {cure}") from error
    tensors = report.get("tensors") if isinstance(report, dict) and report.get("version") == 2 else None
    if not isinstance(tensors, dict) or not all(isinstance(each, dict) for each in tensors.values()):
        raise CheckpointError(f"{shown(folder / REPORT_FILE)} is not a report of version 2; merge again, or {cure}")
    stored = open_checkpoint(folder, "base").tensors
    norms, skipped = {}, []
    for name, entry in tensors.items():
        # A tied tensor has its embedding's name, which need not be stored; any 2-D shape will do.
        shape = stored[name].shape if name in stored else (1, 1) if is_embedding_or_head(name) else None
        if shape is None:
            raise CheckpointError(f"{shown(merged)} lacks tensor '{shown(name)}' in its {REPORT_FILE}; {cure}")
        if entry.get("action") == "merge":
            values = [entry.get(key) for key in ("delta_norm", "base_norm")]
            if not all(x is None or (isinstance(x, (int, float)) and not isinstance(x, bool)) for x in values):
                raise CheckpointError(
                    f"{shown(folder / REPORT_FILE)}: the norms of '{shown(name)}' are not numbers; {cure}"
                )
            norms[name] = Norms(shape, *values)
        elif weight_kind(name, shape) == "linear" and entry.get("action") != "copy":
            raise CheckpointError(
                f"{shown(merged)}: '{shown(name)}' was not merged ({shown(entry.get('action'))}), so its report does"
                f" not hold its change; {cure}"
            )
        else:
            skipped.append(name)
    parameters = recipe["parameters"]
    of = "base" if parameters.get("reference") == "base" or "start" not in recipe["inputs"] else "start"
    notes = [f"note: from {REPORT_FILE}: the change is sft - {of}, relative to the norm of base"]
    if skipped:
        notes.append(f"note: {len(skipped)} tensors that were not merged are not measured, '{shown(skipped[0])}' first")
    return change_of(norms, notes, cure)
