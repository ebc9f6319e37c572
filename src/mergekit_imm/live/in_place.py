"""Merge tensors in place, one span of elements at a time: read, compute and, if asked, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Raw, Tensor
from ..checkpoint.reader import Files, check_inputs
from ..common.messages import shown
from ..common.threads import in_threads
from ..engine.bad_values import check_equal, find_bad_values, or_other
from ..engine.workers import CONVERT, base_start_sft
from ..errors import NonFiniteError
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import BLOCK
from ..numerics.statistics import is_finite, new_tally
from ..options.options import MergeOptions, Progress
from ..plan.advice import Advice
from ..plan.plan import Item
from .local_shards import Run, lines, origins

STEP = 1 << 18  # elements per span: at most 2 MiB each of base, start, model and result
GAP = 4 * BLOCK  # elements; a larger gap splits a span


@dataclass(frozen=True)
class TensorUpdate:
    """A planned item, and the model's tensor that receives the result, in its own dtype."""

    item: Item
    target: Tensor

    @property
    def raw(self) -> bool:
        """Whether bytes are copied or compared without conversion."""
        base = self.item.sides["base"]
        return self.item.action == "copy" or (self.item.action == "keep" and base.dtype == self.target.dtype)


@dataclass(frozen=True)
class _Span:
    """Elements of a tensor that this process holds, consecutive but for small gaps."""

    update: TensorUpdate
    runs: tuple[Run, ...]

    @property
    def low(self) -> int:
        """The first element to compute."""
        return self.runs[0].first // BLOCK * BLOCK

    @property
    def count(self) -> int:
        """The number of elements to compute."""
        return self.runs[-1].first + self.runs[-1].count - self.low

    @property
    def here(self) -> int:
        """How many of them this process holds."""
        return sum(run.count for run in self.runs)


def _spans(updates: Sequence[TensorUpdate]) -> Iterator[_Span]:
    for update in updates:
        for first in range(0, update.target.count, STEP):
            span: list[Run] = []
            found = origins(update.target, first, min(first + STEP, update.target.count))
            for run in sorted(found, key=lambda run: run.first):
                if span and run.first - span[-1].first - span[-1].count > GAP:
                    yield _Span(update, tuple(span))
                    span = []
                span.append(run)
            if span:
                yield _Span(update, tuple(span))


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
        self.total = 2 * sum(_bytes(span) for span in _spans(updates)) if progress is not None else 0

    def run(self, *, write: bool) -> None:
        """Compute everything; write it if `write`. Raises NonFiniteError, MismatchError, CheckpointError."""
        with Files(self.inputs) as files:

            def worker() -> Callable[[_Span], int]:
                buffers = np.empty((4, STEP + BLOCK, 8), np.uint8).reshape(4, -1)
                return lambda span: self._process(span, buffers, files, write)

            with closing(in_threads(_spans(self.updates), worker, self.workers)) as results:
                for nbytes in results:
                    self.done += nbytes or 0
                    if self.progress is not None:
                        self.progress(self.done, self.total)
        check_inputs(self.inputs)

    def _process(self, span: _Span, buffers: Raw, files: Files, write: bool) -> int:
        item = span.update.item
        if span.update.raw:
            out = self._read("base", item.sides["base"], span, buffers[0], files)
            if item.action == "copy":
                self._check_equal(span, out, buffers[1], files)
                return _bytes(span)
        else:
            out = self._merge(span, buffers, files)
        if write:
            _put(span, out)
        return _bytes(span)

    def _read(self, role: str, side: Tensor, span: _Span, buffer: Raw, files: Files) -> Raw:
        """Read the elements of a span (the sft's from the model) into a buffer; zeros where this process holds none."""
        width = DTYPE_BITS[side.dtype] // 8
        raw = buffer[: span.count * width]
        if span.here < span.count:
            raw[:] = 0
        for run in span.runs:
            begin = (run.first - span.low) * width
            part = raw[begin : begin + run.count * width]
            if role != "sft":
                files.read(role, side, run.first * width, part)
                continue
            for at, elements in lines(run):
                _elements(part, at, elements).copy_(elements)
        return raw

    def _merge(self, span: _Span, buffers: Raw, files: Files) -> Raw:
        from ..numerics.cpu import merge_span

        item, target = span.update.item, span.update.target
        sides = item.sides if item.action == "merge" else {"base": item.sides["base"]}
        raws = {
            role: (self._read(role, side, span, buffer, files), side.dtype)
            for (role, side), buffer in zip(sides.items(), buffers, strict=False)
        }
        base, start, sft = base_start_sft(raws)
        out: tuple[Raw, str] = (buffers[3][: span.count * DTYPE_BITS[target.dtype] // 8], target.dtype)
        constants = item.constants if item.action == "merge" else CONVERT
        tally = new_tally()
        merge_span(base, start, sft, out, span.count, span.low, item.mask_key, constants, tally)
        if not is_finite(tally):
            self._check_values(span, raws, out)
        return out[0]

    def _check_values(self, span: _Span, raws: Mapping[str, tuple[Raw, str]], out: tuple[Raw, str]) -> None:
        item = span.update.item
        found = find_bad_values(item, raws, out, allow_nonfinite=self.options.allow_nonfinite)
        if found is None:
            return
        element = span.low + found.first
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

    def _check_equal(self, span: _Span, base: Raw, buffer: Raw, files: Files) -> None:
        item = span.update.item
        for role, side in item.sides.items():
            if role != "base":
                other = self._read(role, side, span, buffer, files)
                first = span.low * DTYPE_BITS[side.dtype] // 8
                check_equal(item, first, ("base", base), (role, other), self.advice)


def _bytes(span: _Span) -> int:
    return span.here * DTYPE_BITS[span.update.target.dtype] // 8


def _elements(raw: Raw, at: int, like: torch.Tensor) -> torch.Tensor:
    """View the elements of a buffer from `at` on as a tensor of the length and dtype of `like`."""
    width = like.element_size()
    return torch.from_numpy(raw[at * width : (at + len(like)) * width]).view(like.dtype)


def _put(span: _Span, out: Raw) -> None:
    width = DTYPE_BITS[span.update.target.dtype] // 8
    for run in span.runs:
        begin = (run.first - span.low) * width
        for at, elements in lines(run):
            elements.copy_(_elements(out[begin : begin + run.count * width], at, elements))
