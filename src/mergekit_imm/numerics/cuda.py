"""The streamed merge on a GPU: copy each segment there and back, and merge it with the same bits as on the CPU.

Each worker thread has its own CUDA stream and waits for that alone, so one worker's copies overlap another's merge.
Copies are asynchronous only to and from pinned memory, which `buffer` allocates.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from . import triton_kernel
from .mask import BLOCK, Arithmetic
from .reference import DTYPES, merge_flat, uniform16
from .statistics import KEPT, LANES, LARGEST, Tally

if TYPE_CHECKING:
    from .cpu import Bytes, Side

_of_thread = threading.local()


def merge_span_on(device: str) -> Callable[..., None]:
    """Return `cpu.merge_span` for a torch device. Raises ArgumentError if the device does not exist."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"device is {device!r}, which torch {torch.__version__} cannot use here"
            f" ({str(error).splitlines()[0]}); use --device cpu, which is as fast as the disk"
        ) from error
    return functools.partial(merge_span, torch.device(device))


def buffer(nbytes: int) -> Bytes:
    """Return host memory for a worker's segments, pinned if there is a GPU.

    >>> buffer(4096).shape
    (4096,)
    """
    pinned = torch.cuda.is_available()
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()  # the array keeps the tensor alive


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
    constants: Arithmetic,
    tally: Tally,
) -> None:
    """Merge elements first..first+count of one tensor, with the bits and the tally of `cpu.merge_span`."""
    if count == 0:
        return
    with _stream(device):
        pieces: dict[int, Tensor] = {}
        for raw, dtype in (base, start, sft):
            if id(raw) not in pieces:
                # Copy bytes: they may be unaligned on the host, but are aligned on the device.
                pieces[id(raw)] = torch.from_numpy(raw).to(device, non_blocking=True).view(DTYPES[dtype])
        b, s, f = (pieces[id(raw)] for raw, _ in (base, start, sft))
        merged = torch.empty(count, dtype=DTYPES[out[1]], device=device)
        if triton_kernel.fits(b, s, f, merged) and not constants.is_delta:
            triton_kernel.merge_flat_fused(b, s, f, merged, constants, *key, first)
        else:
            merged = merge_flat(b, s, f, merged.dtype, constants, *key, first)
        torch.from_numpy(out[0]).copy_(merged.view(torch.uint8), non_blocking=True)

        wide = torch.float64 if torch.float64 in (b.dtype, s.dtype, f.dtype) else torch.float32
        change = merged.to(wide) - b.to(wide)
        delta = f.to(wide) if constants.is_delta else f.to(wide) - s.to(wide)
        sums = torch.cat([_block_sums(x) for x in (delta, b.to(wide), change)], dim=1)
        largest = (change * change).nan_to_num(nan=0.0, posinf=torch.inf).max().double()
        kept = torch.full_like(largest, count)
        if constants.uses_mask:
            kept = _kept(b, first, key, constants.keep16).sum().double()
        # Wait for this stream alone; the copy of the output, queued before, is then done too.
        lanes, (most, number) = sums.cpu().numpy(), torch.stack((largest, kept)).tolist()

    tally[:LARGEST] = np.add.accumulate(np.vstack((tally[None, :LARGEST], lanes)), axis=0)[-1]
    tally[LARGEST] = max(tally[LARGEST], np.sqrt(np.float64(most) if wide == torch.float64 else np.float32(most)))
    tally[KEPT] += number


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """This thread's stream, as a context."""
    if device.type != "cuda":
        return nullcontext()
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(streams[device])


def _kept(like: Tensor, first: int, key: tuple[int, int], keep16: int) -> Tensor:
    """Which elements from `first` on are kept, a bool for each element of `like`."""
    out = torch.empty(len(like), dtype=torch.bool, device=like.device)
    if not triton_kernel.fits(out):
        return uniform16(like, first, len(like), *key) < keep16
    triton_kernel.keep_flat_fused(out, keep16, *key, first)
    return out


def _block_sums(values: Tensor) -> Tensor:
    """Lanes of each block of 1024, shape (blocks, 16), added in the order of `statistics` to give the same bits."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, 2, BLOCK // 4, 2)
    squares = padded * padded
    pairs = squares[..., 0] + squares[..., 1]
    lanes = pairs[:, 0] + pairs[:, 1]
    while lanes.shape[1] > LANES:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes
