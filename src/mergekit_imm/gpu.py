"""The streamed merge on a GPU: the functions of `flat`, so the same bits, on pieces that are copied there and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import ArgumentError
from .flat import merge_flat, uniform16
from .mask import BLOCK, KEEP_ALL, LANES, Arithmetic

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

Side = tuple[npt.NDArray[np.uint8], str]


def merge_span_on(device: str) -> Callable[..., None]:
    """Return a `merge_span` (see `kernel`) that runs on a torch device. Raises ArgumentError if it is not there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"device is {device!r}, but torch {torch.__version__} finds no such device here"
            f" ({str(error).splitlines()[0]}); use --device cpu, which is as fast as the disk"
        ) from error
    return functools.partial(merge_span, torch.device(device))


@torch.no_grad()
def merge_span(
    device: torch.device,
    base: Side,
    start: Side,
    sft: Side,
    out: Side,
    count: int,
    first: int,
    key: tuple[int, int],
    numbers: Arithmetic,
    record: npt.NDArray[np.float64],
) -> None:
    """Merge elements first..first+count of one tensor, as `kernel.merge_span` does, bits and record alike."""
    pieces: dict[int, Tensor] = {}
    for raw, dtype in (base, start, sft):
        if id(raw) not in pieces:
            pieces[id(raw)] = torch.from_numpy(raw).view(_DTYPES[dtype]).to(device)
    b, s, f = (pieces[id(raw)] for raw, _ in (base, start, sft))
    merged = merge_flat(b, s, f, _DTYPES[out[1]], numbers, *key, first)
    torch.from_numpy(out[0]).view(_DTYPES[out[1]]).copy_(merged)

    wide = torch.float64 if torch.float64 in (b.dtype, s.dtype, f.dtype) else torch.float32
    change = (merged.to(wide) - b.to(wide)).double()
    sums = [_block_sums(x) for x in ((f.to(wide) - s.to(wide)).double(), b.double(), change)]
    for field, blocks in enumerate(sums):
        for total in blocks.tolist():
            record[field] += total
    largest = float(change.abs().max())
    if largest > record[3] or math.isnan(largest):
        record[3] = largest
    kept = count
    if numbers.keep16 < KEEP_ALL:
        kept = int((uniform16(b, first, count, *key) < numbers.keep16).sum())
    record[4] += kept


def _block_sums(values: Tensor) -> Tensor:
    """Sums of squares of each block of 1024, in the order of `kernel._sum_squares`: element-wise additions alone."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
    planes = (padded * padded).view(-1, BLOCK // LANES, LANES)
    lanes = planes[:, 0]
    for plane in range(1, BLOCK // LANES):
        lanes = lanes + planes[:, plane]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
