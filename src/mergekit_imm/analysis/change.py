"""Where the weights changed: the norm of each weight's change, summed up by layer and by kind (the paper's Eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MismatchError, NonFiniteError, shown
from ..layers import blanked, layer_key, only_in, weight_kind

if TYPE_CHECKING:
    from torch import Tensor

    from ..execute import Progress

CHANGE_FORMAT, CHANGE_VERSION = "mergekit_imm change", 1
_BUCKETS = {"embedding": "embeddings", "head": "head", "norm": "norms", "bias": "biases", "other": "other"}


@dataclass(frozen=True)
class Amount:
    """How much some weights changed.

    change: the sum of their norms ||W' - W||. norm: the sum of ||W||. relative: change / norm; None if norm is 0.
    share: of the change of all layers, in layers; None if nothing changed.
    """

    change: float
    norm: float
    relative: float | None
    share: float | None


@dataclass(frozen=True)
class WeightChange:
    """What `weight_change` measured.

    layers: layer key -> the change of its linear weights. kinds: kind of weight, its name without numbers -> layer key
    -> its part of that. outside: all that is no linear weight of a layer, "embeddings", "head", "norms", "biases",
    "other" (norms and biases of the layers too); their share is None. left_out: tensors that were not compared, as one
    of the models lacks them. All norms are Frobenius norms.
    """

    layers: dict[str, Amount]
    kinds: dict[str, dict[str, Amount]]
    outside: dict[str, Amount]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"left_out": list(self.left_out)}


@dataclass(frozen=True)
class Norms:
    """Of one tensor: the norm of its change, its norm before, and its shape."""

    change: float
    before: float
    shape: tuple[int, ...]


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> WeightChange:
    """Measure how much each layer's linear weights changed.

        DeltaW^n = sum over the linear weights W of layer n of ||W' - W||                             (Eq. 4)

    A sum of norms, not the norm of all. The paper names no norm; this is the Frobenius norm. Besides, the change
    relative to the sum of ||W||, each layer's share of the change of all layers (the paper's figure 12), and the same
    for each kind of weight. What is a linear weight is `weight_kind`'s to say; a stack of experts is one.

    Args: `before`, `after`, mappings name -> tensor of the same names and shapes, any float dtypes; integers are left
    out. Differences are float32 (float64 if a tensor is), squares are added in float64. Raises MismatchError, or
    NonFiniteError for NaN and infinity.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 4.

    >>> import torch
    >>> before = {"h.0.q.weight": torch.zeros(2, 2), "h.1.q.weight": torch.eye(2)}
    >>> found = weight_change(before, {"h.0.q.weight": torch.ones(2, 2), "h.1.q.weight": 3 * torch.eye(2)})
    >>> {layer: amount.change for layer, amount in found.layers.items()}
    {'h.0': 2.0, 'h.1': 2.8284271247461903}
    """
    from ..flat import boxes, in_box

    for complaint in (only_in(before, after, "before", "after"), only_in(after, before, "after", "before")):
        if complaint:
            raise MismatchError(complaint)
    norms = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.is_floating_point() != new.is_floating_point():
            raise MismatchError(
                f"tensor '{shown(name)}' is {old.dtype} {list(old.shape)} before, and {new.dtype}"
                f" {list(new.shape)} after"
            )
        if not old.is_floating_point():
            continue
        exact = old.element_size() == 8 or new.element_size() == 8
        squares = []
        for index, _ in boxes(old.shape):
            a, b = (in_box(each, index).double() if exact else in_box(each, index).float() for each in (old, new))
            b = b.to(a.device)
            squares.append((float((b - a).double().square().sum()), float(a.double().square().sum())))
        changes, befores = zip(*squares, strict=True) if squares else ((), ())
        norms[name] = Norms(math.fsum(changes) ** 0.5, math.fsum(befores) ** 0.5, tuple(old.shape))
    return summed(norms)


def summed(norms: Mapping[str, Norms], left_out: Sequence[str] = ()) -> WeightChange:
    """Sum up the norms of tensors by layer, by kind, and outside the layers' linear weights."""
    layers: dict[str, list[Norms]] = {}
    kinds: dict[str, dict[str, list[Norms]]] = {}
    outside: dict[str, list[Norms]] = {}
    for name, each in norms.items():
        if not (math.isfinite(each.change) and math.isfinite(each.before)):
            raise NonFiniteError(
                f"tensor '{shown(name)}' holds NaN or infinity in one of the models, or changed by more than float32"
                " holds; its change has no norm"
            )
        kind, layer = weight_kind(name, each.shape), layer_key(name)
        if kind != "linear" or layer is None:
            outside.setdefault(_BUCKETS.get(kind, "other"), []).append(each)
            continue
        layers.setdefault(layer, []).append(each)
        kinds.setdefault(blanked(name), {}).setdefault(layer, []).append(each)
    total = math.fsum(each.change for found in layers.values() for each in found)
    ordered = sorted(layers, key=_place)
    return WeightChange(
        layers={layer: _amount(layers[layer], total) for layer in ordered},
        kinds={
            kind: {layer: _amount(of_kind[layer], total) for layer in ordered if layer in of_kind}
            for kind, of_kind in kinds.items()
        },
        outside={bucket: _amount(outside[bucket], None) for bucket in _BUCKETS.values() if bucket in outside},
        left_out=tuple(left_out),
    )


def _place(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def _amount(norms: Iterable[Norms], total: float | None) -> Amount:
    norms = list(norms)
    change, before = math.fsum(each.change for each in norms), math.fsum(each.before for each in norms)
    return Amount(change, before, change / before if before else None, change / total if total else None)


def checkpoint_change(
    base: str | Path,
    sft: str | Path,
    *,
    rename: Sequence[str] = (),
    vocab: str = "strict",
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[WeightChange, list[str]]:
    """Measure how much the weights of two checkpoints differ, streaming, in constant memory; see `weight_change`.

    The models are read as `merge_checkpoints` reads them: any form it takes, names and vocabularies matched as there.
    keep and take name tensors that only `base` and only `sft` has, which are left out. Norms are those of merge
    reports, right to some seven digits. Returns the change, and notes. Raises MergeError.

    >>> change, _ = checkpoint_change(base_folder, sft_folder)
    >>> f"{change.layers['model.layers.0'].change:.3f}"
    '0.080'
    """
    import numpy as np

    from ..execute import check_workers, pick_device, run, warm_up
    from ..plan import segments
    from ..prepare import check_platform, open_inputs, plans_of
    from ..reading import check_inputs
    from ..report import statistics
    from ..sums import RECORD

    check_platform()
    threads = check_workers(workers)
    inputs, parameters, _ = open_inputs(
        base, sft, None, outs=(), dry_run=False, iteration=0, importance=None, layer_factors=None, shrink=1.0,
        clip=None, sparsify="dare", dtype="float32", max_shard_size=None, points=[{"alpha": 0.0, "drop": 0.0, "seed": 0}],
        reference="start", keep=keep, take=take, no_drop=(), vocab=vocab, rename=rename, dequantize=False,
        allow_nonfinite=True, copy_code=False,
    )  # fmt: skip
    (plan,) = plans_of(inputs, parameters)
    device = pick_device("cpu")
    every = list(segments(plan))
    wanted = [segment for segment in every if plan.items[segment.item].action == "merge"]
    records = np.zeros((len(every), RECORD))
    warm_up([plan], device)
    done, total = 0, sum(segment.count for segment in wanted)
    for result in run([plan], ((s, (0,)) for s in wanted), lambda *_: None, workers=threads, device=device):
        if result is not None:
            records[result.segment.index] = result.records[0]
            done += result.segment.count
        if progress is not None:
            progress(done, total)
    check_inputs(inputs)
    shapes = {item.name: item.source.shape for item in plan.items}
    other = [item.name for item in plan.items if item.action in ("keep", "take")]
    return _from_statistics(statistics(plan, records)["tensors"], shapes, other), list(plan.notes)


def reported_change(out: str | Path) -> WeightChange:
    """Return how much the weights changed in the round that a merged folder is of, from its report: sft - start.

    Nothing but headers is read. The norms before are those of the base. Raises CheckpointError for a folder without a
    report, or of a merge whose report does not tell it.

    >>> from mergekit_imm import merge_checkpoints
    >>> _ = merge_checkpoints(base_folder, sft_folder, out_folder)
    >>> f"{reported_change(out_folder).layers['model.layers.0'].change:.3f}"
    '0.080'
    """
    from ..checkpoint.source import open_checkpoint
    from ..json_input import parse_json
    from ..recipe import REPORT_FILE, read_recipe

    folder = Path(out).expanduser()
    recipe, path = read_recipe(folder), folder / REPORT_FILE
    if recipe is None or not path.exists():
        raise CheckpointError(
            f"{shown(out)} has no {REPORT_FILE}; give a folder that imm-merge made, or BASE and SFT themselves"
        )
    sparsify = recipe["parameters"].get("sparsify", "dare")
    if sparsify != "dare":
        raise CheckpointError(
            f"{shown(out)} was merged with sparsify {shown(sparsify)}, and its report tells what that left of the"
            " change; give BASE and SFT themselves"
        )
    try:
        tensors = parse_json(path.read_bytes())["tensors"]
        shapes = {name: each.shape for name, each in open_checkpoint(folder, "base").tensors.items()}
        other = [name for name, entry in tensors.items() if entry["action"] in ("keep", "take")]
        return _from_statistics(tensors, shapes, other)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NonFiniteError | MismatchError):
            raise
        raise CheckpointError(f"{shown(path)} is damaged: {shown(error, 200)}; merge again") from error


def _from_statistics(
    tensors: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], other: Sequence[str]
) -> WeightChange:
    norms = {}
    for name, entry in tensors.items():
        if entry["action"] == "merge":
            change, before = (math.nan if entry[key] is None else entry[key] for key in ("delta_norm", "base_norm"))
            norms[name] = Norms(change, before, tuple(shapes[name]))
    return summed(norms, other)


def by_stack(layers: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the stacks of layers: (prefix, keys in the order of their numbers)."""
    found: dict[str, list[str]] = {}
    for layer in sorted(layers, key=_place):
        found.setdefault(layer.rpartition(".")[0], []).append(layer)
    yield from found.items()
