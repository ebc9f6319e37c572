"""Decide, from names and headers, what happens to every tensor: merge, keep, take, copy or refuse."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Extended, Tensor, is_stored
from ..checkpoint.safetensors_file import TensorInfo
from ..common.garbage import uncollected
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MergeError, MismatchError
from ..model.config import check_configs
from ..model.tensor_names import folder_of, is_embedding_or_head, layer_key, ready_option
from ..numerics.dtypes import DTYPE_BITS, MERGED, TORCH_NAMES
from ..numerics.mask import Arithmetic, arithmetic, mask_key
from ..numerics.sparsifiers import parse_sparsify
from ..options.options import MergeOptions, layer_factors_of
from ..transforms.kept_quantised import intact
from ..transforms.sparsified_delta import LONGEST_ROW, Ranked, Trimmed
from .compatibility import Complain, Selects, check_alike, check_names, copied_by, main_dtype, refuse, selector, side_of
from .plan import Action, Item
from .tied_embeddings import Group, SameBytes, Ties, tied_groups

T = TypeVar("T")
_Named = tuple[str, tuple[str, ...], Action, dict[str, Tensor], str]  # key, output names, action, sides by role, dtype


@dataclass(frozen=True)
class Decided:
    """What happens to every tensor; output files are not assigned yet."""

    items: list[Item]
    used: Mapping[str, Checkpoint]
    ties: Ties


@uncollected()
def decide(
    models: Mapping[str, Checkpoint], options: MergeOptions, same_bytes: SameBytes, complain: Complain = refuse
) -> Decided:
    """Decide what happens to every tensor of a merge of base, sft and maybe start.

    `same_bytes` compares two tensors of one checkpoint; it is called only if one stores a tied tensor under several
    names. Every problem goes to `complain`, and its tensors are left undecided; all of them, if it is unknown which are
    tied. With the default, `refuse`, the first problem raises MismatchError, CheckpointError or ArgumentError.
    """
    used = {r: c for r, c in models.items() if r != "start" or options.reference == "start"}
    base, sft = models["base"], models["sft"]
    wrong: set[str] = set()

    def problem(error: MergeError, names: Collection[str]) -> None:
        complain(error, names)
        wrong.update(names)

    def tried(step: Callable[[], T], otherwise: T) -> T:
        try:
            return step()
        except MergeError as error:
            problem(error, ())
            return otherwise

    for folder in ("", *base.part_configs):
        configs = {r: (f"{c.label}{f' ({folder})' if folder else ''}", c.config_of(folder)) for r, c in models.items()}
        renamed = [role for role, each in models.items() if each.original_names]
        tried(partial(check_configs, configs, renamed=renamed), None)
    for folder in {*sft.adapters} & {part.folder for part in base.parts}:
        problem(
            CheckpointError(
                f"{sft.label} holds an adapter in {shown(folder)}, where {base.label} has weights; merge it first:"
                " peft's `merge_and_unload()`, then `save_pretrained`"
            ),
            [name for name in base.tensors if folder_of(name) == folder],
        )
    ties = tried(partial(tied_groups, used, same_bytes), None)
    if ties is not None:
        check_names(used, options, ties.groups, problem)
    selects = selector(options, base, sft, problem)
    factors: dict[str, float] = tried(partial(layer_factors_of, options, base.tensors), {})
    unconverted: frozenset[str] = frozenset()
    if options.keep or options.take:
        unconverted = tried(lambda: intact(base, sft, copied_by(options)).names, unconverted)
    if ties is None:
        return Decided([], used, Ties())
    groups = ties.groups
    typed = models.get("start", base) if options.dtype == "start" else base  # sets the output dtypes
    main = cache(partial(main_dtype, typed))

    finders = [(role, each.tensors.get) for role, each in used.items()]
    tensors: list[_Named] = []
    done: set[str] = set(wrong)
    for name in _every_name(base, groups, sft):
        if name in done:
            continue
        group = groups.get(name)
        key = name
        written: tuple[str, ...] = (name,)
        if group is not None:
            key, written = group.key, group.written
            done.update(group.names)
        if group is None:
            sides = {role: side for role, find in finders if (side := find(name))}
        else:
            sides = {role: side for role, each in used.items() if (side := side_of(each, name, group))}
        like = sides.get("base") if typed is base else side_of(typed, name, group)
        if "base" not in sides and not selects("take", written, key):  # from an adapter with another vocabulary
            try:
                sides = _paired_with_embedding(key, sides, base)
            except MergeError as error:
                problem(error, written)
                continue
        action = _action(key, written, sides, selects)
        tensors.append((key, written, action, sides, like.output_dtype if like is not None else main()))
    compared = ((key, sides) for key, _, action, sides, _ in tensors if action in ("merge", "copy"))
    check_alike(compared, used, options, problem)
    items: list[Item] = []
    draw = (options.seed, options.round)  # shared
    for key, written, action, sides, output_dtype in tensors:
        if key in wrong:
            continue
        keep_dtype = not unconverted.isdisjoint(written)
        try:
            item = _item(
                key, written, action, sides, used, selects, factors, output_dtype, options, draw, keep_dtype=keep_dtype
            )
            items.append(item)
        except MergeError as error:
            problem(error, [key])
    return Decided(items, used, ties)


def _every_name(base: Checkpoint, groups: Mapping[str, Group], sft: Checkpoint) -> Iterator[str]:
    """Yield every name once, the base's first. Groups include heads that only the start or an adapter stores."""
    yield from base.tensors
    yield from (name for name in groups if name not in base.tensors)
    if not sft.tensors.keys() <= base.tensors.keys():
        yield from (name for name in sft.tensors if name not in base.tensors and name not in groups)


def _paired_with_embedding(key: str, sides: dict[str, Tensor], base: Checkpoint) -> dict[str, Tensor]:
    """Pair a head that only an adapter stores with the base's embedding; their shapes differ, which is refused."""
    width = next(iter(sides.values())).shape[1:]
    alike = (
        tensor for name, tensor in base.tensors.items() if is_embedding_or_head(name) and tensor.shape[1:] == width
    )
    embedding = next(alike, None)
    if embedding is None:
        raise MismatchError(f"tensor '{shown(key)}' is not in {base.label}; is it the base of this sft?")
    return {"base": embedding, **sides}


@cache
def _arithmetic(alpha: float, drop: float, factor: float) -> Arithmetic:
    """Return the constants of a merge, shared by all tensors with the same numbers."""
    return arithmetic(alpha=alpha, drop=drop, factor=factor)


def _action(key: str, written: Sequence[str], sides: Mapping[str, Tensor], selects: Selects) -> Action:
    """Return what happens to a tensor. `check_alike` makes sure that it can be merged."""
    if selects("keep", written, key) and "base" in sides:
        return "keep"
    if selects("take", written, key) and "sft" in sides:
        return "take"
    return "merge" if sides["base"].dtype in MERGED else "copy"


def _item(
    key: str,
    written: Sequence[str],
    action: Action,
    sides: dict[str, Tensor],
    used: Mapping[str, Checkpoint],
    selects: Selects,
    factors: Mapping[str, float],
    output_dtype: str,
    options: MergeOptions,
    draw: tuple[int, int],
    *,
    keep_dtype: bool = False,
) -> Item:
    if action == "keep":
        sides = {"base": sides["base"]}
    source = sides["sft" if action == "take" else "base"]
    dtype = source.output_dtype
    if dtype in MERGED and not keep_dtype:
        dtype = TORCH_NAMES.get(options.dtype, output_dtype if output_dtype in MERGED else dtype)
    if action == "take" and used["sft"].adapter is not None and not is_stored(source):
        raise ArgumentError(
            f"tensor '{shown(key)}' cannot be taken from {used['sft'].label}, an adapter that stores only its"
            " change; merge the adapter first, or leave out --take"
        )
    factor = factors.get(layer_key(key) or "", 1.0) if factors else 1.0
    drop = 0.0 if selects("no_drop", written, key) else options.drop
    constants = _arithmetic(options.alpha, drop, factor)
    if action == "merge" and options.sparsify != "dare" and constants.uses_mask:
        constants = _arithmetic(options.alpha, 0.0, factor)
        sides = _sparsified(key, sides, options) if "sft" in sides else sides  # an adapter does not change the others
    if "sft" in sides and sides["sft"].is_delta:
        constants = replace(constants, is_delta=True)
    home = _output_file(key, sides.get("base"), source, used)
    outs: tuple[TensorInfo, ...]
    if isinstance(source, TensorInfo) and source.file == home and source.dtype == dtype and written == (source.name,):
        outs = (source,)  # which is often all that the layout asks for
    else:
        nbytes = source.count * DTYPE_BITS[dtype] // 8
        outs = tuple([TensorInfo(name, dtype, source.shape, home, 0, nbytes) for name in written])
    if action == "take":
        sides = {"sft": source}
    item = Item(key, action, sides, outs, constants, draw)
    if action != "merge" or options.vocab == "strict":
        return item
    extended = [side.own.count for side in sides.values() if isinstance(side, Extended)]
    if not extended:
        return item
    # An adapter leaves the rest to the start it was trained on, which may store a head that the base ties.
    owners = ("sft", "start", "base") if options.vocab == "sft" else ("base",)
    return replace(item, common=extended[0], owner=next(role for role in owners if role in sides))


def _output_file(key: str, base_tensor: Tensor | None, source: Tensor, used: Mapping[str, Checkpoint]) -> str:
    """Return the output file of a tensor: that of the base, or the counterpart of the sft's file."""
    base = used["base"]
    if isinstance(base_tensor, TensorInfo) and not base.unread:
        return base_tensor.file
    home = base.file_of.get(base_tensor.name) if base_tensor is not None else None
    if home is not None:
        return home
    folder = folder_of(key)
    there = [part for part in base.parts if part.folder == folder]
    if isinstance(source, TensorInfo) and base_tensor is None:
        part = next((part for part in used["sft"].parts if source.file in part.files), None)
        if part is not None and (part.beside or not there):
            alike = (each.files[0] for each in there if each.stem == part.stem)
            return next(alike, f"{folder}{part.stem}.safetensors")
    there = there or [*base.parts]
    return next((each for each in there if not each.beside), there[0]).files[-1]


def _sparsified(key: str, sides: Mapping[str, Tensor], options: MergeOptions) -> dict[str, Tensor]:
    """Replace the sft by its delta with elements dropped by trim or della."""
    how = parse_sparsify(options.sparsify, options.drop)
    sft, origin = sides["sft"], "start" if "start" in sides else "base"
    exact = any(side.dtype == "F64" for side in sides.values())
    delta = (key, sft.shape, sft, sides[origin], origin, exact, options.drop)
    cure = f"merge it without dropping, {ready_option('--no-drop', key)}, or use --sparsify dare"
    if any(isinstance(side, Extended) for side in sides.values()):
        raise ArgumentError(
            f"tensor '{shown(key)}' has rows that only one of the models has, but {how.kind} needs the whole tensor;"
            f" {cure}"
        )
    if how.kind == "trim":
        return {**sides, "sft": Trimmed(*delta)}
    if how.kind != "della":
        raise ArgumentError(f"--sparsify {how.kind} is not implemented for checkpoints; use dare, trim or della")
    if (sft.shape[-1] if sft.shape else 1) > LONGEST_ROW:
        raise ArgumentError(
            f"tensor '{shown(key)}' has rows of {sft.shape[-1]} elements, but della ranks at most {LONGEST_ROW}; {cure}"
        )
    return {**sides, "sft": Ranked(*delta, how.epsilon, mask_key(key, options.seed, options.round))}
