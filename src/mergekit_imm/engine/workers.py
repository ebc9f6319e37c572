"""Execute plans on threads: each worker takes a segment, reads, merges and writes it. Order does not affect the bytes.

Memory is workers x buffer, whatever the model: a worker reads a piece of a segment into its own buffer, merges it with
the GIL released, and passes the bytes to a sink. Plans with the same inputs (a sweep) run together: a piece is read
once and merged for each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..checkpoint.lazy_tensor import Computed, Raw, Tensor
from ..checkpoint.reader import Files
from ..checkpoint.safetensors_file import TensorInfo
from ..common.pages import PAGE, place, room_for_cache
from ..common.threads import in_threads
from ..numerics.devices import Device
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import BLOCK, Arithmetic, arithmetic
from ..numerics.statistics import KEPT, RECORD, Record, is_finite, new_tally, to_record
from ..plan.advice import Advice
from ..plan.plan import Item, Plan, Segment
from ..transforms.sparsified_delta import Sparsified, count_kept
from .bad_values import check_equal, check_taken, check_values

BUFFERS = 64 << 20  # of all workers together
MARGIN = 16 * PAGE  # three inputs and an output begin and end within pages
BUFFER = (8 << 20) + MARGIN  # of one: a segment of three 16-bit inputs and its output fits
LEAST = (64 << 10) + MARGIN  # of one, however many there are: a block of any dtypes fits

Sink = Callable[[int, TensorInfo, int, memoryview], None]  # index of the plan, tensor, first byte in it, bytes
Task = tuple[Segment, Sequence[int]]  # a segment, and the indices of the plans that lack it
# Told of each merged piece of the first plan: item, segment, first element, count, base and result as read and written.
Also = Callable[[Item, Segment, int, int, tuple[Raw, str], tuple[Raw, str]], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A finished segment: the sink has its bytes."""

    segment: Segment
    records: Mapping[int, Record]  # index of the plan -> statistics
    bytes_read: int
    bytes_written: int  # per plan


def warm_up(plans: Sequence[Plan], device: Device) -> None:
    """Merge a block of zeros for each kind of tensor, to compile and load what it needs."""
    seen = set()
    items = [(item, item.is_merged(0)) for plan in plans for item in plan.items if not item.raw]
    items += [(item, False) for item, merged in items if merged and item.common is not None]
    for item, merged in items:
        roles, constants = (tuple(item.sides), item.constants) if merged else (("base",), CONVERT)
        read = item.sides if merged else _converted(item)
        dtypes = (*(side.dtype for side in read.values()), item.outs[0].dtype)
        kind = (roles, dtypes, constants.is_identity, constants.is_delta, constants.alpha in (0, 1))
        if kind not in seen:
            seen.add(kind)
            *inputs, out = ((np.zeros(BLOCK * DTYPE_BITS[dtype] // 8, np.uint8), dtype) for dtype in dtypes)
            raws = dict(zip(roles, inputs, strict=True))
            base, start, sft = base_start_sft(raws)
            device.merge(base, start, sft, out, BLOCK, 0, item.mask_key, constants, new_tally())


def run_segments(
    plans: Sequence[Plan],
    todo: Iterable[Task],
    sink: Sink,
    *,
    workers: int,
    device: Device,
    stop: threading.Event | None = None,
    also: Also | None = None,
) -> Generator[Done | None, None, None]:
    """Process segments of plans on threads; yield each as it finishes, and None after 0.1 s without one.

    The plans share inputs and file layout and differ in parameters. Fails and stops as `in_threads` does.
    """
    # What fits into memory goes through the cache: the next merge of these models finds it there.
    large = 2 * plans[0].bytes_to_read > room_for_cache()
    with Files(plans[0].models, past_cache=large) as files:

        def worker() -> Callable[[Task], Done]:
            buffer = device.buffer(min(BUFFER, max(LEAST, BUFFERS // workers)))
            return lambda task: _process(plans, task, buffer, files, sink, device, also)

        yield from in_threads(todo, worker, workers, stop)


def _process(
    plans: Sequence[Plan], task: Task, buffer: Raw, files: Files, sink: Sink, device: Device, also: Also | None
) -> Done:
    segment, wanted = task
    item = plans[0].items[segment.item]
    if item.raw:
        _copy(plans[0], item, task, buffer, files, sink)
        records = {number: np.zeros(RECORD) for number in wanted}
    else:
        records = _merge(plans, task, buffer, files, sink, device, also)
    read = sum(_bytes_read(side, segment, raw=item.raw) for side in item.sides.values())
    return Done(segment, records, read, item.bytes_written(segment.count))


def _bytes_read(side: Tensor, segment: Segment, *, raw: bool) -> int:
    """Bytes of one side that a segment reads; a computed tensor counts once, at its first segment."""
    if isinstance(side, Computed):
        return 0 if segment.first else side.stored
    return segment.count if raw else segment.count * DTYPE_BITS[side.dtype] // 8


def _merge(
    plans: Sequence[Plan], task: Task, buffer: Raw, files: Files, sink: Sink, device: Device, also: Also | None
) -> dict[int, Record]:
    segment, wanted = task
    item = plans[0].items[segment.item]
    converted = not item.is_merged(segment.first)
    read = _converted(item) if converted else item.sides
    roles = {"base": next(iter(read))} if converted else {role: role for role in read}
    sides = {role: read[origin] for role, origin in roles.items()}
    out_dtype, out_begin = item.outs[0].dtype, item.outs[0].begin
    widths = {role: DTYPE_BITS[side.dtype] // 8 for role, side in sides.items()}
    out_width = DTYPE_BITS[out_dtype] // 8
    step = max(1, (len(buffer) - MARGIN) // (sum(widths.values()) + out_width) // BLOCK) * BLOCK
    tallies = {number: new_tally() for number in wanted}
    for first in range(segment.first, segment.first + segment.count, step):
        count = min(step, segment.first + segment.count - first)
        raws: dict[str, tuple[Raw, str]] = {}
        at = 0
        for role, side in sides.items():
            size = count * widths[role]
            at = files.read_placed(roles[role], side, first * widths[role], size, buffer, at)
            raws[role] = (buffer[at : at + size], side.dtype)
            at = (at + size) // PAGE * PAGE + 2 * PAGE  # what follows may have been read too
        at = place(buffer, at, out_begin + first * out_width)
        out = (buffer[at : at + count * out_width], out_dtype)
        base, start, sft = base_start_sft(raws)
        for number, tally in tallies.items():
            each = plans[number].items[segment.item]
            constants = CONVERT if converted else each.constants
            device.merge(base, start, sft, out, count, first, each.mask_key, constants, tally)
            if isinstance(sides.get("sft"), Sparsified):
                # The sparsifier already dropped elements; correct the kernel's kept count.
                tally[KEPT] += count_kept(*raws["sft"]) - count
            if not is_finite(tally):
                p = plans[number].options
                merge = f" (alpha {p.alpha}, drop {p.drop}, seed {p.seed})" if len(plans) > 1 else ""
                check_values(plans[number], each, {roles[r]: raw for r, raw in raws.items()}, out, first, files, merge)
            for target in each.outs:
                sink(number, target, first * out_width, memoryview(out[0]))  # type: ignore[arg-type]
            if also is not None and number == 0 and not converted:
                also(each, segment, first, count, base, out)
    return {number: to_record(tally) for number, tally in tallies.items()}


CONVERT: Arithmetic = arithmetic(alpha=1.0, drop=0.0)  # the base, in the output's dtype


def _converted(item: Item) -> Mapping[str, Tensor]:
    """The side to convert: of a kept or taken item its own; of a merged one the rows that only one model has."""
    return {item.owner: item.sides[item.owner]} if item.action == "merge" else item.sides


def base_start_sft(raws: Mapping[str, T]) -> tuple[T, T, T]:
    """Fill in missing models: no start means the base; no sft, as of an adapter, means the start."""
    base = raws["base"]
    start = raws.get("start", base)
    return base, start, raws.get("sft", start)


def _copy(plan: Plan, item: Item, task: Task, buffer: Raw, files: Files, sink: Sink) -> None:
    segment, wanted = task
    step = (len(buffer) - MARGIN) // 2
    for first in range(segment.first, segment.first + segment.count, step):
        count = min(step, segment.first + segment.count - first)
        (role, source), *others = item.sides.items()
        found = files.read_placed(role, source, first, count, buffer, 0)
        at = place(buffer, 0, item.outs[0].begin + first)
        content = buffer[at : at + count]
        if found != at:
            content[:] = buffer[found : found + count]
        for other, side in others:
            found = files.read_placed(other, side, first, count, buffer, step + 4 * PAGE)
            mirror = buffer[found : found + count]
            check_equal(item, first, (role, content), (other, mirror), Advice(plan.models, plan.options))
        if plan.options.as_adapter:
            check_taken(plan, item, content, files)
        for number in wanted:
            for target in item.outs:
                sink(number, target, first, memoryview(content))  # type: ignore[arg-type]
