"""How each tensor of an audit ends: as claimed, the base's, scaled, and so on, by plain rules on its sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..model.tensor_names import layer_key
from .audit_inputs import ADDED
from .audit_sums import ROUGH, Sums
from .change import module_kind

State = Literal[
    "as claimed",  # the sft changes it, and so it is there
    "unchanged",  # the sft does not change it, and it is the base's
    "hidden",  # the change is too small for the dtype: right, but it would look so unmerged too
    "base",  # the sft changes it, but it is the base's
    "scaled",  # k times the change
    "dropped",  # k times the change in some elements, the base's in the others
    "exchanged",  # as claimed, but in another order
    "other",  # something else
    "foreign",  # the sft does not change it, but it is not the base's
    "not finite",
    "shape",  # of another shape
    "missing",
]
RIGHT = ("as claimed", "unchanged", "hidden")
NO_MAGNITUDES = "the magnitudes of DoRA were left out"  # why a tensor is as claimed otherwise
LOOSE = 0.01  # of a coefficient: weights of a merge may themselves be rounded to bfloat16
ERRORS = 4  # standard errors


@dataclass(frozen=True)
class TensorAudit:
    """What was found of one tensor."""

    name: str  # the base's
    state: State
    elements: int
    dtype: str | None  # as stored; None if it is missing
    changed: bool  # by the sft
    coefficient: float | None = None  # k of merged - p base = k (sft - base), by least squares
    expected: float | None = None  # the k that is claimed
    explained: float | None = None  # share of |merged - p base|^2
    beyond: int = 0  # elements off by more than rounding
    worst: float = 0.0  # the largest difference from the claim, in steps of the dtype
    why: str = ""  # of an exchange: what was exchanged
    rank: int | None = None  # of the adapter's factors
    scaling: float | None = None
    sums: Sums = field(default_factory=Sums, repr=False)

    @property
    def kind(self) -> str:
        """The module that it belongs to, with its parameter if that is not the weight."""
        name, added, _ = self.name.partition(ADDED)
        kind = module_kind(name)
        if kind == "bias":
            kind = ".".join(name.split(".")[-2:])
        inside = ".experts." in name and kind != "experts"
        return f"{'experts.' if inside else ''}{kind}{added}"

    @property
    def is_added(self) -> bool:
        """Whether it is the rows of a tensor that only the sft has."""
        return self.name.endswith(ADDED)

    @property
    def layer(self) -> str | None:
        """The layer that it lies in."""
        return layer_key(self.name)

    @property
    def factor(self) -> float | None:
        """How many times the claimed change was found."""
        return None if self.coefficient is None or not self.expected else self.coefficient / self.expected

    @property
    def is_rough(self) -> bool:
        """Whether it is as claimed, but computed less precisely than its dtype allows."""
        return self.state == "as claimed" and self.beyond > 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "state": self.state,
            "elements": self.elements,
            "dtype": self.dtype,
            "changed": self.changed,
            "coefficient": self.coefficient,
            "expected": self.expected,
            "explained": self.explained,
            "elements_beyond_rounding": self.beyond,
            "largest_difference_in_steps": self.worst,
            "elements_as_base": self.sums.as_base,
            **({"why": self.why} if self.why else {}),
        }


def state_of(sums: Sums, p: float, q: float) -> State:
    """Return how a tensor ends that is claimed to be p base + q (sft - base), from its sums.

    As claimed, if no element is off by more than rounding, the squared rest is no more than that of rounding, and the
    coefficient is what the claim, rounded, would give. All but the base's elements in their dtype, bit for bit, is
    the base's. `scaled`, if k times the change leaves no more than rounding.
    """
    if sums.not_finite:
        return "not finite"
    if not sums.dd:
        return "unchanged" if not sums.beyond else "foreign"
    if is_right(sums, q):
        return "as claimed" if _shows(sums, q) else "hidden"
    if sums.as_base == sums.count:
        return "base"
    k = sums.coefficient or 0.0
    if sums.left_by(k) <= _allowed(sums, k, ROUGH / 4):
        is_base = p == 1 and abs(k) <= max(ERRORS * sums.error(sums.left_by(k)), LOOSE / 2)
        return "base" if is_base else "scaled"
    if p == 1 and 0 < sums.moved_dd < 0.999 * sums.dd:
        k = sums.md / sums.moved_dd
        if abs(sums.mm - k * sums.md) <= _allowed(sums, k, ROUGH / 4):
            return "dropped"
    return "other"


def is_right(sums: Sums, q: float) -> bool:
    """Whether a tensor that the sft changes is as claimed; or but for the change having been computed in bfloat16."""
    near = abs(sums.md - sums.cd) / sums.dd <= LOOSE * abs(q) + ERRORS * sums.error(sums.rest)
    if not near:
        return False
    if not sums.beyond:
        return sums.rest <= _allowed(sums, q, ROUGH / 4)
    off = (sums.md / sums.dd - q) ** 2 * sums.dd > 0.75 * sums.rest  # most of what is off is the coefficient
    return not sums.far and not off and sums.rest <= _allowed(sums, q, ROUGH / 4)


def _allowed(sums: Sums, k: float, relative: float) -> float:
    """Return how large a squared rest may be: that of rounding, and of a change computed this precisely."""
    return sums.noise + (relative * k) ** 2 * sums.dd


def _shows(sums: Sums, q: float) -> bool:
    """Whether the base's tensor would not pass as the claim too."""
    if not sums.visible:
        return False
    unmerged = abs(sums.cd) / sums.dd <= LOOSE * abs(q) + ERRORS * sums.error(q * q * sums.dd)
    return not (unmerged and q * q * sums.dd <= sums.noise)
