"""The sums of an audit, against the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mergekit_imm.analysis.audit_sums import Sums, measure
from mergekit_imm.analysis.audit_tensors import state_of


def naive(b: np.ndarray, d: np.ndarray, m: np.ndarray, p: float, q: float, dtype: torch.dtype) -> dict[str, float]:
    """The sums that have a formula, element by element in float64; rounded once, to whole steps, half to even."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.array([round(float(v) / _step(abs(float(v)), dtype)) * _step(abs(float(v)), dtype) for v in x])

    b, d, m = (x.astype(np.float64) for x in (b, d, m))
    claim, move = p * b + q * d, m - p * b
    clear = np.abs(d) >= 2 * np.array([_step(x, dtype) for x in np.maximum(np.abs(b), np.abs(claim))])
    return {
        "count": len(m),
        "as_base": int((m == rounded(b)).sum()),
        "visible": int((rounded(claim) != rounded(b)).sum()),
        "bb": float(b @ b),
        "dd": float(d @ d),
        "md": float(move @ d),
        "mm": float(move @ move),
        "rest": float((m - claim) @ (m - claim)),
        "cd": float((rounded(claim) - p * b) @ d),
        "clear": int(clear.sum()),
        "clear_md": float(move[clear] @ d[clear]),
        "moved_dd": float((d[m != rounded(b)] ** 2).sum()),
    }


def _step(size: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(max(2.0 ** math.floor(math.log2(size)) * info.eps if size else 0.0, info.smallest_normal * info.eps))


@example(kind=(torch.bfloat16, "BF16"), size=1.0, change=1e-06, weights=(0.9, 0.125), seed=0)  # torch rounds twice
@given(
    kind=st.sampled_from([(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]),
    size=st.floats(1e-6, 1),
    change=st.floats(1e-6, 1),
    weights=st.tuples(st.sampled_from([1.0, 0.9]), st.floats(0.1, 2)),
    seed=st.integers(0, 1000),
)
def test_sums_are_those_of_the_formulas(
    kind: tuple[torch.dtype, str], size: float, change: float, weights: tuple[float, float], seed: int
) -> None:
    dtype, code = kind
    draw = np.random.default_rng(seed)
    p, q = weights
    b = torch.from_numpy(draw.normal(size=300) * size).to(dtype).float().numpy()
    d = (draw.normal(size=300) * change * size).astype(np.float32)
    m = torch.from_numpy(p * b + q * d).to(dtype).float().numpy()
    found = measure(b, d, m, p, q, code)
    for name, value in naive(b, d, m, p, q, dtype).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-30), name
    assert found.beyond == 0
    halves = measure(b[:100], d[:100], m[:100], p, q, code) + measure(b[100:], d[100:], m[100:], p, q, code)
    for name in ("count", "as_base", "visible", "dd", "md", "rest", "worst"):
        assert getattr(halves, name) == pytest.approx(getattr(found, name), rel=1e-9, abs=1e-30), name
    assert Sums() + found == found


@pytest.mark.parametrize("seed", range(20))
def test_rounding_of_a_float32_product_is_no_other_factor(seed: int) -> None:
    """Its squares are 1e-15 of the change's, which sums in float64 lose if they are subtracted from each other."""
    draw = np.random.default_rng(seed)
    b = (draw.normal(size=4096) * 0.02).astype(np.float32)
    d = draw.normal(size=4096).astype(np.float32) * np.float32(30)
    error = draw.normal(size=4096) * 30 * 2.0**-25
    error[:1], d[:1] = 30 * 2.0**-20, 1e-3  # an element near zero that was summed from large ones
    m = (b + (d + error)).astype(np.float32)
    found = measure(b, d, m, 1, 1, "F32")
    assert found.beyond
    assert state_of(found, 1, 1) == "as claimed"
    assert state_of(measure(b, d, (b + 0.996 * d).astype(np.float32), 1, 1, "F32"), 1, 1) == "scaled"
