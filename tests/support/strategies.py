"""What hypothesis draws: tensors as raw bit patterns, parameters, layouts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDER = (*DTYPES, torch.float64)

alphas = st.sampled_from([0.0, 1.0, 0.5, 0.3, 0.7, 1e-9, 1 - 1e-9, 0.499999999]) | st.floats(0, 1)
drops = st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999999]) | st.floats(0, 1, exclude_max=True)
factors = st.sampled_from([1.0, 0.0, 0.5, 1.5]) | st.floats(0, 8)
seeds = st.integers(-(2**70), 2**70)

# Where rounding and decoding go wrong: zeros, subnormals, the largest, halves between neighbours, ones.
_EDGES = {
    torch.bfloat16: [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F, 0xFF7F, 0x3F80, 0x3F81, 0xBF80],
    torch.float16: [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x3C01, 0xBC00],
    torch.float32: [
        0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x3F808000,
        0x3F818000, 0x3F801000, 0x3F803000, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000, 0x7F7F8000, 0x38800000,
    ],
    torch.float64: [
        0, 1 << 63, 1, 0x7FEFFFFFFFFFFFFF, 0x3FF0000000000000,
        0x3FF0100000000001, 0x3FF0100000000000, 0x3FF00FFFFFFFFFFF,  # about half a step of bfloat16
        0x3FF0020000000001, 0x3FF0020000000000, 0x3FF001FFFFFFFFFF,  # of float16
        0x3FF0000010000001, 0x3FF0000010000000, 0x3FF000000FFFFFFF,  # of float32
    ],
}  # fmt: skip
_SPECIALS = {
    torch.bfloat16: [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
    torch.float16: [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    torch.float32: [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    torch.float64: [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001],
}
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor(count: int, dtype: torch.dtype, *, seed: int, kind: str, specials: bool) -> Tensor:
    """A 1-D tensor: "gauss" weights, "bits" any pattern at all, "edges" the patterns above."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "gauss":
        return (torch.randn(count, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    size = 8 * dtype.itemsize
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    bits = raw.view(_INTEGER[dtype.itemsize]).clone()
    if kind == "edges":
        patterns = _EDGES[dtype] + (_SPECIALS[dtype] if specials else [])
        table = torch.tensor([p - (1 << size) if p >> (size - 1) else p for p in patterns], dtype=bits.dtype)
        bits = table[torch.randint(0, len(table), (count,), generator=generator)]
    if not specials:  # an exponent of all ones becomes one of none
        exponent = _EXPONENT[dtype]
        bits = torch.where((bits & exponent) == exponent, bits & ~exponent, bits)
    return bits.view(dtype)


kinds = st.sampled_from(["gauss", "bits", "edges"])
