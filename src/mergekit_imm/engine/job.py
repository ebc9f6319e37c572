"""A merge in progress: its plan, its output, the space it needs, and the counts of its report."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.messages import for_caller
from ..common.threads import default_workers
from ..options.options import RunOptions
from ..output import paths
from ..output.write_errors import disk_of, output_errors
from ..plan.describe import description
from ..plan.plan import Plan
from .report import MergeReport, actions
from .workers import BUFFER, BUFFERS

INTERPRETER = 190 << 20  # bytes, the most measured: with numba, which only a first run loads, not torch
PER_TENSOR = 1024  # bytes of metadata


class Job:
    """A plan being executed: its output folder, and the counts for the report."""

    def __init__(self, plan: Plan, recipe: dict[str, Any], out: Path, options: RunOptions, began: float) -> None:
        self.plan, self.recipe, self.out, self.options = plan, recipe, out, options
        self.workers = options.workers or default_workers()
        self.partial = paths.partial_of(out)
        self.began, self.planned = began, time.perf_counter()
        self.streamed: float | None = None
        self.verified: float | None = None
        self.read = self.written = 0
        self.digests: dict[str, str] = {}  # sha256 of every file, once asked for
        self.records: npt.NDArray[np.float64] | None = None  # statistics, one row for each segment, once streamed
        self.notes = list(plan.notes)
        self.sizes = {file.name: file.size for file in plan.files}
        self.whole = {**dict.fromkeys(plan.beside), **self.sizes}  # every file; None: any size
        self.free = disk_of(out)[1]
        reused = self.partial.rglob("*") if options.restart else (self.partial / file.name for file in plan.files)
        held = sum(map(_blocks, reused))
        sides = sum(path.stat().st_size for _, path in plan.side.values() if path is not None)
        self.needed = max(0, plan.bytes_to_write + sides - held)

    def errors(self) -> AbstractContextManager[None]:
        """Turn an OSError into an OutputError that names what was kept."""
        return output_errors(self.out, self.partial)

    def report(self, status: str, refused: str = "") -> MergeReport:
        """Return what the merge did, or would do."""
        now = time.perf_counter()
        tensors = sum(len(each.tensors) for each in self.plan.models.values())
        seconds = {"plan": self.planned - self.began, "total": now - self.began}
        if self.streamed is not None:
            seconds["stream"] = self.streamed
        if self.verified is not None:
            seconds["verify"] = self.verified
        return MergeReport(
            status=status,
            out=str(self.out),
            parameters=asdict(self.plan.options),
            parameter_count=self.plan.parameter_count,
            tensors=actions(self.plan),
            files=[file.name for file in self.plan.files],
            bytes_read=self.read if status == "merged" else self.plan.bytes_to_read,
            bytes_written=self.written if status == "merged" else self.plan.bytes_to_write,
            disk_needed=self.needed,
            disk_free=self.free,
            memory=INTERPRETER + min(BUFFER * self.workers, BUFFERS) + PER_TENSOR * tensors,
            workers=self.workers,
            device=self.options.device,
            seconds={key: round(value, 6) for key, value in seconds.items()},
            **description(self.plan.models, self.plan.items, self.plan, self.notes),
            refused=for_caller(refused),
            verified=self.verified is not None,
            digests=self.digests,
        )


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0
