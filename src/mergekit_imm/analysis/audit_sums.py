"""The numbers by which an audit judges a tensor: sums over base, claimed delta and merged, in one pass.

With base b, delta d and merged m, the claim is c = p b + q d. Added up are products of b, d, m - b and m - c, and
counts of elements: equal to the base's, beyond rounding, not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics.dtypes import DTYPE_BITS

Values = npt.NDArray[Any]  # float32, or float64 where a tensor is float64

MANTISSA = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}  # explicit bits
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}  # the smallest step
STEPS = 2.0  # tools round up to three times: the product, each summand, the sum
PRECISE, ROUGH = 2, 2.0**-5  # of the delta: four of its own steps in the dtype; or computed in bfloat16
CLEAR = 2.0  # steps that a delta must have to show in every element
SAMPLED = 4096  # elements of a float32 span of which is asked whether they fit into 16 bits


@dataclass(frozen=True)
class Sums:
    """Sums and counts over elements of one tensor, or of several."""

    count: int = 0
    not_finite: int = 0  # in m alone
    as_base: int = 0  # m is b, rounded to its dtype
    visible: int = 0  # c and b differ once rounded to the dtype of m
    beyond: int = 0  # |m - c| beyond what rounding in the dtype of m explains
    far: int = 0  # beyond what computing the delta in bfloat16 explains
    worst: float = 0.0  # largest |m - c|, in steps of the dtype of m
    steps: float = 0.0  # sum of squared steps of the dtype of m
    bb: float = 0.0
    bd: float = 0.0
    dd: float = 0.0
    mb: float = 0.0  # (m - b) b
    md: float = 0.0  # (m - b) d
    mm: float = 0.0  # (m - b)^2
    rest: float = 0.0  # (m - c)^2
    cd: float = 0.0  # (c - b) d, c rounded: what md would be for the right merge
    clear: int = 0  # elements whose delta is several steps: rounding hides nothing of it
    clear_dd: float = 0.0
    clear_md: float = 0.0
    moved_dd: float = 0.0  # d^2 where m is not b
    narrow16: int = 0  # of sampled elements, those of c that float16 cannot hold
    narrowed16: int = 0  # of those, the ones of m that float16 holds
    narrow_b16: int = 0  # the same of bfloat16
    narrowed_b16: int = 0

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over both."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return Sums(**{name: max(pair) if name == "worst" else sum(pair) for name, pair in pairs.items()})

    @property
    def coefficient(self) -> float | None:
        """Least squares of m - b = k d; where there are enough, over the elements that rounding cannot hide."""
        if self.clear >= 64 and self.clear_dd:
            return self.clear_md / self.clear_dd
        return self.md / self.dd if self.dd else None

    @property
    def explained(self) -> float | None:
        """The share of |m - b|^2 that k d explains."""
        k = self.coefficient
        if k is None or not self.mm:
            return None
        return max(0.0, 1 - (self.mm - 2 * k * self.md + k * k * self.dd) / self.mm)

    def left_by(self, k: float) -> float:
        """Return |m - b - k d|^2."""
        return max(0.0, self.mm - 2 * k * self.md + k * k * self.dd)

    @property
    def noise(self) -> float:
        """The most that rounding leaves of |m - c|^2: nine sixteenths of a squared step an element."""
        return 0.5625 * self.steps

    def error(self, left: float) -> float:
        """Return the standard error of a coefficient that leaves so much unexplained."""
        return math.sqrt(max(left, self.steps / 12) / self.count / self.dd) if self.dd and self.count else math.inf


def step_of(size: Values, dtype: str) -> Values:
    """Return the distance to the next number of a dtype, of numbers of these sizes."""
    if size.dtype == np.float64:
        power = np.ldexp(1.0, np.frexp(size)[1] - 1)
    else:
        power = (size.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    kind = size.dtype.type
    step: Values = np.maximum(power * kind(2.0 ** -MANTISSA[dtype]), kind(max(LEAST[dtype], 1e-45)))
    return step


def rounded(values: Values, dtype: str) -> Values:
    """Return values rounded once, to nearest even, to a dtype, and decoded again."""
    if dtype == "F64" or (dtype == "F32" and values.dtype == np.float32):
        return values
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).astype(values.dtype)
    narrow = values.astype(np.float32)
    if dtype == "F32":
        return narrow.astype(values.dtype)
    bits = narrow.view(np.uint32)
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(values.dtype)


def measure(b: Values, d: Values | None, m: Values, p: float, q: float, dtype: str) -> Sums:
    """Return the sums over a span. Without `d` the tensor is claimed to be the base's; `dtype` is that of m."""
    with np.errstate(all="ignore"):
        return _measure(b, d, m, p, q, dtype)


def _measure(b: Values, d: Values | None, m: Values, p: float, q: float, dtype: str) -> Sums:
    kind = b.dtype.type
    claim = b if p == 1 else b * kind(p)
    if d is not None:
        claim = claim + d * kind(q)
    finite = np.isfinite(claim)
    not_finite = int(np.count_nonzero(finite & ~np.isfinite(m)))
    if not_finite or not finite.all():
        finite &= np.isfinite(m)
        b, m, claim = (np.where(finite, each, kind(0)) for each in (b, m, claim))
        d = None if d is None else np.where(finite, d, kind(0))
    base_there, there = rounded(b, dtype), rounded(claim, dtype)
    step = step_of(np.maximum(np.abs(b), np.abs(claim)), dtype)
    rest = m - claim
    size = np.abs(rest)
    as_base = m == base_there
    found: dict[str, Any] = {
        "count": len(m),
        "not_finite": not_finite,
        "as_base": int(np.count_nonzero(as_base)),
        "visible": int(np.count_nonzero(there != base_there)),
        "worst": min(1e30, float((size / step).max(initial=0))),
        "steps": _dot(step, step),
        "rest": _dot(rest, rest),
    }
    move = m - b
    found["mm"] = _dot(move, move)
    if d is None:
        beyond = size > kind(STEPS) * step
        found["beyond"] = found["far"] = int(np.count_nonzero(beyond))
    else:
        delta = np.abs(d) * kind(abs(q))
        floor = np.maximum(delta, kind(math.sqrt(_dot(delta, delta) / max(1, len(delta)))))
        allowed = kind(STEPS) * step
        found["beyond"] = int(np.count_nonzero(size > allowed + floor * kind(PRECISE * 2.0 ** -MANTISSA[dtype])))
        found["far"] = int(np.count_nonzero(size > allowed + floor * kind(ROUGH)))
        wide = d.astype(np.float64)
        wide_b, wide_move = b.astype(np.float64), move.astype(np.float64)
        clear = np.abs(d) >= kind(CLEAR) * step
        chosen = wide[clear]
        found |= {
            "bb": float(wide_b @ wide_b),
            "bd": float(wide_b @ wide),
            "dd": float(wide @ wide),
            "mb": float(wide_move @ wide_b),
            "md": float(wide_move @ wide),
            "cd": float((there - b).astype(np.float64) @ wide),
            "clear": len(chosen),
            "clear_dd": float(chosen @ chosen),
            "clear_md": float(wide_move[clear] @ chosen),
            "moved_dd": float(wide @ wide) if not as_base.any() else _dot(wide[~as_base], wide[~as_base]),
        }
    return Sums(**found, **_narrowed(m, there, dtype))


def _dot(one: Values, other: Values) -> float:
    return float(one.astype(np.float64) @ other.astype(np.float64))


def _narrowed(m: Values, there: Values, dtype: str) -> dict[str, int]:
    """Count, of some elements, those of the claim that 16 bits cannot hold, and of these, those of m that they hold."""
    if dtype == "F16":
        return {}
    if dtype == "BF16":  # float16 holds all between, exactly
        some = (np.abs(there) < 2.0**-14) & (there != 0) | (np.abs(there) > 65504)
        m, there = m[some], there[some]
    else:
        m, there = m[:SAMPLED], there[:SAMPLED]
    found = {}
    for name, narrow in (("16", "F16"), ("_b16", "BF16")):
        if DTYPE_BITS[dtype] > 16 or name == "16":
            lost = rounded(there, narrow) != there
            found[f"narrow{name}"] = int(np.count_nonzero(lost))
            found[f"narrowed{name}"] = int(np.count_nonzero(lost & (rounded(m, narrow) == m)))
    return found
