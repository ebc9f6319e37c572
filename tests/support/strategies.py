"""Hypothesis strategies: tensors as raw bit patterns, parameters, layouts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from mergekit_imm.testing.conformance import elements
from reference import CODES, to_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDER = (*DTYPES, torch.float64)

alphas = st.sampled_from([0.0, 1.0, 0.5, 0.3, 0.7, 1e-9, 1 - 1e-9, 0.499999999]) | st.floats(0, 1)
drops = st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999999]) | st.floats(0, 1, exclude_max=True)
factors = st.sampled_from([1.0, 0.0, 0.5, 1.5]) | st.floats(0, 8)
seeds = st.integers(-(2**70), 2**70)


def tensor(count: int, dtype: torch.dtype, *, seed: int, kind: str, specials: bool) -> Tensor:
    """Draw a 1-D tensor: "gauss" weights, "bits" any bit pattern, "edges" hard cases of rounding and decoding."""
    drawn = elements(count, CODES[dtype], seed=seed % 2**32, kind=kind, finite=not specials)
    return to_tensor(drawn, dtype, (count,)) if count else torch.empty(0, dtype=dtype)  # numpy would give strides of 0


kinds = st.sampled_from(["gauss", "bits", "edges"])
