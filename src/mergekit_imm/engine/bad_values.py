"""Values that end a merge: NaN or infinity in an input, too large results, copies that should be equal and are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..checkpoint.lazy_tensor import Raw, Tensor
from ..checkpoint.reader import Files
from ..common.messages import shown
from ..errors import MismatchError, NonFiniteError
from ..numerics.dtypes import DTYPE_BITS, MERGED
from ..plan.advice import Advice
from ..plan.plan import Item, Plan


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


def check_values(
    plan: Plan,
    item: Item,
    raws: dict[str, tuple[Raw, str]],
    out: tuple[Raw, str],
    first: int,
    files: Files,
    merge: str,
) -> None:
    """Raise NonFiniteError if a sum that is not finite must end the merge."""
    found = find_bad_values(item, raws, out, allow_nonfinite=plan.options.allow_nonfinite)
    if found is None:
        return
    advice = Advice(plan.models, plan.options)
    if found.role is not None:
        bad, element = _count_nonfinite(item.sides[found.role], found.role, files)
        raise NonFiniteError(
            f"tensor '{shown(item.name)}' of {plan.models[found.role].label} has {bad} NaN or infinite of"
            f" {item.source.count} elements, the first at index {element}; train or save it again, let them through"
            f" with --allow-nonfinite{or_other(item, found.role, advice)}"
        )
    wider = {"F16": "--dtype bfloat16", "BF16": "--dtype float32"}.get(out[1])
    wider = wider or advice.either("--keep", names=names_of(item)) or "a larger --alpha"
    raise NonFiniteError(
        f"tensor '{shown(item.name)}': the merged value of element {first + found.first}{merge} is too large for the"
        f" output dtype {out[1]}; use {wider}"
    )


def check_taken(plan: Plan, item: Item, content: Raw, files: Files) -> None:
    """Raise NonFiniteError if a piece of an adapter, copied as it is, holds NaN or infinity."""
    from ..numerics.cpu import finite_elements

    (role, side), *_ = item.sides.items()
    if side.dtype not in MERGED or plan.options.allow_nonfinite or finite_elements(content, side.dtype).all():
        return
    bad, element = _count_nonfinite(side, role, files)
    raise NonFiniteError(
        f"tensor '{shown(item.name)}' of {plan.models[role].label} has {bad} NaN or infinite of {side.count} elements,"
        f" the first at index {element}; train or save it again, or let them through with --allow-nonfinite"
    )


def _count_nonfinite(tensor: Tensor, role: str, files: Files) -> tuple[int, int]:
    """Return the number of non-finite elements of a tensor, and the index of the first (-1 if none)."""
    from ..numerics.cpu import finite_elements

    width = DTYPE_BITS[tensor.dtype] // 8
    bad, element = 0, -1
    for first in range(0, tensor.count, 1 << 18):
        buffer = np.empty(min(1 << 18, tensor.count - first) * width, np.uint8)
        files.read(role, tensor, first * width, buffer)
        found = np.flatnonzero(~finite_elements(buffer, tensor.dtype))
        if len(found):
            element = first + int(found[0]) if element < 0 else element
            bad += len(found)
    return bad, element
