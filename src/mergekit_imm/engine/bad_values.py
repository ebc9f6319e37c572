"""Values that end a merge: NaN or infinity in an input, too large results, copies that should be equal and are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..checkpoint.lazy_tensor import Raw
from ..checkpoint.safetensors_file import DTYPE_BITS
from ..common.messages import shown
from ..errors import MismatchError
from ..plan.advice import Advice
from ..plan.plan import Item


@dataclass(frozen=True)
class BadValues:
    """What a piece of a tensor holds that ends the merge: elements are counted from the first of the piece."""

    role: str | None  # the input that holds NaN or infinity; None: the result is too large
    first: int
    count: int


def find_bad_values(
    item: Item, raws: Mapping[str, tuple[Raw, str]], out: tuple[Raw, str], *, allow_nonfinite: bool
) -> BadValues | None:
    """Look at a piece whose sum is not finite; None if the merge may go on.

    `raws` are the inputs by role, with their dtypes. What comes from NaN or infinity in an input is not too large.
    """
    from ..numerics.cpu import finite_elements

    finite = {role: finite_elements(*raw) for role, raw in raws.items()}
    if item.action == "merge" and not allow_nonfinite:
        for role, good in finite.items():
            if not good.all():
                return BadValues(role, int(np.argmin(good)), int((~good).sum()))
    too_large = ~finite_elements(*out) & np.logical_and.reduce(list(finite.values()))
    return BadValues(None, int(np.argmax(too_large)), int(too_large.sum())) if too_large.any() else None


def or_other(item: Item, role: str, advice: Advice, sft: str = "sft") -> str:
    """Return the end of a message: the option that takes another model's tensor, nothing where there is none."""
    other, option = (sft, "--take") if role == "base" else ("base", "--keep")
    cure = advice.either(option, names=names_of(item))
    return f", or use the {other}'s with {cure}" if cure else ""


def check_equal(item: Item, first: int, one: tuple[str, Raw], other: tuple[str, Raw], advice: Advice) -> None:
    """Compare two inputs' bytes, by role, of a tensor that is copied, from byte `first` on. Raises MismatchError."""
    if np.array_equal(one[1], other[1]):
        return
    dtype = item.sides[other[0]].dtype
    element = (first + int(np.flatnonzero(one[1] != other[1])[0])) * 8 // DTYPE_BITS[dtype]
    cure = advice.either("--keep", "--take", names=names_of(item))
    raise MismatchError(
        f"tensor '{shown(item.name)}' is {dtype} and not merged, but it differs at element {element} between"
        f" {advice.used[one[0]].label} and {advice.used[other[0]].label};"
        f" {f'choose one with {cure}' if cure else 'make them equal'}"
    )


def names_of(item: Item) -> set[str]:
    """Return the names that an item has in the files."""
    return {item.name, *(out.name for out in item.outs)}
