"""Detect a merge whose change is smaller than the steps of the dtype it is stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.reader import Files
from ..common.notes import Note, note
from ..model.tensor_names import weight_kind
from ..numerics.mask import KEEP_ALL
from ..transforms.sparsified_delta import Sparsified
from .plan import Item
from .unchanged import middle, values

TENSORS = 64  # are looked at, spread over the model
TOLERANCE = 0.1  # of the change that was asked for
Values = npt.NDArray[np.float64]


def note_if_rounded(models: Mapping[str, Checkpoint], items: Sequence[Item]) -> list[Note]:
    """Return a note if rounding to the output dtype makes another change than was asked for, judged by a sample.

    Fine-tuning moves most weights of a large model by no more than a step of bfloat16 or float16. Of such a change the
    rounded merge keeps nothing, or all, where alpha asks for a part: 1.6 steps become 2, 0.6 become 1, 0.4 none.
    """
    if any(each.folder is None for each in models.values()):
        return []
    with Files(models) as files:
        return notes_of(
            [(item, item.outs[0].dtype) for item in sampled(items)],
            lambda item, role: values(item.sides[role], role, *middle(item.source), files),
            "--dtype float32 keeps all of it",
        )


def sampled(items: Sequence[Item]) -> list[Item]:
    """Return weight matrices that are merged, spread over the model; not all of a million."""
    return [item for item in items[:: len(items) // (8 * TENSORS) or 1] if _is_typical(item)]


def notes_of(stored: Sequence[tuple[Item, str]], read: Callable[[Item, str], Values], cure: str) -> list[Note]:
    """Return a note for each dtype of 16 bits in which less or more than the change is stored.

    `stored` are items and the dtypes of their results; `read(item, role)` returns some of an input's elements, of all
    roles the same ones.
    """
    notes = []
    for dtype, name in (("BF16", "bfloat16"), ("F16", "float16")):
        here = [item for item, code in stored if code == dtype]
        with np.errstate(all="ignore"):
            changes = [_changes(item, dtype, read) for item in here[:: -(-len(here) // TENSORS) or 1]]
        asked = float(sum(np.vdot(exact, exact) for exact, _ in changes))
        share = float(sum(np.vdot(exact, made) for exact, made in changes)) / asked if 0 < asked < math.inf else 1
        text = (
            "stored in {dtype}, the merged weights make {share:.0%} of the change that alpha and drop ask for, judging"
            " by a sample: much of it is smaller than a step of {dtype}; {cure}"
        )
        if abs(share - 1) > TOLERANCE:
            notes.append(note("rounded", text, dtype=name, share=share, cure=cure))
    return notes


def _is_typical(item: Item) -> bool:
    sft = item.sides.get("sft")
    if item.action != "merge" or sft is None or isinstance(sft, Sparsified):  # whose thresholds take a whole reading
        return False
    return item.constants.alpha < 1 and weight_kind(item.name, item.source.shape) == "linear"


def _changes(item: Item, dtype: str, read: Callable[[Item, str], Values]) -> tuple[Values, Values]:
    """Return the exact change of some merged weights from base, and the rounded one."""
    sides = {role: read(item, role) for role in item.sides}
    base, constants = sides["base"], item.constants
    start = sides.get("start", base)
    delta = sides["sft"] if constants.is_delta else sides["sft"] - start
    # Any mask will do for a sample; all that counts is its share.
    kept = np.random.default_rng(0).random(delta.size) * KEEP_ALL < constants.keep16
    tuned = start + np.where(kept, delta * constants.scale, 0.0)
    exact = constants.alpha * base + constants.weight * tuned
    return exact - base, _rounded(exact, dtype) - base


def _rounded(exact: Values, dtype: str) -> Values:
    """Round to bfloat16 or float16, to nearest even."""
    if dtype == "F16":
        return exact.astype(np.float16).astype(np.float64)
    bits = exact.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
