"""The plan of a merge: from names and headers alone, what happens to every tensor and where every byte goes.

A plan is data. It holds tensors; the segments that workers take are made on demand (`segments`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .agreement import Choose, Complain, check_alike, check_names, main_dtype, refuse, selection, side_of
from .checkpoint.computed import Extended, Tensor, is_delta, is_stored
from .checkpoint.sidefiles import OWN
from .checkpoint.source import Checkpoint
from .checkpoint.sparsified import LONGEST_ROW, Ranked, Trimmed
from .checkpoint.tensorfile import DTYPE_BITS, INDEX, MERGED, TensorInfo
from .config import check_configs, is_other_class, merged_config
from .errors import ArgumentError, MergeError, MismatchError, shown
from .factors import factors_of
from .layers import is_input_embedding, layer_key, ready_option
from .layout import OutputFile, lay_out
from .mask import Arithmetic, arithmetic, mask_key
from .recipe import DTYPES, Parameters
from .sparsify import parse_sparsify
from .ties import Group, SameBytes, tied_groups

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
    index: bytes | None  # of model.safetensors.index.json
    config: bytes | None  # of config.json, where it is not sft's as it stands
    config_changes: Mapping[str, Any]
    side: Mapping[str, tuple[str, Path | None]]  # path -> role it comes from, and the file
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Names of all files but the safetensors files."""
        made = (("config.json", self.config), (INDEX, self.index))
        return (*self.side, *(name for name, content in made if content is not None), *OWN)

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
    groups: Mapping[str, Group]  # names that mean one tensor
    broken: str  # what breaks the base's tie
    tied: bool | None  # what a config must say


def decide(
    inputs: Mapping[str, Checkpoint], parameters: Parameters, same_bytes: SameBytes, complain: Complain = refuse
) -> Decided:
    """Decide what happens to every tensor of a merge of base, sft and maybe start.

    `same_bytes` compares two tensors of one checkpoint; it is asked only where one stores a tied tensor under several
    names. What does not fit is given to `complain`, and nothing decided about it; if that is `refuse`, raises
    MismatchError, CheckpointError or ArgumentError: nothing is skipped in silence.
    """
    configs = {role: (each.label, each.config) for role, each in inputs.items()}
    used = {r: c for r, c in inputs.items() if r != "start" or parameters.reference == "start"}
    base, sft = inputs["base"], inputs["sft"]
    wrong: set[str] = set()

    def note(error: MergeError, names: Collection[str]) -> None:
        complain(error, names)
        wrong.update(names)

    try:
        check_configs(configs, renamed=[role for role, each in inputs.items() if each.was])
    except MergeError as error:
        note(error, ())
    groups, broken, tied = tied_groups(used, same_bytes)
    check_names(used, parameters, groups, note)
    choose = selection(parameters, base, sft)
    p = parameters
    factors = factors_of(base.tensors, p.importance, p.layer_factors, p.shrink, p.clip)
    main = main_dtype(base)

    items: list[Item] = []
    done: set[str] = set(wrong)
    for name in [*base.tensors, *(name for name in sft.tensors if name not in base.tensors)]:
        if name in done:
            continue
        group = groups.get(name)
        written = list(group.written) if group else [name]
        key = group.key if group else name
        done.update(group.names if group else [name])
        sides = {role: found for role, each in used.items() if (found := side_of(each, name, group))}
        try:
            items.append(_item(key, written, sides, used, choose, factors, main, parameters))
        except MergeError as error:
            note(error, [name])
    return Decided(items, used, groups, broken, tied)


def make_plan(inputs: Mapping[str, Checkpoint], parameters: Parameters, decided: Decided) -> Plan:
    """Say where every tensor goes, and what else is written. Raises MismatchError for files in each other's way."""
    items, used, broken = decided.items, decided.used, decided.broken
    base, sft = inputs["base"], inputs["sft"]
    placed, files, index = lay_out([out for item in items for out in item.outs], base, parameters.max_shard_size)
    items = [replace(item, outs=tuple(placed[out.name] for out in item.outs)) for item in items]
    order = {file.name: number for number, file in enumerate(files)}
    items.sort(key=lambda item: (order[item.outs[0].file], item.outs[0].begin, item.name))

    written_rows = {i.source.shape[0] for i in items if is_input_embedding(i.name) and i.source.shape}
    floats = Counter[str]()
    for item in items:
        if item.outs[0].dtype in MERGED:
            floats[item.outs[0].dtype] += item.source.count
    names = {code: name for name, code in DTYPES.items()} | {"F64": "float64"}
    dtype = names[floats.most_common(1)[0][0]] if floats else None
    # Of a model with other names or of another class, or with another vocabulary than the result, it need not fit.
    is_other = bool(sft.was) or is_other_class(sft.config, base.config)
    config, changes = merged_config(
        None if is_other or parameters.vocab == "base" else sft.config,
        base.config,
        dtype=dtype,
        tied=decided.tied,
        rows=written_rows,
        resized=dict(each.rows for each in used.values() if each.rows),
    )
    side = {
        path: (role, each.side[path])
        for role, each in (("base", base), ("sft", sft))
        for path in each.side
        if path != "config.json" or not (changes or (role == "sft" and is_other and "config.json" in base.side))
    }
    notes = [note for each in inputs.values() for note in each.notes]
    if broken:
        notes.append(f"note: {broken}: both are merged under their own names, and config.json says untied")
    plan = Plan(
        parameters=parameters,
        inputs=inputs,
        items=tuple(items),
        files=files,
        index=index,
        config=(json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if changes else None,
        config_changes=changes,
        side=dict(sorted(side.items())),
        notes=tuple(notes),
    )
    _check_paths(plan)
    return plan


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


def _item(
    key: str,
    written: list[str],
    sides: dict[str, Tensor],
    used: Mapping[str, Checkpoint],
    choose: Choose,
    factors: Mapping[str, float],
    main: str,
    parameters: Parameters,
) -> Item:
    p = parameters
    action: Action = "merge"
    if choose("keep", written, key) and "base" in sides:
        action, sides = "keep", {"base": sides["base"]}
    elif choose("take", written, key) and "sft" in sides:
        action = "take"
    else:
        kind = check_alike(key, sides, used)
        action = "merge" if kind == "float" else "copy"
    source = sides["sft" if action == "take" else "base"]
    dtype = source.native
    if dtype in MERGED:
        native = sides["base"].native if "base" in sides else main
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
    # Placed there by the layout: beside the base's tensor, or at the end.
    home = used["base"].home(sides["base"].name if "base" in sides else "")
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
