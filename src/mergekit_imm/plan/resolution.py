"""Detect a merge whose change is smaller than the steps of the dtype it is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.reader import Files
from ..common.notes import Note, note
from ..model.tensor_names import weight_kind
from ..numerics.dtypes import TORCH_NAMES
from ..numerics.mask import KEEP_ALL
from .plan import Item
from .unchanged import middle, values

TENSORS = 64  # are looked at, spread over the model
NAMES = {code: name for name, code in TORCH_NAMES.items()}
TOLERANCE = 0.1  # of the change that was asked for
Values = npt.NDArray[np.float64]


def note_if_rounded(models: Mapping[str, Checkpoint], items: Sequence[Item]) -> list[Note]:
    """Return a note if rounding to the output dtype makes another change than was asked for, judged by a sample.

    Fine-tuning moves most weights of a large model by no more than a step of bfloat16 or float16. Of such a change the
    rounded merge keeps nothing, or all, where alpha asks for a part: 1.6 steps become 2, 0.6 become 1, 0.4 none.
    """
    if any(each.folder is None for each in models.values()):
        return []
    some = items[:: len(items) // (8 * TENSORS) or 1]  # not all of a million
    shares: dict[str, float] = {}
    for dtype in ("BF16", "F16"):
        typical = [item for item in some if item.outs[0].dtype == dtype and _is_typical(item)]
        with Files(models) as files, np.errstate(all="ignore"):
            changes = [_changes(item, files) for item in typical[:: -(-len(typical) // TENSORS) or 1]]
        wanted = float(sum(np.vdot(asked, asked) for asked, _ in changes))
        if 0 < wanted < math.inf:
            shares[dtype] = float(sum(np.vdot(asked, made) for asked, made in changes)) / wanted
    text = (
        "stored in {dtype}, the merged weights make {share:.0%} of the change that alpha and drop ask for, judging by a"
        " sample: much of it is smaller than a step of {dtype}; --dtype float32 keeps all of it"
    )
    return [
        note("rounded", text, dtype=NAMES[dtype], share=share)
        for dtype, share in shares.items()
        if abs(share - 1) > TOLERANCE
    ]


def _is_typical(item: Item) -> bool:
    changes = item.action == "merge" and "sft" in item.sides and item.constants.alpha < 1
    return changes and weight_kind(item.name, item.source.shape) == "linear"


def _changes(item: Item, files: Files) -> tuple[Values, Values]:
    """Return the exact change of the merged weights from base in the middle of a tensor, and the rounded one."""
    where = middle(item.source)
    sides = {role: values(tensor, role, *where, files) for role, tensor in item.sides.items()}
    base, constants = sides["base"], item.constants
    start = sides.get("start", base)
    delta = sides["sft"] if constants.is_delta else sides["sft"] - start
    # Any mask will do for a sample; all that counts is its share.
    kept = np.random.default_rng(0).random(delta.size) * KEEP_ALL < constants.keep16
    tuned = start + np.where(kept, delta * constants.scale, 0.0)
    exact = constants.alpha * base + constants.weight * tuned
    return exact - base, _rounded(exact, item.outs[0].dtype) - base


def _rounded(exact: Values, dtype: str) -> Values:
    """Round to bfloat16 or float16, to nearest even."""
    if dtype == "F16":
        return exact.astype(np.float16).astype(np.float64)
    bits = exact.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
