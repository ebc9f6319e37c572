"""Detect an sft that equals its start: training changed nothing, or its result is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor, fill_as
from ..checkpoint.reader import Files
from ..common.messages import shown
from ..common.notes import Note, note
from ..numerics.dtypes import DTYPE_BITS
from .plan import Item, same_place

SAMPLED = 1024  # elements in the middle of each tensor


def looks_unchanged(models: Mapping[str, Checkpoint], items: Sequence[Item]) -> bool:
    """Whether sft and start agree in the middle of every merged tensor; stops at the first difference.

    False if files cannot be read, as in a dry run on a hub id.
    """
    merged = [item for item in items if item.action == "merge" and "sft" in item.sides]
    if not merged or any(each.folder is None for each in models.values()):
        return False
    with Files(models) as files:
        return not any(_differs(item, files) for item in merged)


def _differs(item: Item, files: Files) -> bool:
    sft, role = item.sides["sft"], "start" if "start" in item.sides else "base"
    here = values(sft, "sft", *middle(sft), files)
    if sft.is_delta:
        return bool(here.any())
    return not np.array_equal(here, values(item.sides[role], role, *middle(sft), files), equal_nan=True)


def middle(tensor: Tensor) -> tuple[int, int]:
    """Return the first of the elements to look at, and their number."""
    count = min(SAMPLED, tensor.count)
    return (tensor.count - count) // 2, count


def values(tensor: Tensor, role: str, first: int, count: int, files: Files) -> npt.NDArray[np.float64]:
    """Read elements of a tensor of an input."""
    dtype = "F64" if tensor.dtype == "F64" else "F32"
    raw = np.empty(count * DTYPE_BITS[dtype] // 8, np.uint8)
    fill_as(tensor, dtype, lambda t, at, out: files.read(role, t, at, out), first, raw)
    return raw.view(np.float64 if dtype == "F64" else np.float32).astype(np.float64)


def note_if_unchanged(models: Mapping[str, Checkpoint], items: Sequence[Item]) -> list[Note]:
    """Return a note if the sft looks like its start, before a merge."""
    if same_place(models["base"], models["sft"]) or not looks_unchanged(models, items):
        return []  # one folder given twice has its own note
    return [note_of(models, f"judging by {SAMPLED} elements of each tensor")]


def note_of(models: Mapping[str, Checkpoint], how: str) -> Note:
    """Return the note that sft equals start, and where the trained weights may be; `how` says what was compared."""
    sft, start = models["sft"], models.get("start", models["base"])
    cure = "was it trained, and saved?"
    if sft.adapters:
        cure = f"the trained weights may be the adapter in {shown(sft.adapters[0])}: give that folder as SFT"
    text = "{sft} equals {start}, {how}; the merge changes nothing: {cure}"
    return note("sft equals start", text, sft=sft.label, start=start.label, how=how, cure=cure)
