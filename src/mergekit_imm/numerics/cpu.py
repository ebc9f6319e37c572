"""The merge formula on raw bytes, on a CPU: a streaming worker runs it on each segment it has read.

The arithmetic is in `numba_kernel`; this module turns bytes into the arrays it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .mask import BLOCK, Arithmetic
from .native import Loop
from .statistics import Tally, is_finite

# Dtype in a safetensors header -> code for `merge_decoded_blocks`, and array dtype for `merge_blocks`.
CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
_ARRAY_TYPES = {"BF16": np.uint32, "F16": np.int32, "F32": np.float32, "F64": np.float64}

# A block's scratch memory, `work`: the words of even counters, word by word, then of odd ones; then sums of delta, base
# and change. Gaps of sixteen keep stores from colliding with later loads.
PAIRS = BLOCK // 4  # pairs of elements in half a block
ROW = PAIRS + 16
SUMS = 2 * PAIRS + 16
WORK = SUMS + 3 * ROW

merge_blocks = Loop("mergekit_imm.numerics.numba_kernel", "merge_blocks")
merge_decoded_blocks = Loop("mergekit_imm.numerics.numba_kernel", "merge_decoded_blocks")

_NONE = np.empty(0, np.uint8)  # no start: it is the base

Bytes = npt.NDArray[np.uint8]
Side = tuple[Bytes, str]  # raw elements, and their dtype in a safetensors header


def merge_span(
    base: Side,
    start: Side,
    sft: Side,
    out: Side,
    count: int,
    first: int | npt.NDArray[np.int64],
    key: tuple[int, int],
    constants: Arithmetic,
    tally: Tally,
) -> None:
    """Merge elements first..first+count of one tensor into `out`, and add their statistics to `tally`.

    `first` is a multiple of 1024, and each buffer begins with element `first`. Or `first` has the first element of each
    block of 1024, any blocks of the tensor, and the buffers hold these, one after the other. Pass the base's buffer as
    `start` if start is the base. With `constants.is_delta`, `sft` holds the delta. Same bits as `reference.merge_flat`.
    """
    start_is_base = start[0] is base[0]
    whole = count - count % BLOCK
    for begin, some in ((0, whole), (whole, count - whole)):
        if some:
            b, f, merged = (_blocks(raw, begin, some, count) for raw in (base[0], sft[0], out[0]))
            s = b if start_is_base else _blocks(start[0], begin, some, count)
            sides = ((b, base[1]), (s, start[1]), (f, sft[1]), (merged, out[1]))
            _merge_blocks(*sides, some, first + begin, key, constants, tally)
            width = len(out[0]) // count
            if merged.base is None:  # a copy, not a view of `out`
                out[0][begin * width : (begin + some) * width] = merged[: some * width]


def _blocks(raw: Bytes, begin: int, some: int, count: int) -> Bytes:
    """Elements begin..begin+some of a buffer, in whole blocks: a view, or an aligned copy padded with zeros."""
    width = len(raw) // count
    piece = raw[begin * width : (begin + some) * width]
    if some % BLOCK == 0 and piece.view(np.uint64).flags.aligned:
        return piece
    blocks = np.zeros(-(-some // BLOCK) * BLOCK * width, np.uint8)
    blocks[: len(piece)] = piece
    return blocks


_MASKS = {dtype: (np.zeros(1, dtype)[0], ~np.zeros(1, dtype)[0]) for dtype in (np.uint32, np.uint64)}


def _merge_blocks(
    base: Side,
    start: Side,
    sft: Side,
    out: Side,
    count: int,
    first: int | npt.NDArray[np.int64],
    key: tuple[int, int],
    constants: Arithmetic,
    tally: Tally,
) -> None:
    exact = "F64" in (base[1], start[1], sft[1])
    wide, masks = (np.float64, _MASKS[np.uint64]) if exact else (np.float32, _MASKS[np.uint32])
    scale = constants.scale if exact else constants.scale32
    alpha = constants.alpha if exact else constants.alpha32
    weight = constants.weight if exact else constants.weight32
    # merged = anchor + step * (tuned - base), where anchor is base or tuned; x + -0.0 == x for every x
    from_base = weight == 0 or (weight < 0.5 and constants.alpha != 0)
    at_end = weight == 0 or constants.alpha == 0
    delta_mark = (masks[True],) if constants.is_delta else ()  # one more constant: `sft` holds the delta
    usual = (wide(scale), wide(weight if from_base else -alpha), masks[from_base])
    fast: tuple[Any, ...] = (*usual, *delta_mark)
    careful: tuple[Any, ...] = (*usual, wide(-0.0), masks[constants.is_identity], masks[at_end], *delta_mark)
    limit = np.uint32(constants.keep16 * 65536 - 1)  # an element is kept if its 16 bits, as a high half, are <= this
    # Compile only common mixtures of dtypes, each of which takes seconds once; decode the others into tiles.
    alike, start_is_base = base[1] == start[1] == sft[1], start[0] is base[0]
    is_common = alike or (start_is_base and base[1] == out[1] and {base[1], sft[1]} == {"BF16", "F32"})
    before = tally.copy()
    is_rare = at_end or (constants.is_identity and not constants.is_delta)  # the fast path adds a delta times 1
    for how in (fast, careful) if is_finite(before) and not is_rare else (careful,):
        work = np.zeros(WORK, wide)
        rest = (
            count,
            first // BLOCK,
            constants.uses_mask,
            np.uint32(key[0]),
            np.uint32(key[1]),
            limit,
            how,
            tally,
        )
        if is_common:
            merge_blocks(_typed(base), _NONE if start_is_base else _typed(start), _typed(sft), _typed(out), work, *rest)
        else:
            sides = [part for raw, dtype in (base, start, sft) for part in (raw, CODES[dtype])]
            merge_decoded_blocks(*sides, start_is_base, _typed(out), work, np.empty((3, BLOCK), wide), *rest)
        if how is careful or is_finite(tally):
            break
        tally[:] = before  # the fast path does not make NaN canonical: start over with the careful one


def _typed(side: Side) -> npt.NDArray[Any]:
    return side[0].view(_ARRAY_TYPES[side[1]])


def finite_elements(raw: Bytes, dtype: str) -> npt.NDArray[np.bool_]:
    """Return which elements of a buffer are finite, as a bool array."""
    bits, exponent = {
        "BF16": (np.uint16, 0x7F80),
        "F16": (np.uint16, 0x7C00),
        "F32": (np.uint32, 0x7F800000),
        "F64": (np.uint64, 0x7FF0000000000000),
    }[dtype]
    return np.asarray((raw.view(bits) & bits(exponent)) != bits(exponent))
