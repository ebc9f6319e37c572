"""The anchor of the next round, written while a round is merged: both come from one reading of the inputs.

    anchor_t+1 = d * anchor_t + (1 - d) * merged_t

It needs the base and the result of each piece, and nothing from the disk. The pieces go to files in `anchor.begun`;
once the merged model is there, the folder becomes that of an unfinished merge of the anchor, which
`merge_checkpoints` then resumes: it computes what is lacking (copied tensors, pieces of a merge that was interrupted),
and gives the same bytes as if it had begun itself. A folder left by a killed loop is removed by the next.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.lazy_tensor import Raw
from ..common.pages import PAGE, place
from ..common.threads import when_unused
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.statistics import Record, Tally, is_finite, new_tally, to_record
from ..options.options import MergeOptions, options_from
from ..options.recipe import to_json
from ..output import direct_io
from ..output.journal import ENTRY, JOURNAL, Journal
from ..output.paths import is_occupied, partial_of
from ..output.write_errors import disk_of
from ..plan.make_plan import make_plans, recipes_of
from ..plan.open_inputs import open_inputs
from ..plan.plan import Item, Plan, Segment, segments

Side = tuple[Raw, str]
SPARE = 1 << 30  # bytes of the disk to leave to the merge: it comes first


class NextAnchor:
    """An anchor that is written during another merge, whose base is the anchor before."""

    def __init__(self, given: Mapping[str, Any], like: str) -> None:
        """Plan it: `given` are the arguments of its own merge, `like` a model with the layout of the one merged now."""
        self._given = given
        self._plan = _planned({**given, "sft": like})
        self._items = {item.name: item for item in self._plan.items if item.is_merged(0) and item.common is None}
        self._out = Path(given["out"])
        self._folder = self._out.with_name(f"{self._out.name}.begun")
        self._tallies: dict[tuple[str, int], Tally] = {}
        self._left: dict[tuple[str, int], int] = {}  # elements of a segment that are to come
        self._files: dict[str, direct_io.Handle] = {}
        self._lock, self._own, self._to_close = threading.Lock(), threading.local(), ExitStack()
        self._is_lost = False
        self.discard()

    def add(self, item: Item, segment: Segment, first: int, count: int, base: Side, merged: Side) -> None:
        """Compute and write a piece, given the base and the result of the merge. Called by its workers."""
        own = self._items.get(item.name)
        names = [out.name for out in item.outs]
        if self._is_lost or own is None or own.sides["base"] != item.sides["base"] or item.common is not None:
            return
        if [out.name for out in own.outs] != names or own.source.count != item.source.count:
            return
        from ..numerics.cpu import merge_span

        dtype, key = own.outs[0].dtype, (item.name, segment.first)
        width = DTYPE_BITS[dtype] // 8
        buffer = self._buffer(count * width + PAGE)
        at = place(buffer, 0, own.outs[0].begin + first * width)
        raw = buffer[at : at + count * width]
        tally = self._tallies.setdefault(key, new_tally())
        merge_span(base, base, merged, (raw, dtype), count, first, own.mask_key, own.constants, tally)
        try:
            self._open()
            for out in own.outs:
                direct_io.write_at(self._files[out.file], memoryview(raw), out.begin + first * width)  # type: ignore[arg-type]
        except OSError:  # a full disk: its own merge will say so, or find room
            self._is_lost = True
            return
        self._left[key] = self._left.get(key, segment.count) - count

    def _buffer(self, size: int) -> Raw:
        if len(getattr(self._own, "buffer", ())) < size:
            self._own.buffer = np.empty(size, np.uint8)
        buffer: Raw = self._own.buffer
        return buffer

    def _open(self) -> None:
        """Make the files, once: the merge has reserved its own space by now."""
        with self._lock:
            if self._files:
                return
            if disk_of(self._out)[1] < self._plan.bytes_to_write + SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            direct_io.make_folder(self._folder)
            for file in self._plan.files:
                path = self._folder / file.name
                direct_io.make_folder(path.parent)
                handle = direct_io.open_output(path, file.size)
                self._to_close.callback(handle.close)
                direct_io.write_at(handle, memoryview(file.head), 0)
                self._files[file.name] = handle

    def hand_over(self, resume: Callable[[], object]) -> None:
        """Make the folder an unfinished merge of the anchor, now that the merged model is there, and resume that."""
        partial = partial_of(self._out)
        if self._is_lost or not self._files or is_occupied(partial):
            return
        plan = _planned(self._given)
        if plan.files != self._plan.files:
            return
        entries = [
            (segment.index, to_record(self._tallies[key]))
            for segment in segments(plan)
            if self._left.get(key := (plan.items[segment.item].name, segment.first)) == 0
            and is_finite(self._tallies[key])
        ]
        try:
            self._become_unfinished(partial, plan, entries)
        except OSError:
            return
        resume()

    def _become_unfinished(self, partial: Path, plan: Plan, entries: list[tuple[int, Record]]) -> None:
        for handle in self._files.values():
            direct_io.sync_output(handle)
        for folder in {self._folder, *((self._folder / name).parent for name in self._files)}:
            direct_io.sync_folder(folder)
        recipe = to_json(recipes_of([plan])[0])
        with closing(Journal(self._folder / JOURNAL, recipe, plan.segment_count)) as journal:
            journal.append(np.array(entries, ENTRY))
        with suppress(FileNotFoundError):
            partial.rmdir()
        self._folder.rename(partial)
        direct_io.sync_folder(partial.parent)

    def discard(self) -> None:
        """Close the files and remove what was not handed over."""
        when_unused(self._to_close.close)
        shutil.rmtree(self._folder, ignore_errors=True)


def _planned(given: Mapping[str, Any]) -> Plan:
    refs = {role: given[role] for role in ("base", "sft")}
    (plan,) = make_plans(open_inputs(refs, options_from(given, MergeOptions), outs=[Path(given["out"])]))
    return plan
