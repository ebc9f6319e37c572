"""The plan of a merge: from names and headers alone, what happens to every tensor and where every byte goes.

A plan is data. It holds tensors; the segments that workers take are made on demand (`segments`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Extended, Tensor, is_delta, is_stored
from ..checkpoint.parts import SPLIT
from ..checkpoint.safetensors_file import DTYPE_BITS, MERGED, TensorInfo
from ..checkpoint.side_files import OWN, is_side_file
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MergeError, MismatchError
from ..model.config import check_configs, is_other_class, merged_config
from ..model.tensor_names import folder_of, is_end, is_input_embedding, layer_key, ready_option
from ..numerics.mask import Arithmetic, arithmetic, mask_key
from ..numerics.sparsifiers import parse_sparsify
from ..options.layer_factors import factors_of
from ..options.recipe import DTYPES, Parameters
from ..transforms.kept_quantised import intact
from ..transforms.sparsified_delta import LONGEST_ROW, Ranked, Trimmed
from .advice import result_config
from .compatibility import (
    Choose,
    Complain,
    check_alike,
    check_names,
    chosen,
    main_dtype,
    refuse,
    selection,
    side_of,
)
from .shard_layout import OutputFile, lay_out
from .tied_embeddings import SameBytes, Ties, tied_groups

RECORD = 1 << 20  # elements of a segment, and of one record of the statistics
COPIED = 4 << 20  # bytes of a segment that is copied as it is

Action = Literal["merge", "keep", "take", "copy"]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the output: what it is made of, how, and where it goes."""

    name: str  # the name its mask is keyed by
    action: Action
    sides: Mapping[str, Tensor]  # base, start, sft: those that are read
    outs: tuple[TensorInfo, ...]  # one, or each name of a tied tensor
    numbers: Arithmetic
    key: tuple[int, int]
    common: int | None = None  # elements that are merged, if not all; those behind them are those of
    owner: str = "base"  # this side, as they are

    @property
    def source(self) -> Tensor:
        """The tensor whose shape and count the others share; the one that is copied, if any is."""
        return self.sides["sft" if self.action == "take" else "base"]

    @property
    def raw(self) -> bool:
        """Whether bytes are copied as they are."""
        return self.action != "merge" and self.outs[0].dtype == self.source.dtype

    @property
    def segment_count(self) -> int:
        """How many segments it is cut into."""
        return sum(map(len, self._firsts()))

    def _firsts(self) -> tuple[range, range]:
        """Where segments begin: elements (bytes, of a raw one) that are merged, and those behind them that are not."""
        total, step = (self.source.nbytes, COPIED) if self.raw else (self.source.count, RECORD)
        middle = total if self.common is None else self.common
        return range(0, middle, step), range(middle, total, step)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Return the first element (byte, of a raw one) of each segment, and their number."""
        for firsts in self._firsts():
            for first in firsts:
                yield first, min(firsts.step, firsts.stop - first)

    def is_merged(self, first: int) -> bool:
        """Whether the segment that begins there is merged; it is copied or converted otherwise."""
        return self.action == "merge" and (self.common is None or first < self.common)

    def bytes_written(self, count: int) -> int:
        """Bytes that a segment of `count` writes, under all names."""
        width = 1 if self.raw else DTYPE_BITS[self.outs[0].dtype] // 8
        return count * width * len(self.outs)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an item: elements (bytes, of a raw one) first..first+count."""

    index: int
    item: int
    first: int
    count: int


@dataclass(frozen=True)
class Plan:
    """All that a merge does."""

    parameters: Parameters
    inputs: Mapping[str, Checkpoint]
    items: tuple[Item, ...]
    files: tuple[OutputFile, ...]
    indexes: Mapping[str, bytes]  # what says which file holds which tensor, by its path
    configs: Mapping[str, bytes]  # each config.json that is not sft's as it stands, by its path
    config_changes: Mapping[str, Any]
    side: Mapping[str, tuple[str, Path | None]]  # path -> role it comes from, and the file
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Names of all files but the safetensors files."""
        return (*self.side, *self.configs, *self.indexes, *OWN)

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(side.stored for item in self.items for side in item.sides.values())

    @cached_property
    def bytes_to_write(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.size for file in self.files)

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all tensors of the output, a tied one counted once."""
        return sum(item.source.count for item in self.items)


def segments(plan: Plan) -> Iterator[Segment]:
    """Cut a plan into the pieces that workers take, in the order of the output."""
    index = 0
    for number, item in enumerate(plan.items):
        for first, count in item.cuts():
            yield Segment(index, number, first, count)
            index += 1


@dataclass(frozen=True)
class Decided:
    """What happens to every tensor, before it has its place."""

    items: list[Item]
    used: Mapping[str, Checkpoint]
    ties: Ties


def decide(
    inputs: Mapping[str, Checkpoint], parameters: Parameters, same_bytes: SameBytes, complain: Complain = refuse
) -> Decided:
    """Decide what happens to every tensor of a merge of base, sft and maybe start.

    `same_bytes` compares two tensors of one checkpoint; it is asked only where one stores a tied tensor under several
    names. What does not fit is given to `complain`, and nothing decided about it; if that is `refuse`, raises
    MismatchError, CheckpointError or ArgumentError: nothing is skipped in silence.
    """
    used = {r: c for r, c in inputs.items() if r != "start" or parameters.reference == "start"}
    base, sft = inputs["base"], inputs["sft"]
    wrong: set[str] = set()

    def note(error: MergeError, names: Collection[str]) -> None:
        complain(error, names)
        wrong.update(names)

    for folder in ("", *base.part_configs):
        configs = {r: (f"{c.label}{f' ({folder})' if folder else ''}", c.config_of(folder)) for r, c in inputs.items()}
        try:
            check_configs(configs, renamed=[role for role, each in inputs.items() if each.original_names])
        except MergeError as error:
            note(error, ())
    for folder in {*sft.adapters} & {part.folder for part in base.parts}:
        note(
            CheckpointError(
                f"{sft.label} holds an adapter in {shown(folder)}, where {base.label} has weights; merge it first:"
                " peft's `merge_and_unload()`, then `save_pretrained`"
            ),
            [name for name in base.tensors if folder_of(name) == folder],
        )
    ties = tied_groups(used, same_bytes)
    groups = ties.groups
    check_names(used, parameters, groups, note)
    choose = selection(parameters, base, sft)
    p = parameters
    factors = factors_of(base.tensors, p.importance, p.layer_factors, p.shrink, p.clip)
    typed = inputs.get("start", base) if p.dtype == "start" else base  # whose dtypes the output has
    main = main_dtype(typed)
    as_they_are = intact(base, sft, chosen(p)).names if p.keep or p.take else frozenset()

    found: list[tuple[str, list[str], dict[str, Tensor], str]] = []  # key, names to write, each model's, dtype
    done: set[str] = set(wrong)
    # A head that only the start or an adapter holds is in a group.
    for name in dict.fromkeys([*base.tensors, *groups, *sft.tensors]):
        if name in done:
            continue
        group = groups.get(name)
        written = list(group.written) if group else [name]
        key = group.key if group else name
        done.update(group.names if group else [name])
        sides = {role: side for role, each in used.items() if (side := side_of(each, name, group))}
        if "base" not in sides and not choose("take", written, key):  # an adapter's, of another vocabulary
            sides = _with_likeness(key, sides, base)
        like = side_of(typed, name, group)
        found.append((key, written, sides, like.output_dtype if like is not None else main))
    compared = [(k, sides) for k, written, sides, _ in found if _action(k, written, sides, choose) in ("merge", "copy")]
    check_alike(compared, used, parameters, note)
    items: list[Item] = []
    for key, written, sides, native in found:
        if key in wrong:
            continue
        try:
            same = not as_they_are.isdisjoint(written)
            items.append(_item(key, written, sides, used, choose, factors, native, parameters, same_bytes=same))
        except MergeError as error:
            note(error, [key])
    return Decided(items, used, ties)


def _with_likeness(key: str, sides: dict[str, Tensor], base: Checkpoint) -> dict[str, Tensor]:
    """Put the base's embedding beside a head that only an adapter holds: it is compared with that, and refused."""
    width = next(iter(sides.values())).shape[1:]
    alike = (tensor for name, tensor in base.tensors.items() if is_end(name) and tensor.shape[1:] == width)
    found = next(alike, None)
    if found is None:
        raise MismatchError(
            f"tensor '{shown(key)}' is in none of the tensors of {base.label}; is it the base of this sft?"
        )
    return {"base": found, **sides}


def make_plan(inputs: Mapping[str, Checkpoint], parameters: Parameters, decided: Decided) -> Plan:
    """Say where every tensor goes, and what else is written. Raises MismatchError for files in each other's way."""
    items, used, broken = decided.items, decided.used, decided.ties.broken
    base = inputs["base"]
    placed, files, indexes = lay_out([out for item in items for out in item.outs], base, parameters.max_shard_size)
    items = [replace(item, outs=tuple(placed[out.name] for out in item.outs)) for item in items]
    order = {file.name: number for number, file in enumerate(files)}
    items.sort(key=lambda item: (order[item.outs[0].file], item.outs[0].begin, item.name))

    configs: dict[str, bytes] = {}
    changes: dict[str, Any] = {}
    for folder in ("", *base.part_configs):
        config, changed = _config(folder, items, inputs, used, decided.ties, parameters)
        if changed:
            configs[f"{folder}config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            changes |= {folder + place: value for place, value in changed.items()}
    side, notes = _side_files(inputs, configs)
    notes = [*(note for each in inputs.values() for note in each.notes), *notes]
    if broken:
        notes.append(f"note: {broken}: both are merged under their own names, and config.json says untied")
    plan = Plan(
        parameters=parameters,
        inputs=inputs,
        items=tuple(items),
        files=files,
        indexes=indexes,
        configs=configs,
        config_changes=changes,
        side=dict(sorted(side.items())),
        notes=tuple(notes),
    )
    _check_paths(plan)
    return plan


def _config(
    folder: str,
    items: Sequence[Item],
    inputs: Mapping[str, Checkpoint],
    used: Mapping[str, Checkpoint],
    ties: Ties,
    parameters: Parameters,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the config of a part of the result, and what was changed in it."""
    base, sft, p = inputs["base"], inputs["sft"], parameters
    said = result_config(base, sft, parameters, folder)
    if (folder and not (said or {}).get("model_type")) or "_class_name" in (said or {}):
        return None, {}  # what a module of another kind is made of, or a component of diffusers
    own = [item for item in items if folder_of(item.name) == folder]
    floats = Counter[str]()
    for item in own:
        if item.outs[0].dtype in MERGED:
            floats[item.outs[0].dtype] += item.source.count
    names = {code: name for name, code in DTYPES.items()} | {"F64": "float64"}
    return merged_config(
        said if said is sft.config_of(folder) else None,
        base.config_of(folder),
        dtype=names[floats.most_common(1)[0][0]] if floats else None,
        tied=ties.tied.get(folder),
        rows={item.source.shape[0] for item in own if is_input_embedding(item.name) and item.source.shape},
        resized=dict(each.rows for each in used.values() if each.rows),
        quantised=intact(base, sft, chosen(parameters)).settings if not folder and (p.keep or p.take) else None,
    )


def _side_files(
    inputs: Mapping[str, Checkpoint], configs: Collection[str]
) -> tuple[dict[str, tuple[str, Path | None]], list[str]]:
    """Say which other files come from which input: sft's where it has them; and what of them does not."""
    base, sft = inputs["base"], inputs["sft"]
    is_other = bool(sft.original_names) or is_other_class(sft.config, base.config)
    alone = [folder for folder in sft.adapters if folder not in base.adapters]
    side = {path: ("base", base.side[path]) for path in base.side}
    for own, file in sft.side.items():
        path = _place_of(own, sft, base)
        if path is None:
            continue
        of_model = path.rpartition("/")[2] == "config.json" and folder_of(path) in ("", *base.part_configs)
        of_adapter = own.startswith(tuple(alone)) and not is_side_file(own, copy_code=True)
        if not of_adapter and not (of_model and is_other and path in base.side):
            side[path] = ("sft", file)
    notes = [
        f"note: {sft.label} holds an adapter in {shown(folder)}, which is not merged; to merge it, give that folder as"
        " SFT" for folder in alone
    ]  # fmt: skip
    return {path: found for path, found in side.items() if path not in configs}, notes


def _place_of(path: str, sft: Checkpoint, base: Checkpoint) -> str | None:
    """Where a file of the sft goes: with the tensors that lay beside it, where the base has those in another folder."""
    moves = {(folder_of(own), folder_of(new)) for new, own in sft.original_names.items()}
    moved = dict(each for each in moves if each[0] != each[1])
    if not moved:
        return path
    if path in SPLIT:
        return None  # it says where the sft has its parts
    folder = folder_of(path)
    if folder not in moved or (not folder and path in base.side):
        return path
    return moved[folder] + path.removeprefix(folder)


def _check_paths(plan: Plan) -> None:
    """Refuse files of an output of which one would have to be the folder of another."""
    paths = {file.name for file in plan.files} | {*plan.beside}

    def origin(path: str) -> str:
        return plan.inputs[plan.side[path][0]].label if path in plan.side else "the merge"

    for path in plan.beside:
        for folder in map(str, PurePosixPath(path).parents):
            if folder in paths:
                raise MismatchError(
                    f"'{shown(folder)}' is a file of {origin(folder)}, and '{shown(path)}' of {origin(path)} lies in a"
                    " folder of that name; rename or remove one of them"
                )


_arithmetic = cache(arithmetic)  # one for all tensors that are merged alike


def _action(key: str, written: list[str], sides: Mapping[str, Tensor], choose: Choose) -> Action:
    """What happens to a tensor; what is merged has one shape in all models, and one kind of dtype (`check_alike`)."""
    if choose("keep", written, key) and "base" in sides:
        return "keep"
    if choose("take", written, key) and "sft" in sides:
        return "take"
    return "merge" if sides["base"].dtype in MERGED else "copy"


def _item(
    key: str,
    written: list[str],
    sides: dict[str, Tensor],
    used: Mapping[str, Checkpoint],
    choose: Choose,
    factors: Mapping[str, float],
    native: str,
    parameters: Parameters,
    *,
    same_bytes: bool = False,
) -> Item:
    p = parameters
    action = _action(key, written, sides, choose)
    if action == "keep":
        sides = {"base": sides["base"]}
    source = sides["sft" if action == "take" else "base"]
    dtype = source.output_dtype
    if dtype in MERGED and not same_bytes:
        dtype = DTYPES.get(p.dtype, native if native in MERGED else dtype)
    if action == "take" and used["sft"].adapter is not None and not is_stored(source):
        raise ArgumentError(
            f"tensor '{shown(key)}' cannot be taken from {used['sft'].label}, which is an adapter and holds its change"
            " only; merge it first, or leave out --take"
        )
    factor = factors.get(layer_key(key) or "", 1.0)
    numbers = _arithmetic(alpha=p.alpha, drop=0.0 if choose("no_drop", written, key) else p.drop, factor=factor)
    if action == "merge" and p.sparsify != "dare" and numbers.draws:
        numbers = _arithmetic(alpha=p.alpha, drop=0.0, factor=factor)
        sides = _sparsified(key, sides, p) if "sft" in sides else sides  # an adapter leaves the rest as it was
    if is_delta(sides.get("sft")):
        numbers = replace(numbers, added=True)
    home = _home(key, sides.get("base"), source, used)
    outs = tuple(
        TensorInfo(name, dtype, source.shape, home, 0, source.count * DTYPE_BITS[dtype] // 8) for name in written
    )
    if action == "take":
        sides = {"sft": source}
    item = Item(key, action, sides, outs, numbers, mask_key(key, p.seed, p.iteration))
    extended = [side.own.count for side in sides.values() if isinstance(side, Extended)]
    if action != "merge" or not extended:
        return item
    return replace(item, common=extended[0], owner=p.vocab if p.vocab in sides else "base")


def _home(key: str, own: Tensor | None, source: Tensor, used: Mapping[str, Checkpoint]) -> str:
    """The file that a tensor goes to: the base's, or what corresponds to the sft's."""
    base, folder = used["base"], folder_of(key)
    home = base.file_of.get(own.name) if own is not None else None
    if home is not None:
        return home
    there = [part for part in base.parts if part.folder == folder]
    if isinstance(source, TensorInfo) and own is None:
        part = next((part for part in used["sft"].parts if source.file in part.files), None)
        if part is not None and (part.beside or not there):
            alike = (each.files[0] for each in there if each.stem == part.stem)
            return next(alike, f"{folder}{part.stem}.safetensors")
    there = there or [*base.parts]
    return next((each for each in there if not each.beside), there[0]).files[-1]


def _sparsified(key: str, sides: Mapping[str, Tensor], p: Parameters) -> dict[str, Tensor]:
    """Return the sides of a merge with the sft's delta in the place of the sft, its smaller elements dropped."""
    how = parse_sparsify(p.sparsify, p.drop)
    sft, origin = sides["sft"], "start" if "start" in sides else "base"
    start, exact = sides[origin], any(side.dtype == "F64" for side in sides.values())
    cure = f"merge it without dropping, {ready_option('--no-drop', key)}, or use --sparsify dare"
    if any(isinstance(side, Extended) for side in sides.values()):
        raise ArgumentError(
            f"tensor '{shown(key)}' has rows that only one of the models has, and {how.kind} looks at all of a tensor;"
            f" {cure}"
        )
    if how.kind == "trim":
        return {**sides, "sft": Trimmed(key, sft.shape, sft, start, origin, exact, p.drop)}
    if (sft.shape[-1] if sft.shape else 1) > LONGEST_ROW:
        raise ArgumentError(
            f"tensor '{shown(key)}' has rows of {sft.shape[-1]} elements, and della ranks at most {LONGEST_ROW}; {cure}"
        )
    return {
        **sides,
        "sft": Ranked(
            key, sft.shape, sft, start, origin, exact, p.drop, how.epsilon, mask_key(key, p.seed, p.iteration)
        ),
    }
