"""The plan of a merge, as data: what happens to every tensor, and where every byte goes.

A plan lists tensors. `segments` cuts them into pieces for the workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.model_files import OWN
from ..checkpoint.safetensors_file import TensorInfo
from ..common.notes import Note
from ..model.config import is_other_class
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import Arithmetic, mask_key
from ..options.options import MergeOptions
from .shard_layout import OutputFile

SEGMENT_ELEMENTS = 1 << 20  # elements of a segment; statistics have one record for each
SEGMENT_BYTES = 4 << 20  # bytes of a segment that is copied unchanged

Action = Literal["merge", "keep", "take", "copy"]


@dataclass(slots=True)  # changed only by its layout; not frozen, as TensorInfo
class Item:
    """One tensor of the output: its inputs, what happens to them, and where the result goes."""

    name: str  # keys the mask
    action: Action
    sides: Mapping[str, Tensor]  # by role (base, start, sft): the tensors to read
    outs: tuple[TensorInfo, ...]  # one, or one for each name of a tied tensor
    constants: Arithmetic
    draw: tuple[int, int]  # seed and round of the mask
    common: int | None = None  # merge this many elements only
    owner: str = "base"  # role that supplies the rest, unchanged

    @property
    def source(self) -> Tensor:
        """The tensor that sets the shape; for a copied item, the tensor copied."""
        return self.sides["sft" if self.action == "take" else "base"]

    @property
    def mask_key(self) -> tuple[int, int]:
        """The Philox key of its mask."""
        return mask_key(self.name, *self.draw)

    @property
    def raw(self) -> bool:
        """Whether bytes are copied unchanged."""
        return self.action != "merge" and self.outs[0].dtype == self.source.dtype

    @property
    def segment_count(self) -> int:
        """Number of segments."""
        return sum(map(len, self._firsts()))

    def _firsts(self) -> tuple[range, range]:
        """Return the first element (byte, if raw) of each merged segment, then of each that `owner` supplies."""
        total, step = (self.source.nbytes, SEGMENT_BYTES) if self.raw else (self.source.count, SEGMENT_ELEMENTS)
        middle = total if self.common is None else self.common
        return range(0, middle, step), range(middle, total, step)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Yield the first element (byte, if raw) of each segment, and their number."""
        for firsts in self._firsts():
            for first in firsts:
                yield first, min(firsts.step, firsts.stop - first)

    def is_merged(self, first: int) -> bool:
        """Whether the segment that begins at `first` is merged, rather than copied or converted."""
        return self.action == "merge" and (self.common is None or first < self.common)

    def bytes_written(self, count: int) -> int:
        """Return how many bytes a segment of `count` writes, under all names."""
        width = 1 if self.raw else DTYPE_BITS[self.outs[0].dtype] // 8
        return count * width * len(self.outs)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an item: elements (bytes, if raw) first..first+count."""

    index: int
    item: int
    first: int
    count: int


@dataclass(frozen=True)
class Inputs:
    """The opened models, under the base's names, and the options of each merge."""

    models: Mapping[str, Checkpoint]  # by role: base, sft, and start unless it is the base
    options: tuple[MergeOptions, ...]  # files read, round known; several in a sweep


@dataclass(frozen=True)
class Plan:
    """Everything that a merge reads and writes."""

    options: MergeOptions
    models: Mapping[str, Checkpoint]
    items: tuple[Item, ...]
    files: tuple[OutputFile, ...]
    indexes: Mapping[str, bytes]  # index files by path
    configs: Mapping[str, bytes]  # changed config.json files by path
    config_changes: Mapping[str, Any]
    side: Mapping[str, tuple[str, Path | None]]  # path -> role and file to copy
    notes: tuple[Note, ...] = field(default=())

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Paths of all files except safetensors files."""
        return (*self.side, *self.configs, *self.indexes, *OWN)

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes of all tensors to read."""
        return sum(side.stored for item in self.items for side in item.sides.values())

    @cached_property
    def bytes_to_write(self) -> int:
        """Bytes of all safetensors files to write."""
        return sum(file.size for file in self.files)

    @cached_property
    def segment_count(self) -> int:
        """Number of segments of all items."""
        return sum(item.segment_count for item in self.items)

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all output tensors; a tied tensor counts once."""
        return sum(item.source.count for item in self.items)


def segments(plan: Plan) -> Iterator[Segment]:
    """Yield the segments of a plan, in output order."""
    index = 0
    for number, item in enumerate(plan.items):
        for first, count in item.cuts():
            yield Segment(index, number, first, count)
            index += 1


def same_place(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two inputs are the same model."""
    if one.folder is None or other.folder is None:
        return (one.repo, one.commit) == (other.repo, other.commit) and one.repo is not None
    return one.folder.samefile(other.folder) and list(one.files) == list(other.files)


def result_config(base: Checkpoint, sft: Checkpoint, options: MergeOptions, folder: str = "") -> dict[str, Any] | None:
    """Return the config of the result, or of the part in `folder`: the sft's, or the base's.

    It is the base's if names were mapped, the class differs, or the base's vocabulary is used: the sft's may not fit.
    """
    is_other = bool(sft.original_names) or is_other_class(sft.config, base.config)
    chosen = None if is_other or options.vocab == "base" else sft.config_of(folder)
    return base.config_of(folder) if chosen is None else chosen
