"""Merge a model that comes as a stream of tensors, as weight-sync hooks and state dicts give it, back towards its base.

The stream is the sft of the merge. Base and start are opened first, and the merge is planned as if the stream gave the
base's tensors, so that each that comes can be merged and handed on at once. When the stream ends, all its headers are
known: the merge is planned again (`plan.decide`), as of a saved model, and what was done must be what that plan says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.open_checkpoint import is_hub_id
from ..checkpoint.reader import Files, check_inputs
from ..common.checks import described
from ..common.messages import shown
from ..common.threads import default_workers
from ..errors import ArgumentError, CheckpointError, MismatchError
from ..model.rename_rules import apply_rules
from ..numerics.dtypes import MERGED
from ..numerics.reference import DTYPES
from ..options.options import MergeOptions, RunOptions, options_from, with_files_read
from ..plan.accounts import check_tensors
from ..plan.compatibility import check_alike, copied_by, refuse
from ..plan.decide import Decided, decide
from ..plan.make_plan import comparer
from ..plan.open_inputs import (
    check_platform,
    dequantised_or_refused,
    input_refs,
    prepared,
    round_of,
    without_same_start,
)
from ..plan.plan import Item
from ..transforms.kept_quantised import without_kept
from ..transforms.match_names import matched
from .given import Given, Values, givens, header, layout
from .in_place import InPlaceMerge, TensorUpdate
from .inputs import check_vocabularies, opened
from .local_shards import HEADER_DTYPES, Live, check_kind, local_of, parts_of
from .match_stream import StreamNames
from .stream_ties import StreamTies, comes_first

_OF_PEFT = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")

Named = Iterator[tuple[str, torch.Tensor]]


def merged_stream(
    weights: Iterable[tuple[str, torch.Tensor]],
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
) -> Named:
    """Merge a model on its way: take its tensors one by one, yield each merged back towards the base; write nothing.

        tuned  = start + factor * DARE(sft - start)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        weights: (name, tensor) pairs of the sft, each of its tensors once, in any order, on any device: a generator of
            a weight-sync hook, `model.state_dict().items()`. Read once. A tensor is not changed, and no longer needed
            when the next is asked for, so all may share one buffer; those that must wait are copied.
        base, start: as in `merge_checkpoints`; read from disk in slices. The files must stay as they are meanwhile.
        alpha, drop, seed, iteration, importance, shrink, clip, layer_factors, reference: as in `merge_checkpoints`.
        keep, take, no_drop, rename, leave_out, dequantize, workers, allow_nonfinite: as in `merge_checkpoints`.

    The bits are those that `merge_checkpoints` writes from the saved model, in the dtype of each given tensor, on its
    device (computed on the CPU). A DTensor stays one: each rank merges what it holds, and all give the same tensors in
    the same order. Names and shapes are the base's, as `iter_merged` yields them and loaders take them: wrappers and
    other spellings are mapped, fused experts and projections are split where the base has them apart, and the reverse;
    a tied tensor comes under each name that the base stores.

    Memory: the tensor given, its result, and 10 MiB for each worker. These wait, as copies: parts of a tensor that the
    base stores fused, until it is whole (of experts, all of a layer); square stacks of experts, until the other stack
    of their layer tells which way they lie; a head that may be tied, until its embedding comes, and both, where the
    base stores both.

    Checked when called: options, and the headers of base and start. At each tensor: its name, shape and dtype, that it
    came only once, and its values: NaN and infinity raise before it is yielded. At the end: that nothing is missing,
    that all names matched as those of the saved model would, and that no file changed. So a receiver has a whole,
    correct model only when the iterator ends without an error. Closing it closes the files.

    Raises MergeError (see `mergekit_imm.errors`), one line that names the cure. Source: arXiv 2503.02103, Eq. 5 to 7.

    >>> from safetensors.torch import save_file
    >>> save_file({"w": torch.zeros(4)}, "base.safetensors")
    >>> for name, tensor in merged_stream([("w", torch.ones(4))], "base.safetensors", alpha=0.75, drop=0):
    ...     print(name, tensor)
    w tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    given = locals()
    check_platform()
    _check_pairs(weights)
    refs = input_refs({"base": base, "start": start})
    options = with_files_read(options_from(given, MergeOptions))
    workers = options_from(given, RunOptions).workers or default_workers()
    if any(map(is_hub_id, refs.values())):  # check the headers before hours of downloading
        _Stream(opened(refs, options, dry_run=True), options, workers)
    inputs = without_same_start(opened(refs, options))
    if iteration is None:
        options = replace(options, iteration=round_of(inputs))
    return _Stream(inputs, options, workers).merged(weights)


class _Stream:
    """A merge of a stream: the plan for what may come, and what came."""

    def __init__(self, inputs: dict[str, Checkpoint], options: MergeOptions, workers: int) -> None:
        self._inputs, self._options, self._workers = inputs, options, workers
        self._came: dict[str, Given] = {}  # by name in the stream
        self._held: dict[str, torch.Tensor] = {}  # copies of tensors that wait, by name in the stream
        self._made_of: dict[str, str] = {}  # the base's name -> the stream's
        self._done: dict[str, _Record] = {}  # by key
        self._models = _ready(inputs, options)
        self._ties = StreamTies(self._models)
        self._stand_in, self._plan = self._planned({})
        self._names = StreamNames(self._base, options.rename)
        self._items = {
            name: item for item in self._plan.items for name in (item.name, *(out.name for out in item.outs))
        }

    @property
    def _base(self) -> Checkpoint:
        return self._models["base"]

    def _planned(self, given: Mapping[str, Tensor]) -> tuple[Checkpoint, Decided]:
        """Plan the merge of these tensors, under the base's names, and of stand-ins for all others of the base."""
        sft = Checkpoint("sft", "stream", None, {}, {**self._base.tensors, **given})
        models, options = {**self._models, "sft": sft}, self._options
        if options.keep or options.take:
            models = without_kept(models, copied_by(options))
            # The others may name what only the stream has.
            known = [each for each in options.take if any(re.search(each, name) for name in sft.tensors)]
            options = replace(options, take=tuple(known))
        decided = decide(models, options, self._ties.same(comparer(models)))
        return models["sft"], decided

    def _planned_whole(self) -> Decided:
        """Plan the merge of the stream that has ended, as of a saved model."""
        sft = Checkpoint(
            "sft", "stream", None, {}, {self._names.placed(name): each for name, each in self._came.items()}
        )
        models = prepared({**self._inputs, "sft": sft}, self._options)
        same = self._ties.same(comparer(models))
        decided = decide(models, self._options, same)
        check_tensors(decided, same)
        return decided

    def merged(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Named:
        """Yield the merged tensors."""
        with Files(self._models) as files:
            merge = InPlaceMerge({**self._models, "sft": self._stand_in}, self._options, (), self._workers, None)
            for pair in weights:
                yield from self._merged(*_checked(pair), merge, files)
                del pair  # while the next is made, this one is not needed
            if not self._came:
                raise MismatchError("the stream gave no tensors; give a generator that was not read before")
            yield from self._rest(merge, files)
        check_inputs(self._models)

    def _merged(self, name: str, tensor: torch.Tensor, merge: InPlaceMerge, files: Files) -> Named:
        """Yield what a tensor completes."""
        given = header(name, tensor)
        if name in self._came:
            raise MismatchError(f"tensor '{shown(name)}' came twice in the stream; give each tensor once")
        self._came[name] = given
        made = self._names.match(given)
        if name in self._names.waiting:
            self._held[name] = _copy(tensor)
        tensors = {**self._held, name: tensor}
        values = Values(tensors)
        for new, side in made.items():
            names = [part.given for part in givens(side)]
            before = self._made_of.setdefault(new, names[0])
            if before != names[0]:
                raise MismatchError(
                    f"two tensors of the stream would become '{shown(new)}' of {self._base.label}: '{shown(before)}'"
                    f" and '{shown(names[0])}'; change rename, or leave one of them out"
                )
            if not isinstance(side, Given) and any(isinstance(tensors[each], DTensor) for each in names):
                raise MismatchError(
                    f"tensor '{shown(names[0])}' of the stream is a DTensor, and {self._base.label} has its elements"
                    f" in other tensors, such as '{shown(new)}'; give whole tensors: (name, tensor.full_tensor())"
                )
            yield from self._matched(new, side, values, merge, files)
        for each in self._held.keys() - self._names.waiting - self._ties.waiting:
            del self._held[each]

    def _matched(self, name: str, side: Tensor, values: Values, merge: InPlaceMerge, files: Files) -> Named:
        """Yield a tensor under its name in the base, merged; what may be tied to another, once that is known."""
        item = self._items.get(name)
        groups = self._plan.ties.groups
        if isinstance(side, Given) and self._ties.concerns(name, side, groups):
            group = groups.get(name)
            waits = item is None or (group is not None and not comes_first(name, item, group))
            self._ties.add(name, side, values.of(side), waits=waits)
            if waits:
                self._held.setdefault(side.given, _copy(values.of(side)))
            elif item is not None:
                yield from self._done_with(item, side, values, merge, files)
            yield from self._untied(merge, files)
        elif item is not None:
            yield from self._done_with(item, side, values, merge, files)
        elif any(re.search(pattern, name) for pattern in self._options.take):
            self._done[name] = _Record("take", None, (name,), layout(side))
            yield name, _copy(values.of(side))
        else:  # raises, unless the base keeps it in another form
            _, decided = self._planned({name: side})
            if any(each.name == name for each in decided.items):
                raise MismatchError(f"tensor '{shown(name)}' of the stream is not in {self._base.label}")

    def _untied(self, merge: InPlaceMerge, files: Files) -> Named:
        """Yield the tensors that wait for others that they may be tied to, if all of these are there."""
        if not self._ties.pending:
            return
        _, decided = self._planned(self._ties.came)
        self._ties.settle(decided.ties.groups)
        wait = self._ties.waiting | self._names.waiting
        for item in decided.items:
            side = item.sides.get("sft")
            if isinstance(side, Given) and side.given in self._held and side.given not in wait:
                yield from self._done_with(item, side, Values(self._held), merge, files)

    def _rest(self, merge: InPlaceMerge, files: Files) -> Named:
        """Yield what waited, and what is kept and did not come. Raises MismatchError if anything is missing."""
        decided = self._planned_whole()
        values = Values(self._held)
        records = {item.name: _record(item) for item in decided.items}
        gone = (i.name for i in decided.items if i.name not in self._done and not self._holds(i.sides.get("sft")))
        wrong = next((name for name, record in self._done.items() if records.get(name) != record), next(gone, None))
        if wrong is not None:
            raise MismatchError(
                f"tensor '{shown(wrong)}' was merged from '{shown(self._made_of.get(wrong, wrong))}' of the stream, but"
                " with all names known it is another; what was yielded is wrong: give names with rename=[...], or use"
                " merge_into"
            )
        for item in decided.items:
            if item.name not in self._done:
                yield from self._done_with(item, item.sides.get("sft"), values, merge, files)

    def _holds(self, side: Tensor | None) -> bool:
        return side is None or all(part.given in self._held for part in givens(side))

    def _done_with(self, item: Item, side: Tensor | None, values: Values, merge: InPlaceMerge, files: Files) -> Named:
        """Yield a planned tensor, merged with what the stream gave for it, under each name that the base stores."""
        if item.name in self._done:
            return
        if side is not None:
            item = replace(item, sides={**item.sides, "sft": side} if item.action != "keep" else item.sides)
            self._check(item, side)
        self._done[item.name] = _record(item)
        result = _result(item, None if side is None else values.of(side), merge, files)
        for out in item.outs:
            yield out.name, result
        del result

    def _check(self, item: Item, side: Tensor) -> None:
        if item.action not in ("merge", "copy"):
            return
        here = replace(self._stand_in, tensors={item.name: side})
        check_vocabularies(self._base, here, "save the stream's, and use merge_checkpoints with vocab='base' or 'sft'")
        check_alike([(item.name, item.sides)], self._plan.used, self._options, refuse)


@dataclass(frozen=True)
class _Record:
    """What was done with a tensor, to compare with what the plan for the whole stream says."""

    action: str
    constants: object
    names: tuple[str, ...]
    made_of: object


def _record(item: Item) -> _Record:
    side = item.sides.get("sft")
    made_of = None if side is None or item.action == "keep" else layout(side)
    constants = item.constants if item.action == "merge" else None
    return _Record(item.action, constants, tuple(out.name for out in item.outs), made_of)


def _ready(inputs: dict[str, Checkpoint], options: MergeOptions) -> dict[str, Checkpoint]:
    """Return base and start, dequantised, under the base's names."""
    models = dequantised_or_refused(inputs, options)
    if "start" not in models:
        return models
    names, rules = [*models["start"].tensors], []
    for rule in options.rename:  # the others are for the stream
        before, names = names, apply_rules(names, [rule])
        rules += [rule] if names != before else []
    return matched(models, rules)


def _check_pairs(weights: object) -> None:
    cure = ""
    if isinstance(weights, Mapping):
        cure = "weights.items()"
    elif isinstance(weights, torch.nn.Module):
        cure = "weights.state_dict().items()"
    elif not isinstance(weights, Iterable):
        cure = "an iterable of them"
    if cure:
        raise ArgumentError(f"weights is {described(weights)}; merged_stream takes (name, tensor) pairs: give {cure}")


def _checked(pair: object) -> tuple[str, torch.Tensor]:
    """Return the name and tensor that came. Raises ArgumentError, MismatchError."""
    try:
        name, tensor = pair  # type: ignore[misc]
    except (TypeError, ValueError):
        name, tensor = None, None
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        what = f"('{shown(name)}', {type(tensor).__name__})" if isinstance(name, str) else f"a {type(pair).__name__}"
        raise ArgumentError(f"the stream gave {what}; it must give (name, tensor) pairs")
    check_kind(name, tensor, "the stream")
    if _OF_PEFT.search(name):
        raise MismatchError(
            f"'{shown(name)}' of the stream is a part of an adapter: merge it first (`merge_adapter()` or"
            " `merge_and_unload()`), and give the model's tensors under their own names, without `.base_layer`"
        )
    return name, tensor


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _result(item: Item, given: torch.Tensor | None, merge: InPlaceMerge, files: Files) -> torch.Tensor:
    """Return a planned tensor, on the device of the one that the stream gave, which stays as it is."""
    if item.action == "take":
        assert given is not None
        return _copy(given)  # the receiver's own: the giver may use its memory again
    base = item.sides["base"]
    kept = item.action == "keep"
    if kept and (given is None or tuple(given.shape) != base.shape or not _are_floats(given, base)):
        dtype = item.outs[0].dtype
        if dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{shown(item.name)}' is {dtype}, which has no torch dtype here; merge into a folder instead"
            )
        device = "cpu" if given is None else local_of(given).device
        given = torch.empty(base.shape, dtype=DTYPES[dtype], device=device)
    assert given is not None
    local = local_of(given)
    copied = torch.empty(local.shape, dtype=local.dtype)
    if not kept:
        copied.copy_(local)
    live = Live(
        item.name, tuple(given.shape), HEADER_DTYPES[given.dtype], parts_of(item.name, given, copied), id(copied)
    )
    sides = item.sides if kept else {**item.sides, "sft": live}
    merge.merge(TensorUpdate(replace(item, sides=sides), live), files)
    if item.action == "copy":
        return _copy(given)
    result = copied.to(local.device)
    if not isinstance(given, DTensor):
        return result
    mesh, placements = given.device_mesh, given.placements
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=given.shape, stride=given.stride())


def _are_floats(given: torch.Tensor, base: Tensor) -> bool:
    return base.dtype in MERGED and HEADER_DTYPES[given.dtype] in MERGED
