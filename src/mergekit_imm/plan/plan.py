"""The plan of a merge, as data: what happens to every tensor, and where every byte goes.

It holds tensors; the segments that workers take are made on demand (`segments`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.safetensors_file import DTYPE_BITS, TensorInfo
from ..checkpoint.side_files import OWN
from ..numerics.mask import Arithmetic
from ..options.options import MergeOptions
from .shard_layout import OutputFile

SEGMENT_ELEMENTS = 1 << 20  # elements of a segment, and of one record of the statistics
SEGMENT_BYTES = 4 << 20  # bytes of a segment that is copied as it is

Action = Literal["merge", "keep", "take", "copy"]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the output: what it is made of, how, and where it goes."""

    name: str  # the name its mask is keyed by
    action: Action
    sides: Mapping[str, Tensor]  # base, start, sft: those that are read
    outs: tuple[TensorInfo, ...]  # one, or each name of a tied tensor
    constants: Arithmetic
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
        total, step = (self.source.nbytes, SEGMENT_BYTES) if self.raw else (self.source.count, SEGMENT_ELEMENTS)
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
class Inputs:
    """The models of a merge as they are merged, under the base's names, and the options of each merge of them."""

    models: Mapping[str, Checkpoint]  # base, sft, and start where it is not the base
    options: tuple[MergeOptions, ...]  # files read, round known; several in a sweep


@dataclass(frozen=True)
class Plan:
    """All that a merge does."""

    options: MergeOptions
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


def same_place(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two inputs are one."""
    if one.folder is None or other.folder is None:
        return (one.repo, one.commit) == (other.repo, other.commit) and one.repo is not None
    return one.folder.samefile(other.folder) and list(one.files) == list(other.files)
