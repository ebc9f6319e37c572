"""Check from names, shapes and dtypes that the models of a merge have the same tensors, or options that decide."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePath

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.model_files import SPLIT, is_shard, leave_out_option
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MergeError, MismatchError
from ..model.tensor_names import blanked, folder_of, is_embedding_or_head, matcher, only_in
from ..numerics.dtypes import MERGED, WHOLE
from ..options.options import MergeOptions
from ..transforms.experts import is_fused
from ..transforms.quantised_units import Copied
from ..transforms.tokenizer_files import token_differences
from .advice import SAVE_ALIKE, Advice
from .tied_embeddings import Group

Selects = Callable[[str, Sequence[str], str], bool]  # option, names, key
Sides = tuple[str, Mapping[str, Tensor]]  # a tensor's key, and the tensor in each input by role
Complain = Callable[[MergeError, Collection[str]], None]  # called with an error and the tensors it is about


def refuse(error: MergeError, _: Collection[str] = ()) -> None:
    """Complain by raising the error."""
    raise error


def side_of(checkpoint: Checkpoint, name: str, group: Group | None) -> Tensor | None:
    """Return the tensor that a name stands for in a checkpoint; None if it has none."""
    if name in checkpoint.tensors or group is None:
        return checkpoint.tensors.get(name)
    # A tied tensor may be stored under another of its names; in an adapter only while the tie holds.
    names = group.siblings if checkpoint.adapter is None else group.names
    return next((found for n in names if (found := checkpoint.tensors.get(n))), None)


def check_names(
    used: Mapping[str, Checkpoint], options: MergeOptions, groups: Mapping[str, Group], complain: Complain = refuse
) -> None:
    """Complain about tensors that only one model has and no option permits."""
    base, sft = used["base"], used["sft"]
    others = {  # an adapter's names were matched to the model's
        role: each for role, each in used.items() if each.adapter is None and each.tensors.keys() != base.tensors.keys()
    }
    if not others:
        return
    advice = Advice(used, options)
    whole = _of_lone_shard(used)
    kept, taken = matcher(options.keep), matcher(options.take)
    kept_names = {n for n in base.tensors if kept(n)} | set(groups)
    taken_names = {n for n in sft.tensors if taken(n)} | set(groups)
    for role, each in others.items():
        lacking = set(base.tensors) - kept_names - set(each.tensors)
        surplus = set(each.tensors) - taken_names - set(base.tensors)
        if any(here != there for here, there in _vocabularies(used, role)):  # reported for those that both have
            lacking, surplus = ({n for n in names if not is_embedding_or_head(n)} for names in (lacking, surplus))
        kept_layers = set(base.tensors) - lacking - set(each.tensors)
        deeper = kept_layers and advice.of_other_depth("--keep", kept_layers, "base", known=True)
        if deeper:
            complain(MismatchError(f"--keep cannot reconcile two depths: {deeper}"), kept_layers)
        shapes = {base.tensors[name].shape for name in lacking}
        renamed = not shapes.isdisjoint(each.tensors[name].shape for name in surplus)  # perhaps the same tensors
        for file, found in _by_file(base, lacking):
            cure = whole or _cure(advice, "--keep", found, "base", renamed and not file)
            _complain_of(found, base, each, file, cure, complain)
        for file, found in _by_file(each, surplus):
            folder = folder_of(file)
            if whole:
                cure = whole
            elif folder and all(name.removeprefix(folder) in each.tensors for name in found):
                cure = "their names suggest another checkpoint of the same model"
            elif role == "sft":
                cure = _cure(advice, "--take", found, "sft", renamed and not file)
            else:
                cure = "a start must have the base's tensors: save it again"
                if sft.adapter is None:
                    cure += ", or take the delta from the base instead (--reference base)"
            _complain_of(found, each, base, file, cure, complain)


def _of_lone_shard(used: Mapping[str, Checkpoint]) -> str:
    """Return the cure if an input is one shard of a model, given by its path; else ""."""
    for each in used.values():
        path = PurePath(each.ref)
        if [*each.files] == [path.name] and is_shard(path.name):
            return f"{each.label} is one shard of a model: give its folder, '{shown(path.parent, 400)}'"
    return ""


def _by_file(checkpoint: Checkpoint, names: Collection[str]) -> list[tuple[str, set[str]]]:
    """Group tensors by file, those of the model's own files under ""."""
    beside = {file for part in checkpoint.parts if part.beside or part.folder for file in part.files}
    files: dict[str, set[str]] = {}
    for name in names:
        file = checkpoint.file_of.get(checkpoint.original_names.get(name, name), "")
        files.setdefault(file if file in beside else "", set()).add(name)
    return sorted(files.items())


def _complain_of(
    names: Collection[str], one: Checkpoint, other: Checkpoint, file: str, cure: str, complain: Complain
) -> None:
    label = f"{one.label} ({shown(file)})" if file else one.label
    # The base's modules.json or model_index.json is copied and names the folder: without weights it would not load.
    needed = (
        "/" in file and one.role == "base" and not {*SPLIT}.isdisjoint(one.side) and {*SPLIT}.isdisjoint(other.side)
    )
    leave_out = f"; or leave the file out: {leave_out_option(file)}" if file and not needed else ""
    complain(MismatchError(f"{only_in(names, other.tensors, label, other.label)}; {cure}{leave_out}"), names)


def _cure(advice: Advice, option: str, names: Collection[str], extra: str, renamed: bool) -> str:
    if renamed:
        return (
            "the other has tensors of these shapes under other names: if they are the same, --rename REGEX=REPLACEMENT;"
            " if not, --keep REGEX and --take REGEX"
        )
    offer = advice.offer(option, names, extra)
    return f"to let them through: {offer.option}" if offer.option else offer.instead


def copied_by(options: MergeOptions) -> Copied:
    """Return which tensors --keep and --take name, without checking that there are any."""
    return Copied(matcher(options.keep), matcher(options.take))


def selector(options: MergeOptions, base: Checkpoint, sft: Checkpoint, complain: Complain = refuse) -> Selects:
    """Check the patterns against the names; return a predicate: does an option name one of these tensors?"""
    if not (options.keep or options.take or options.no_drop):
        return lambda *_: False
    every = [*base.tensors, *(name for name in sft.tensors if name not in base.tensors)]
    for option in ("keep", "take", "no_drop"):
        names = every if option == "take" else list(base.tensors)
        for pattern in getattr(options, option):
            if not any(re.search(pattern, name) for name in names):
                unknown = ArgumentError(
                    f"--{option.replace('_', '-')} '{shown(pattern)}' matches none of the {len(names)} tensor names,"
                    f" such as {shown(names[0]) if names else ''!r}"
                )
                complain(unknown, ())
    matchers = {option: matcher(getattr(options, option)) for option in ("keep", "take", "no_drop")}
    both = [name for name in base.tensors if matchers["keep"](name) and matchers["take"](name)]
    if both:
        complain(ArgumentError(f"tensor '{shown(both[0])}' is both kept and taken; change --keep or --take"), both)
    return lambda option, names, key: any(map(matchers[option], {*names, key}))


def check_alike(
    tensors: Iterable[Sides], used: Mapping[str, Checkpoint], options: MergeOptions, complain: Complain
) -> None:
    """Complain about tensors that differ in shape or kind of dtype, once for each kind of tensor."""
    advice = Advice(used, options)
    faulty: dict[tuple[str, str, str], list[str]] = {}
    sides_of = {}
    for name, sides in tensors:
        for role, side in sides.items():
            base = sides["base"]
            kinds = base.dtype in MERGED and side.dtype in MERGED
            if side.dtype not in (*MERGED, *WHOLE):
                fault = ""
            elif side.shape != base.shape or not (kinds or side.dtype == base.dtype):
                fault = f"{base.dtype} {list(base.shape)} {side.dtype} {list(side.shape)}"
            else:
                continue
            faulty.setdefault((role, blanked(name), fault or side.dtype), []).append(name)
            sides_of[name] = sides
            break
    for (role, kind, _), names in faulty.items():
        sides = sides_of[names[0]]
        named = f"tensor '{shown(names[0])}' is" if len(names) == 1 else f"{len(names)} tensors '{shown(kind)}' are"
        complain(_unlike(named, names, role, sides, used, advice), names)


def _unlike(
    named: str,
    names: Sequence[str],
    role: str,
    sides: Mapping[str, Tensor],
    used: Mapping[str, Checkpoint],
    advice: Advice,
) -> MergeError:
    base, side = sides["base"], sides[role]
    if side.dtype not in (*MERGED, *WHOLE):
        plain = {role for role, each in sides.items() if each.dtype in (*MERGED, *WHOLE)}
        options = {"base": "--keep", "sft": "--take"}
        ready = advice.either(*(o for r, o in options.items() if r in plain or not plain), names=names)
        return CheckpointError(
            f"{named} {side.dtype} in {used[role].label}; quantised, float8 and complex tensors are not merged: use an"
            f" unquantised checkpoint{ready and f', or {ready}'}"
        )
    both = (
        f"{named} {base.dtype} {list(base.shape)} in {used['base'].label} and {side.dtype} {list(side.shape)} in"
        f" {used[role].label}"
    )
    if side.shape == base.shape:
        offer = advice.offer(_of_one(used), names)
        cure = f"use {offer.option}" if offer.option else offer.instead
        return MismatchError(f"{both}; integers can be merged neither with floats nor with other integers: {cure}")
    return MismatchError(f"{both}; shapes must be equal: {_of_shapes(names, role, sides, used, advice)}")


def _of_shapes(
    names: Sequence[str], role: str, sides: Mapping[str, Tensor], used: Mapping[str, Checkpoint], advice: Advice
) -> str:
    """Return the cure for tensors of different shapes."""
    base, side = sides["base"], sides[role]
    if 0 in (side.count, base.count):
        return "the empty one was saved without gathering its shards (ZeRO-3?): save that model again"
    rows = any(map(is_embedding_or_head, names)) or (base.shape[:1], side.shape[:1]) in _vocabularies(used, role)
    if rows and side.shape[1:] == base.shape[1:]:
        differences = token_differences(used["base"], used[role])
        return (
            f"the vocabularies differ{f' ({differences})' if differences else ''}; choose one, --vocab base or"
            " --vocab sft, which merge the rows that both have"
        )
    if sorted(side.shape) == sorted(base.shape):
        return f"they have the same dimensions in another order; {SAVE_ALIKE}"
    if any(map(is_fused, names)):
        return "their experts differ in number or size: these are different architectures"
    other = advice.of_other_config(shapes=True)
    if other:
        return other
    option = _of_one(used)
    offer = advice.offer(option, names)
    kept = "base" if option == "--keep" else "model"
    return f"use {offer.option} for the {kept}'s" if offer.option else offer.instead


def _of_one(used: Mapping[str, Checkpoint]) -> str:
    """The option that copies tensors: the base's or, for a live model, which cannot hold those, its own."""
    return "--keep" if used["sft"].files else "--take"


def _vocabularies(used: Mapping[str, Checkpoint], role: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return pairs of row counts of embeddings and heads, in the base and in another model."""
    base, other = used["base"].tensors, used[role].tensors
    return {(base[n].shape[:1], other[n].shape[:1]) for n in base if n in other and is_embedding_or_head(n)}


def main_dtype(base: Checkpoint) -> str:
    """Return the dtype of most float elements, used for tensors that only the sft has."""
    floats = Counter[str]()
    for tensor in base.tensors.values():
        if tensor.dtype in MERGED:
            floats[tensor.output_dtype] += tensor.count
    return floats.most_common(1)[0][0] if floats else "F32"
