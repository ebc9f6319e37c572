"""Merge a model in memory back towards its base, in place, as a training loop does at the end of a round.

The model is the sft of the merge. Base and start are streamed from disk into the parameters' memory; there is never a
second copy of a tensor. Tensors are matched and checked as in a merge of checkpoints (`plan.decide`): whole, under the
base's names. Each process then merges the elements it holds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor as LazyTensor
from ..checkpoint.lazy_tensor import is_stored
from ..checkpoint.open_checkpoint import is_hub_id
from ..checkpoint.reader import Files
from ..checkpoint.safetensors_file import fingerprint
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..common.notes import Note, note
from ..common.progress import Watched, check_progress, watched
from ..common.threads import default_workers
from ..errors import MismatchError, PartialMergeError
from ..model.tensor_names import is_embedding_or_head, ready_option, tied_key, unwrapped
from ..numerics.dtypes import MERGED
from ..options.options import MergeOptions, RunOptions, options_from, with_files_read
from ..plan.accounts import check_tensors
from ..plan.decide import Decided, decide
from ..plan.make_plan import comparer
from ..plan.open_inputs import (
    check_platform,
    input_refs,
    prepared,
    round_of,
    without_same_start,
)
from ..plan.plan import Item
from ..plan.resolution import notes_of, sampled
from ..plan.unchanged import middle, values
from ..ranks.ranks import ALONE, Ranks, together
from .in_place import InPlaceMerge, TensorUpdate
from .inputs import check_vocabularies, opened, placer
from .local_shards import Live, Part, is_distributed, live_tensors

COMPARED = 1 << 18  # elements per comparison


@dataclass(frozen=True, repr=False)
class LiveReport(Displayed):
    """What `merge_into` did: counts of the base's tensors by action, the round, and notes."""

    tensors: dict[str, int]  # merged, kept, taken, copied
    iteration: int
    notes: list[str]

    def _summary(self) -> Summary:
        counts = ", ".join(f"{count} {action}" for action, count in self.tensors.items() if count)
        return Summary(f"iteration {self.iteration}; {counts}", self.notes)


def merge_into(
    model: nn.Module,
    base: str | Path,
    *,
    start: str | Path | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int | None = None,
    importance: Mapping[str, float] | str | Path | None = None,
    shrink: float = 1.0,
    clip: tuple[float, float] | None = None,
    layer_factors: Mapping[str, float] | str | Path | None = None,
    reference: str = "start",
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Watched = None,
) -> LiveReport:
    """Merge a model in memory back towards its base, in place: the model is the sft and becomes the merged one.

        tuned  = start + factor * DARE(sft - start)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        model: an nn.Module on CPU or GPU with the base's parameters and persistent buffers. Names that transformers
            uses in memory are mapped to the base's, as in `merge_checkpoints`.
        base, start: as in `merge_checkpoints`; read from disk in slices.
        alpha, drop, seed, iteration, importance, shrink, clip, layer_factors, reference: as in `merge_checkpoints`.
        keep, take, no_drop, rename, leave_out, dequantize, workers, allow_nonfinite: as in `merge_checkpoints`; `take`
            leaves a tensor as is.
        dry_run: check names, shapes and headers; write nothing.
        progress: as in `merge_checkpoints`, on the first rank; inputs are read twice.

    The bits are those that `merge_checkpoints` writes from the saved model, in the dtype of each parameter. A first
    pass computes everything and checks names, shapes and values before any element is written; a failure after that
    raises PartialMergeError, and the model must be loaded again. If parameters are DTensors (FSDP2, tensor
    parallelism), every rank of the process group calls this; each reads only what it holds, and ranks exchange only
    checks and errors. The optimizer's state does not change.

    Returns a LiveReport. Raises MergeError (see `mergekit_imm.errors`), one line that names the cure.
    Source: arXiv 2503.02103, Eq. 5 to 7.

    >>> from safetensors.torch import save_file
    >>> model = torch.nn.Module()
    >>> model.register_parameter("w", torch.nn.Parameter(torch.ones(4)))
    >>> save_file({"w": torch.zeros(4)}, "base.safetensors")
    >>> merge_into(model, "base.safetensors", alpha=0.75, drop=0).tensors
    {'merged': 1}
    >>> model.w.data
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    given = locals()
    first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    with watched(progress, "merging", rate=lambda x: f"{x / 1e9:.2f} GB/s", here=first) as update:
        return merged_into({**given, "progress": update}, lambda: (live_tensors(model), None))


def check_untrained(model: nn.Module, base: str | Path, **options: Any) -> None:
    """Check what `merge_into` with these options would, before training: the model's values must be the start's.

    They are compared in the model's dtypes, but for an input on the hub that is not here yet, and with
    reference="base", for which it does not matter where training started. Raises MergeError.
    """
    defaults = merge_into.__kwdefaults__ or {}
    given = {**defaults, **options, "model": model, "base": base, "dry_run": True}
    merged_into(given, lambda: (live_tensors(model), None), untrained=given["reference"] == "start")


def merged_into(
    given: Mapping[str, Any],
    held: Callable[[], tuple[dict[str, Live], Checkpoint | None]],
    *,
    untrained: bool = False,
) -> LiveReport:
    """Merge as `merge_into` does with these arguments. `held` returns the tensors to write, and an adapter or None.

    The adapter, trained on the model, is then the sft, and the model's tensors must be the start's, or the adapter's.
    An `untrained` model's must be the start's too.
    """
    model, dry_run, iteration = (given[name] for name in ("model", "dry_run", "iteration"))
    progress = check_progress(given["progress"])
    ranks = Ranks.of_group() if is_distributed(model) and dist.is_initialized() else ALONE

    def checked() -> tuple[dict[str, str | Path], MergeOptions, int, dict[str, Live], Checkpoint | None]:
        check_platform()
        refs = input_refs({"base": given["base"], "start": given["start"]})
        options = with_files_read(options_from(given, MergeOptions))
        return refs, options, options_from(given, RunOptions).workers or default_workers(), *held()

    refs, options, threads, state, adapter = together(ranks, checked)
    places = {id(live): number for number, live in enumerate(state.values())}
    _check_same(ranks, lambda: [(name, live.shape, live.dtype, places[id(live)]) for name, live in state.items()])
    equal = _equal_embeddings(state, ranks)

    def planned() -> tuple[dict[str, Checkpoint], MergeOptions, Decided, list[TensorUpdate]]:
        if any(is_hub_id(ref) for ref in refs.values()):  # check the headers before hours of downloading
            there = opened(refs, options, dry_run=True)
            _plan(there, model, state, adapter, equal, options)
        inputs = without_same_start(opened(refs, options, dry_run=dry_run))
        here = replace(options, iteration=round_of(inputs)) if iteration is None else options
        inputs, decided, live = _plan(inputs, model, state, adapter, equal, here)
        return inputs, here, decided, _updates(decided, live, inputs["sft"])

    inputs, here, decided, updates = together(ranks, planned)
    if untrained:
        updates = [replace(each, frozen=_origin(each.item)) for each in updates]
    merge = InPlaceMerge(inputs, here, updates, threads, progress)
    here_too = all(each.folder is not None for role, each in inputs.items() if role != "sft")  # not on the hub alone
    if (untrained or adapter is not None) and here_too:
        together(ranks, merge.check_frozen)
    if dry_run:
        return _report(inputs, here, decided)
    rounded = together(ranks, lambda: _note_if_rounded(inputs, updates))
    files = [file for each in inputs.values() for file in each.files.values()]
    actions = [(update.item.name, update.item.action, update.item.constants) for update in updates]
    _check_same(ranks, lambda: (here, actions, [fingerprint(file) for file in files]))
    together(ranks, lambda: merge.run(write=False))
    try:
        together(ranks, lambda: merge.run(write=True))
    except Exception as error:
        raise PartialMergeError(
            f"the merge failed after parts of the model were written: {error}; load the model again, from its last"
            " checkpoint, and merge again"
        ) from error
    return _report(inputs, here, decided, rounded)


def _note_if_rounded(inputs: Mapping[str, Checkpoint], updates: Sequence[TensorUpdate]) -> list[Note]:
    """Return a note if the model's dtype cannot hold the change, judged by parameters that are whole here."""
    if inputs["sft"].adapter is not None:  # its changes are not yet in the weights
        return []
    targets = {update.item.name: update.target for update in updates if _is_whole(update.target)}

    def read(item: Item, role: str) -> npt.NDArray[np.float64]:
        side, (first, count) = item.sides[role], middle(item.source)
        if role != "sft":
            return values(side, role, first, count, files)
        assert isinstance(side, Live)
        return side.parts[0].tensor.detach().view(-1)[first : first + count].double().cpu().numpy()

    with Files(inputs) as files:
        chosen = sampled([update.item for update in updates if update.item.name in targets])
        stored = [(item, targets[item.name].dtype) for item in chosen]
        return notes_of(stored, read, "load the model in float32 to keep all of it")


def _is_whole(tensor: LazyTensor) -> bool:
    if not isinstance(tensor, Live) or len(tensor.parts) != 1:
        return False
    part = tensor.parts[0].tensor
    return part.numel() == tensor.count and part.is_contiguous()


def _report(
    inputs: Mapping[str, Checkpoint], options: MergeOptions, decided: Decided, rounded: Sequence[Note] = ()
) -> LiveReport:
    counts = Counter({"keep": "kept", "take": "taken", "copy": "copied"}.get(i.action, "merged") for i in decided.items)
    notes = [*(note for each in inputs.values() for note in each.notes), *rounded]
    if decided.ties.broken:
        text = "{broken}: both are merged under their own names"
        notes.append(note("tie broken", text, broken=decided.ties.broken))
    return LiveReport(dict(counts), options.round, list(map(str, notes)))


def _check_same(ranks: Ranks, data: Callable[[], object]) -> None:
    """Raise MismatchError unless all ranks have equal data."""
    text = together(ranks, lambda: repr(data()) if ranks.size > 1 else "")
    if len(set(ranks.gather(blake2b(text.encode(), digest_size=16).digest()))) > 1:
        raise MismatchError(
            "the ranks would not make the same merge: arguments, files of base or start, or the model's tensors"
            " differ between ranks; give all ranks the same"
        )


def _plan(
    inputs: dict[str, Checkpoint],
    model: nn.Module,
    state: Mapping[str, Live],
    adapter: Checkpoint | None,
    equal: _Equal,
    options: MergeOptions,
) -> tuple[dict[str, Checkpoint], Decided, Checkpoint]:
    """Return the inputs under the base's names, the action for every tensor, and the model under the base's names.

    The sft is the adapter, if there is one, else the model.
    """
    live = {**inputs, "sft": _checkpoint(model, state, inputs["base"])}
    if adapter is None:
        inputs = prepared(live, options)
        live = inputs
    else:
        inputs, live = prepared({**inputs, "sft": adapter}, options), prepared(live, options)
    compare = comparer(inputs)

    def same(checkpoint: Checkpoint, one: LazyTensor, other: LazyTensor) -> bool:
        if not isinstance(one, Live) or not isinstance(other, Live):
            return compare(checkpoint, one, other)
        return one.memory == other.memory or frozenset((one.memory, other.memory)) in equal

    check_vocabularies(
        inputs["base"], live["sft"], "save it, and use merge_checkpoints with vocab='base' or vocab='sft'"
    )
    decided = decide(inputs, options, same)
    check_tensors(decided, same)
    return inputs, decided, live["sft"]


def _checkpoint(model: nn.Module, state: Mapping[str, Live], base: Checkpoint) -> Checkpoint:
    """Return the model as an input. A shared tensor keeps the names the base stores, or one if it stores none."""
    placed = placer(base)
    state = {placed(name): live for name, live in state.items()}
    names: dict[int, list[str]] = {}
    for each, live in state.items():
        names.setdefault(id(live), []).append(each)
    tensors: dict[str, LazyTensor] = {}
    for found in names.values():
        stored = [each for each in found if unwrapped(each) in base.tensors]
        for each in stored or [tied_key(found)]:
            tensors[each] = replace(state[each], name=each)
    config: Any = getattr(getattr(model, "module", model), "config", None)
    kinds = _kinds(config.to_dict()) if hasattr(config, "to_dict") else {}
    if kinds:  # the model's class may wrap the saved one
        kinds["architectures"] = base.config.get("architectures") if base.config else None
    return Checkpoint("sft", f"model {type(model).__name__}", None, {}, tensors, kinds or None, {}, ())


def _kinds(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the model types of a config and its nested configs."""
    found = {key: _kinds(value) for key, value in config.items() if key.endswith("config") and isinstance(value, dict)}
    return found | ({"model_type": config["model_type"]} if config.get("model_type") else {})


_Equal = frozenset[frozenset[Hashable]]  # pairs of memory keys with the same values


def _equal_embeddings(state: Mapping[str, Live], ranks: Ranks) -> _Equal:
    """Find separate embeddings and heads with equal values on all ranks; in files, that is a tie."""
    embeddings = {id(live): live for name, live in state.items() if is_embedding_or_head(name)}
    pairs = [
        (one, other)
        for one, other in itertools.combinations(embeddings.values(), 2)
        if (one.shape, one.dtype) == (other.shape, other.dtype)
    ]
    same = ranks.gather([_same_here(one.parts, other.parts) for one, other in pairs])
    return frozenset(
        frozenset((one.memory, other.memory)) for (one, other), *here in zip(pairs, *same, strict=True) if all(here)
    )


def _same_here(one: Sequence[Part], other: Sequence[Part]) -> bool:
    if [(part.place, part.tensor.shape) for part in one] != [(part.place, part.tensor.shape) for part in other]:
        return False
    return all(_same_bits(a.tensor, b.tensor) for a, b in zip(one, other, strict=True))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare two tensors bit by bit, some rows at a time; stop at the first difference."""
    if one.ndim == 0:
        one, other = one[None], other[None]
    rows = max(1, COMPARED // max(1, one[0].numel()))
    pieces = (
        (a.contiguous(), b.contiguous()) for a, b in zip(torch.split(one, rows), torch.split(other, rows), strict=True)
    )
    return all(torch.equal(a.view(torch.uint8), b.to(a.device).view(torch.uint8)) for a, b in pieces)


def _updates(decided: Decided, live: Checkpoint, sft: Checkpoint) -> list[TensorUpdate]:
    """Pair each item with the model's tensors it updates, and check that they can hold the result."""
    updates = []
    owners: dict[Hashable, str] = {}
    for item in decided.items:
        group = decided.ties.groups.get(item.name)
        found = [live.tensors[name] for name in (group.names if group else [item.name]) if name in live.tensors]
        if not found and sft is not live and item.action != "keep":
            raise MismatchError(
                f"tensor '{shown(item.name)}' of the base is not in {live.label}; is it the base's model?"
            )
        targets = {_memory_of(target): target for target in found}
        for memory, target in targets.items():
            if owners.setdefault(memory, item.name) != item.name:
                why = decided.ties.broken or "the base has two"
                raise MismatchError(
                    f"'{shown(owners[memory])}' and '{shown(item.name)}' are one tensor in {live.label}, but {why};"
                    " give the model two (clone one of them), or save it and use merge_checkpoints"
                )
            if item.action == "take":
                continue
            _check_fits(item, target, live)
            updates.append(TensorUpdate(item, target) if sft is live else _of_adapter(item, target, sft))
    surplus = [name for name, each in live.tensors.items() if _memory_of(each) not in owners] if sft is not live else []
    if surplus:
        raise MismatchError(f"tensor '{shown(surplus[0])}' of {live.label} is not in the base; is it the base's model?")
    return updates


def _of_adapter(item: Item, target: LazyTensor, sft: Checkpoint) -> TensorUpdate:
    """Return the update of a tensor of an adapter's model: trained whole, or frozen until the merge."""
    change = item.sides.get("sft")
    if change is None or not is_stored(change):
        return TensorUpdate(item, target, _origin(item))
    # The adapter's copy may be the target's own memory: of two equal ones each is read where it is written.
    own = sft.tensors.get(target.name, change)
    return TensorUpdate(replace(item, sides={**item.sides, "sft": own}), target)


def _origin(item: Item) -> str:
    """Return the role of the input that a merged tensor was before training; "" of others."""
    return ("start" if "start" in item.sides else "base") if item.action == "merge" else ""


def _memory_of(target: LazyTensor) -> Hashable:
    return target.memory if isinstance(target, Live) else id(target)


def _check_fits(item: Item, target: LazyTensor, sft: Checkpoint) -> None:
    base = item.sides["base"]
    kinds = base.dtype in MERGED and target.dtype in MERGED
    if base.shape != target.shape or not (kinds or base.dtype == target.dtype):
        raise MismatchError(
            f"tensor '{shown(item.name)}' is {base.dtype} {list(base.shape)} in the base and {target.dtype}"
            f" {list(target.shape)} in {sft.label}, which cannot hold the base's; leave the model's as it is:"
            f" {ready_option('--take', item.name)}"
        )
