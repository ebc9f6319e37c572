"""The numbers by which an audit judges a tensor: sums over base, claimed delta and merged, in one pass.

With base b, delta d and merged m, the claim is c = p b + q d. Added up are products of b, d, m - p b and m - c, and
counts of elements: equal to the base's, beyond rounding, not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics.native import Loop

_loop = Loop("mergekit_imm.analysis.audit_loop", "measure")

Values = npt.NDArray[Any]  # float32, or float64 where a tensor is float64

MANTISSA = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}  # explicit bits
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}  # the smallest step
STEPS = 2.0  # tools round up to three times: the product, each summand, the sum
PRECISE, ROUGH = 2, 2.0**-5  # of the delta: four of its own steps in the dtype; or computed in bfloat16
CLEAR = 2.0  # steps that a delta must have to show in every element
COUNTS = (
    *("count", "not_finite", "as_base", "visible", "beyond", "far", "clear"),
    *("narrow16", "narrowed16", "narrow_b16", "narrowed_b16"),
)  # as the loop writes them
SUMS = (
    *("worst", "steps", "bb", "bd", "dd", "mb", "md", "mm", "rest", "cd"),
    *("clear_dd", "clear_md", "moved_dd"),
)
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
    mb: float = 0.0  # (m - p b) b
    md: float = 0.0  # (m - p b) d
    mm: float = 0.0  # (m - p b)^2
    rest: float = 0.0  # (m - c)^2
    cd: float = 0.0  # (c - p b) d, c rounded: what md would be for the right merge
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
        """Least squares of m - p b = k d; where there are enough, over the elements that rounding cannot hide."""
        if self.clear >= 64 and self.clear_dd:
            return self.clear_md / self.clear_dd
        return self.md / self.dd if self.dd else None

    @property
    def explained(self) -> float | None:
        """The share of |m - p b|^2 that k d explains."""
        k = self.coefficient
        if k is None or not self.mm:
            return None
        return max(0.0, 1 - (self.mm - 2 * k * self.md + k * k * self.dd) / self.mm)

    def left_by(self, k: float) -> float:
        """Return |m - p b - k d|^2."""
        return max(0.0, self.mm - 2 * k * self.md + k * k * self.dd)

    @property
    def noise(self) -> float:
        """The most that rounding leaves of |m - c|^2: nine sixteenths of a squared step an element."""
        return 0.5625 * self.steps

    def error(self, left: float) -> float:
        """Return the standard error of a coefficient that leaves so much unexplained."""
        return math.sqrt(max(left, self.steps / 12) / self.count / self.dd) if self.dd and self.count else math.inf


def measure(b: Values, d: Values | None, m: Values, p: float, q: float, dtype: str) -> Sums:
    """Return the sums over a span. Without `d` the tensor is claimed to be p b; `dtype` is that of the values of m."""
    counts, sums = np.zeros(len(COUNTS), np.int64), np.zeros(len(SUMS), np.float64)
    relative = 2.0 ** -MANTISSA[dtype]
    limits = np.array([STEPS, PRECISE * relative, ROUGH, CLEAR])
    sampled = {"BF16": 0, "F16": -1}.get(dtype, SAMPLED)
    delta = b[:0] if d is None else d
    changed, exact = d is not None, dtype == "F64"
    _loop(b, delta, m, changed, float(p), float(q), relative, LEAST[dtype], exact, limits, sampled, counts, sums)
    found: dict[str, Any] = dict(zip(COUNTS, map(int, counts), strict=True))
    found |= {name: min(1e300, float(value)) for name, value in zip(SUMS, sums, strict=True)}
    return Sums(**found)
