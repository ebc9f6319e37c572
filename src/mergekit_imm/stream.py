"""From plans to safetensors files: streamed, synced, and recorded in the journals of the folders they go to."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import disk, journal, output
from .checkpoint.tensorfile import TensorInfo, open_tensorfile
from .errors import OutputError, bytes_text, shown
from .execute import BUFFER, BUFFERS, Device, Done, Progress, Task, run, warm_up
from .plan import Plan, Segment, segments
from .recipe import MergeReport
from .report import actions, kinds, renamed
from .sums import RECORD

Recipe = Mapping[str, Any]
Records = npt.NDArray[np.float64]  # one row for each segment of a plan

SYNC_BYTES, SYNC_SECONDS = 512 << 20, 5.0
INTERPRETER = 190 << 20  # Python, numpy, numba, the compiled kernel: the most that was measured
PER_TENSOR = 1024


class Job:
    """A plan under way: where it goes, and what is counted on the way for the report."""

    def __init__(
        self, plan: Plan, out: Path, workers: int, device: str, began: float, *, replace: bool, restart: bool
    ) -> None:
        self.plan, self.out, self.workers, self.device, self.replace = plan, out, workers, device, replace
        self.partial = output.partial_of(out)
        self.began, self.planned = began, time.perf_counter()
        self.streamed: float | None = None
        self.verified: float | None = None
        self.read = self.written = 0
        self.notes = list(plan.notes)
        self.sizes = {file.name: file.size for file in plan.files}
        self.whole = {**dict.fromkeys(plan.beside), **self.sizes}  # every file; None: of any size
        self.free = output.free_space(out)
        reused = self.partial.rglob("*") if restart else (self.partial / file.name for file in plan.files)
        held = sum(map(_blocks, reused))
        sides = sum(path.stat().st_size for _, path in plan.side.values() if path is not None)
        self.needed = max(0, plan.bytes_to_write + sides - held)

    def report(self, status: str, refused: str = "") -> MergeReport:
        """Return what was done, or would be."""
        now = time.perf_counter()
        tensors = sum(len(each.tensors) for each in self.plan.inputs.values())
        seconds = {"plan": self.planned - self.began, "total": now - self.began}
        if self.streamed is not None:
            seconds["stream"] = self.streamed
        if self.verified is not None:
            seconds["verify"] = self.verified
        side: dict[str, list[str]] = {}
        for path, (role, _) in self.plan.side.items():
            side.setdefault(role, []).append(path)
        return MergeReport(
            status=status,
            out=str(self.out),
            parameters=asdict(self.plan.parameters),
            parameter_count=self.plan.parameter_count,
            tensors=actions(self.plan),
            files=[file.name for file in self.plan.files],
            bytes_read=self.read if status == "merged" else self.plan.bytes_to_read,
            bytes_written=self.written if status == "merged" else self.plan.bytes_to_write,
            disk_needed=self.needed,
            disk_free=self.free,
            memory=INTERPRETER + min(BUFFER * self.workers, BUFFERS) + PER_TENSOR * tensors,
            workers=self.workers,
            device=self.device,
            seconds={key: round(value, 6) for key, value in seconds.items()},
            kinds=kinds(self.plan.items),
            config_changes=dict(self.plan.config_changes),
            side_files=side,
            left_out={r: list(each.left_out) for r, each in self.plan.inputs.items() if each.left_out and r != "start"},
            renamed=renamed(self.plan.inputs),
            notes=self.notes,
            refused=refused,
            verified=self.verified is not None,
        )


def lack_of_space(jobs: Sequence[Job]) -> str:
    """Say which outputs do not fit on their disks; nothing if all do."""
    needed: dict[int, int] = {}
    for job in jobs:
        disk_of = output.device_of(job.out)
        needed[disk_of] = needed.get(disk_of, 0) + job.needed
        if needed[disk_of] > job.free:
            those = f"output {shown(job.out)}" if len(jobs) == 1 else f"outputs up to {shown(job.out)}"
            return (
                f"{those} need{'s' if len(jobs) == 1 else ''} {bytes_text(needed[disk_of])} and the disk has"
                f" {bytes_text(job.free)} free; free some space or give an OUT on another disk"
            )
    return ""


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


class _Written:
    """One output folder under way: its files, its journal, and what of its plan is done."""

    def __init__(self, job: Job, recipe: bytes, stack: ExitStack) -> None:
        self.job, plan = job, job.plan
        total = sum(item.segment_count for item in plan.items)
        if (job.partial / journal.JOURNAL).exists() and (
            journal.journal_format(job.partial) != (journal.VERSION, total)
            or any(_own_size(job.partial / name) != size for name, size in job.sizes.items())
        ):
            if journal.has_records(job.partial):
                job.notes.append("note: the unfinished merge lost files, or another version began it; beginning anew")
            journal.empty(job.partial)
        self.journal = journal.Journal(job.partial, recipe, total)
        stack.callback(self.journal.close)
        entries = self.journal.entries
        self.records = np.zeros((total, RECORD))
        self.finished = np.zeros(total, bool)
        self.finished[entries["segment"]] = True
        self.records[entries["segment"]] = entries["record"]
        self.pending: list[int] = []
        self.handles: dict[str, disk.Handle] = {}
        for file in plan.files:
            handle = disk.open_output(job.partial / file.name, file.size)
            stack.callback(os.close, handle.descriptor)
            self.handles[file.name] = handle
            disk.write_at(handle, memoryview(file.head), 0)
            job.written += len(file.head)
        disk.sync_folder(job.partial)  # a record is worth nothing if its file has no name
        self.dirty = set(self.handles)

    def write(self, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        handle = self.handles[tensor.file]
        with output.output_errors(handle.path, self.job.partial):
            disk.write_at(handle, piece, tensor.begin + first)

    def note(self, done: Done, number: int) -> None:
        index = done.segment.index
        self.records[index] = done.records[number]
        self.pending.append(index)
        self.dirty.update(out.file for out in self.job.plan.items[done.segment.item].outs)
        self.job.written += done.bytes_written

    def sync(self) -> None:
        """Force to the disk what was written, and only then record it."""
        with output.output_errors(self.job.out, self.job.partial):
            for name in sorted(self.dirty):
                disk.sync(self.handles[name].descriptor)
            self.dirty.clear()
            if self.pending:
                entries = np.zeros(len(self.pending), journal.ENTRY)
                entries["segment"], entries["record"] = self.pending, self.records[self.pending]
                self.journal.append(entries)
                self.pending.clear()


def stream(jobs: Sequence[Job], recipes: Sequence[bytes], device: Device, progress: Progress | None) -> list[Records]:
    """Write the safetensors files of all jobs, or what is missing of them, from one reading of the inputs.

    Returns for each job the records of all its segments.
    """
    if not jobs:
        return []
    plans = [job.plan for job in jobs]
    warm_up(plans, device)
    began = time.perf_counter()
    with ExitStack() as stack:
        folders = [_Written(job, recipe, stack) for job, recipe in zip(jobs, recipes, strict=True)]

        def todo() -> Iterator[Task]:
            for segment in segments(plans[0]):
                lacking = [number for number, each in enumerate(folders) if not each.finished[segment.index]]
                if lacking:
                    yield segment, lacking

        def sink(number: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
            folders[number].write(tensor, first, piece)

        waiting, synced = 0, time.perf_counter()
        total = sum(plan.bytes_to_write for plan in plans)
        done = sum(_bytes_done(each) for each in folders)
        # Closed before the files are, whatever happens: a worker must not write to a descriptor that is another's.
        results = stack.enter_context(closing(run(plans, todo(), sink, workers=jobs[0].workers, device=device)))
        for result in results:
            if result is not None:
                for number in result.records:
                    folders[number].note(result, number)
                    jobs[number].read += result.bytes_read
                    waiting += result.bytes_written
                    done += result.bytes_written
            if waiting >= SYNC_BYTES or (waiting and time.perf_counter() - synced >= SYNC_SECONDS):
                for each in folders:
                    each.sync()
                waiting, synced = 0, time.perf_counter()
            if progress is not None:
                progress(done, total)
        for each in folders:
            each.sync()
        if progress is not None:
            progress(total, total)
    for job in jobs:
        job.streamed = time.perf_counter() - began
        for file in job.plan.files:
            _read_back(job.partial / file.name, job.plan)
    return [each.records for each in folders]


def _bytes_done(written: _Written) -> int:
    if not written.finished.any():
        return 0
    plan, finished = written.job.plan, written.finished

    def size(segment: Segment) -> int:
        return plan.items[segment.item].bytes_written(segment.count)

    return sum(size(segment) for segment in segments(plan) if finished[segment.index])


def _own_size(path: Path) -> int:
    """Size of a file that nothing else knows by another name; -1 if it is not such a one."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else -1


def _read_back(path: Path, plan: Plan) -> None:
    """Check that a written file is what other programs will read: names, dtypes, shapes, offsets."""
    file = open_tensorfile(path, path.name)
    expected = {out.name: out for item in plan.items for out in item.outs if out.file == path.name}
    if {tensor.name: tensor for tensor in file.tensors} != expected:
        raise OutputError(f"{path} does not read back as it was planned; check the disk and merge again")
