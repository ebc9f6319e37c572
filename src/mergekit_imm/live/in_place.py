"""Merge tensors in place, one span of elements at a time: read, compute and, if asked, write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Raw, Tensor
from ..checkpoint.reader import Files, check_inputs
from ..common.messages import shown
from ..common.progress import Progress
from ..common.threads import in_threads
from ..engine.bad_values import check_equal, find_bad_values, or_other
from ..engine.workers import CONVERT, base_start_sft
from ..errors import MismatchError, NonFiniteError
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import BLOCK
from ..numerics.native import Loop
from ..numerics.reference import DTYPES
from ..numerics.statistics import is_finite, new_tally
from ..options.options import MergeOptions
from ..plan.advice import Advice
from ..plan.plan import Item
from .local_shards import Held, Indices, boxes, held

STEP = 2 << 20  # bytes at a time, each of what is read, base, start, model and result
GAP = 64 << 10  # bytes; a smaller gap is read as well: that takes less time than another read

copy_runs = Loop("mergekit_imm.live.numba_scatter", "copy_runs")


@dataclass(frozen=True)
class TensorUpdate:
    """A planned item, and the model's tensor that receives the result, in its own dtype."""

    item: Item
    target: Tensor
    frozen: str = ""  # role of the input that the target must equal until it is written; "": it was trained itself

    @property
    def raw(self) -> bool:
        """Whether bytes are copied or compared without conversion."""
        base = self.item.sides["base"]
        return self.item.action == "copy" or (self.item.action == "keep" and base.dtype == self.target.dtype)


_Range = tuple[TensorUpdate, int, int]  # elements of a tensor: first, end


@dataclass(frozen=True, eq=False)
class _Span:
    """Elements of a tensor that this process holds, in the blocks of 1024 that they lie in; these are computed."""

    update: TensorUpdate
    held: tuple[Held, ...]  # at least one
    blocks: Indices  # their numbers in the whole tensor; ascending

    @property
    def count(self) -> int:
        """The number of elements to compute."""
        return len(self.blocks) * BLOCK

    @property
    def here(self) -> int:
        """How many of them this process holds."""
        return sum(each.count for each in self.held)

    @property
    def first(self) -> int | Indices:
        """The first element to compute if all follow each other, else of each block."""
        low, high = int(self.blocks[0]), int(self.blocks[-1])
        return low * BLOCK if high - low + 1 == len(self.blocks) else self.blocks * BLOCK

    @property
    def is_one_run(self) -> bool:
        """Whether the elements follow each other."""
        return len(self.held) == 1 and len(self.held[0].firsts) == 1

    def places(self, firsts: Indices) -> Indices:
        """Return where elements are in the blocks."""
        slots: Indices = np.searchsorted(self.blocks, firsts // BLOCK) * BLOCK + firsts % BLOCK
        return slots

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which elements of the blocks this process holds."""
        edges = np.zeros(self.count + 1, np.int64)
        for each in self.held:
            places = self.places(each.firsts)
            np.add.at(edges, places, 1)
            np.add.at(edges, places + each.counts, -1)
        return edges[:-1].cumsum() > 0

    def element(self, place: int) -> int:
        """Return the index of an element in the whole tensor."""
        return int(self.blocks[place // BLOCK]) * BLOCK + place % BLOCK


def _ranges(updates: Sequence[TensorUpdate]) -> Iterator[_Range]:
    for update in updates:
        dtypes = (update.target.dtype, *(side.dtype for side in update.item.sides.values()))
        step = STEP * 8 // max(DTYPE_BITS[dtype] for dtype in dtypes)
        for first in range(0, update.target.count, step):
            yield update, first, min(first + step, update.target.count)


def _span(update: TensorUpdate, first: int, end: int) -> _Span | None:
    """Return what this process holds of elements first..end; None if that is nothing."""
    found = tuple(held(update.target, first, end))
    if not found:
        return None
    low = first // BLOCK
    edges = np.zeros((end - 1) // BLOCK - low + 2, np.int64)
    for each in found:
        np.add.at(edges, each.firsts // BLOCK - low, 1)
        np.add.at(edges, (each.firsts + each.counts - 1) // BLOCK - low + 1, -1)
    return _Span(update, found, np.flatnonzero(edges.cumsum()) + low)


_Process = Callable[[_Span, Raw, Files], int]  # of a span, with a worker's buffers; returns the bytes it read


def _worker(process: _Process, files: Files) -> Callable[[_Range], int]:
    buffers = np.empty((5, STEP + 16 * BLOCK), np.uint8)

    def of_range(task: _Range) -> int:
        span = _span(*task)
        return 0 if span is None else process(span, buffers, files)

    return of_range


class InPlaceMerge:
    """The work of this process, run twice: first to check every value, then to write."""

    def __init__(
        self,
        inputs: Mapping[str, Checkpoint],
        options: MergeOptions,
        updates: Sequence[TensorUpdate],
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.inputs, self.options, self.updates, self.workers = inputs, options, updates, workers
        self.progress, self.done = progress, 0
        self.advice = Advice(inputs, options)
        self.total = 0
        if progress is not None:
            self.total = 2 * sum(
                _bytes(span) for span in itertools.starmap(_span, _ranges(updates)) if span is not None
            )

    def run(self, *, write: bool) -> None:
        """Compute everything; write it if `write`. Raises NonFiniteError, MismatchError, CheckpointError."""
        self._each(partial(self._process, write=write))

    def check_frozen(self) -> None:
        """Compare what is in memory with the input it must equal. Raises MismatchError, CheckpointError."""
        self._each(self._compare_frozen)

    def _each(self, process: _Process) -> None:
        with Files(self.inputs) as files:
            self._in_threads(_ranges(self.updates), self.workers, files, process)
        check_inputs(self.inputs)

    def merge(self, update: TensorUpdate, files: Files) -> None:
        """Compute and write one tensor. Raises as `run`; a part of it may be written then."""
        ranges, process = list(_ranges([update])), partial(self._process, write=True)
        if len(ranges) == 1:  # a thread would take longer to start
            _worker(process, files)(ranges[0])
        else:
            self._in_threads(ranges, min(self.workers, len(ranges)), files, process)

    def _in_threads(self, ranges: Iterable[_Range], workers: int, files: Files, process: _Process) -> None:
        with closing(in_threads(ranges, lambda: _worker(process, files), workers)) as results:
            for nbytes in results:
                self.done += nbytes or 0
                if self.progress is not None:
                    self.progress(self.done, self.total)

    def _compare_frozen(self, span: _Span, buffers: Raw, files: Files) -> int:
        from ..numerics.cpu import merge_span

        update = span.update
        if not update.frozen:
            return 0
        side, dtype = update.item.sides[update.frozen], update.target.dtype
        width = DTYPE_BITS[dtype] // 8
        origin = self._read(update.frozen, side, span, buffers, files), side.dtype
        expected: tuple[Raw, str] = (buffers[1][: span.count * width], dtype)
        merge_span(origin, origin, origin, expected, span.count, span.first, update.item.mask_key, CONVERT, new_tally())
        there = self._read("sft", update.target, span, buffers[2:], files)
        differing = (expected[0].view(f"u{width}") != there.view(f"u{width}")) & span.mask
        if differing.any():
            element, sft = span.element(int(differing.argmax())), self.inputs["sft"]
            model, cure = "the model with the adapter", "`start` the model that the adapter is trained on"
            if sft.adapter is None:
                model, cure = sft.label, "`start` the model that training starts from"
            raise MismatchError(
                f"tensor '{shown(update.item.name)}' of {model} is not that of {self.inputs[update.frozen].label},"
                f" first at element {element}; give as {cure}, or load that one"
            )
        return 0

    def _process(self, span: _Span, buffers: Raw, files: Files, *, write: bool) -> int:
        item = span.update.item
        if span.update.raw:
            out = self._read("base", item.sides["base"], span, buffers, files)
            if item.action == "copy":
                self._check_equal(span, out, buffers[1:], files)
                return _bytes(span)
        else:
            out = self._merge(span, buffers, files)
        if write:
            _put(span, out, buffers[-1])
        return _bytes(span)

    def _read(self, role: str, side: Tensor, span: _Span, buffers: Raw, files: Files) -> Raw:
        """Read a span (from the model, if it lies there) into the first buffer.

        Of an sft, what other processes hold is zero; so are the ends of a single run. The last buffer is for what is
        read at once and then copied.
        """
        width = DTYPE_BITS[side.dtype] // 8
        raw: Raw = buffers[0][: span.count * width]
        scratch = buffers[-1]
        lives = role == "sft" and (side is span.update.target or self.inputs["sft"].adapter is None)
        if span.is_one_run:
            (run,) = span.held
            begin = int(span.places(run.firsts)[0]) * width
            end = begin + run.count * width
            raw[:begin], raw[end:] = 0, 0
            if lives:
                _copy(run, raw[begin:end], side.dtype)
            else:
                files.read(role, side, int(run.firsts[0]) * width, raw[begin:end])
        elif lives:
            raw[:] = 0
            for each in span.held:
                source = _in_memory(each, side.dtype)
                if source is None:
                    source = scratch[: each.count * width]
                    _copy(each, source, side.dtype)
                copy_runs(source, _offsets(each.counts), raw, span.places(each.firsts), each.counts, width)
        else:
            self._read_blocks(role, side, span, raw, scratch, files)
        return raw

    def _read_blocks(self, role: str, side: Tensor, span: _Span, raw: Raw, scratch: Raw, files: Files) -> None:
        """Read the blocks of a span from a file, with the blocks between them if these are few."""
        width = DTYPE_BITS[side.dtype] // 8
        size = BLOCK * width
        cuts = np.flatnonzero((np.diff(span.blocks) - 1) * size > GAP) + 1
        for one, other in itertools.pairwise((0, *cuts.tolist(), len(span.blocks))):
            firsts, target = span.blocks[one:other] * BLOCK, raw[one * size : other * size]
            first, end = int(firsts[0]), min(int(firsts[-1]) + BLOCK, side.count)
            is_whole = end - first <= len(firsts) * BLOCK  # no block between
            source = (target if is_whole else scratch)[: (end - first) * width]
            files.read(role, side, first * width, source)
            counts = np.minimum(BLOCK, end - firsts)
            if not is_whole:
                copy_runs(source, firsts - first, target, np.arange(len(firsts)) * BLOCK, counts, width)
            target[len(target) - size + int(counts[-1]) * width :] = 0  # beyond the end of the tensor

    def _merge(self, span: _Span, buffers: Raw, files: Files) -> Raw:
        from ..numerics.cpu import merge_span

        item, target = span.update.item, span.update.target
        sides = item.sides if item.action == "merge" else {"base": item.sides["base"]}
        raws = {
            role: (self._read(role, side, span, buffers[number:], files), side.dtype)
            for number, (role, side) in enumerate(sides.items())
        }
        base, start, sft = base_start_sft(raws)
        out: tuple[Raw, str] = (buffers[3][: span.count * DTYPE_BITS[target.dtype] // 8], target.dtype)
        constants = item.constants if item.action == "merge" else CONVERT
        tally = new_tally()
        rest = (out, span.count, span.first, item.mask_key, constants)
        merge_span(base, start, sft, *rest, tally)
        if not is_finite(tally) and not span.is_one_run:
            # Elements of other processes, merged with zeros, may be too large: once more without them.
            _clear(span, *raws.values())
            tally = new_tally()
            merge_span(base, start, sft, *rest, tally)
        if not is_finite(tally):
            self._check_values(span, raws, out)
        return out[0]

    def _check_values(self, span: _Span, raws: Mapping[str, tuple[Raw, str]], out: tuple[Raw, str]) -> None:
        item = span.update.item
        found = find_bad_values(item, raws, out, allow_nonfinite=self.options.allow_nonfinite)
        if found is None:
            return
        element = span.element(found.first)
        if found.role is not None:
            raise NonFiniteError(
                f"tensor '{shown(item.name)}' of {self.inputs[found.role].label} is NaN or infinite at index {element}"
                f" ({found.count} such elements near it); use a model without them, or accept them with"
                f" allow_nonfinite{or_other(item, found.role, self.advice, sft='model')}"
            )
        raise NonFiniteError(
            f"tensor '{shown(item.name)}': the merged value of element {element} is too large for the model's"
            f" dtype {out[1]}; use a model of a wider dtype"
        )

    def _check_equal(self, span: _Span, base: Raw, buffers: Raw, files: Files) -> None:
        item = span.update.item
        for role, side in item.sides.items():
            if role == "base":
                continue
            other = self._read(role, side, span, buffers, files)
            if not span.is_one_run:
                _clear(span, (base, side.dtype), (other, side.dtype))
            differing = np.flatnonzero(base != other)
            if len(differing):  # name the element in the whole tensor
                width, place = DTYPE_BITS[side.dtype] // 8, int(differing[0])
                first = span.element(place // width) * width + place % width - place
                check_equal(item, first, ("base", base), (role, other), self.advice)


def _clear(span: _Span, *raws: tuple[Raw, str]) -> None:
    """Set what other processes hold to zero."""
    absent = ~span.mask
    for raw, dtype in raws:
        raw.view(f"u{DTYPE_BITS[dtype] // 8}")[absent] = 0


def _bytes(span: _Span) -> int:
    return span.here * DTYPE_BITS[span.update.target.dtype] // 8


def _offsets(counts: Indices) -> Indices:
    offsets: Indices = np.cumsum(counts) - counts
    return offsets


def _in_memory(each: Held, dtype: str) -> Raw | None:
    """Return the bytes of held elements where they lie in memory in a row, in this dtype; None if they do not."""
    tensor = each.tensor
    if not tensor.is_contiguous() or tensor.device.type != "cpu" or tensor.dtype != DTYPES[dtype]:
        return None
    flat: Raw = tensor.view(-1)[each.inside : each.inside + each.count].view(torch.uint8).numpy()
    return flat


def _copy(each: Held, raw: Raw, dtype: str, *, back: bool = False) -> None:
    """Copy held elements into a buffer of their bytes in a dtype; `back`: out of it."""
    there = _in_memory(each, dtype)
    if there is not None:  # torch would start threads of its own
        one, other = (there, raw) if back else (raw, there)
        one[:] = other
        return
    elements = torch.from_numpy(raw).view(DTYPES[dtype])
    for at, view in boxes(each.tensor, each.inside, each.inside + each.count):
        piece = elements[at : at + view.numel()].view(view.shape)
        view.copy_(piece) if back else piece.copy_(view)


def _put(span: _Span, out: Raw, scratch: Raw) -> None:
    dtype = span.update.target.dtype
    width = DTYPE_BITS[dtype] // 8
    for each in span.held:
        places = span.places(each.firsts)
        if span.is_one_run:
            begin = int(places[0]) * width
            _copy(each, out[begin : begin + each.count * width], dtype, back=True)
            continue
        target = _in_memory(each, dtype)
        if target is not None:
            copy_runs(out, places, target, _offsets(each.counts), each.counts, width)
        else:
            staged = scratch[: each.count * width]
            copy_runs(out, places, staged, _offsets(each.counts), each.counts, width)
            _copy(each, staged, dtype, back=True)
