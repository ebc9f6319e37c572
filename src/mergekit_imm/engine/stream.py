"""Stream plans into safetensors files; sync them, then record the finished segments in each folder's journal."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.checkpoint import in_part
from ..checkpoint.safetensors_file import TensorInfo, open_tensorfile
from ..common.abandoned import when_unused
from ..common.messages import shown
from ..common.notes import note
from ..errors import OutputError
from ..numerics.statistics import RECORD
from ..options.options import Progress
from ..output import direct_io, journal, paths
from ..plan.plan import Plan, segments
from ..ranks.ranks import ALONE, Ranks, together
from ..ranks.shares import Share, shares
from .job import Job, errors_of
from .workers import Device, Done, Task, run_segments, warm_up

Recipe = Mapping[str, Any]
Finished = npt.NDArray[np.bool_]  # one flag per segment of a plan
Handles = dict[str, direct_io.Handle]
Part = tuple[int, int, journal.Entries]  # of one rank: bytes read, bytes written, shared segments
Records = npt.NDArray[np.float64]  # one row per segment of a plan

SYNC_BYTES, SYNC_SECONDS = 512 << 20, 5.0
STOP = journal.JOURNAL + ".stop"  # exists once one of several ranks has failed


class _OutputFolder:
    """An output folder in progress: its open files, its journal, and which segments are done."""

    def __init__(self, job: Job, own: journal.Journal, finished: Finished, handles: Handles) -> None:
        self.job, self.journal, self.finished, self.handles = job, own, finished, handles
        self.records = np.zeros((len(finished), RECORD))
        self.record(own.entries)
        self.pending: list[int] = []
        self.halves: list[int] = []  # segments shared with another rank, which writes the rest
        self.dirty = set(handles)

    def record(self, entries: journal.Entries) -> None:
        """Apply the entries of a journal."""
        self.finished[entries["segment"]] = True
        self.records[entries["segment"]] = entries["record"]

    def entries(self, indices: list[int]) -> journal.Entries:
        """Return journal entries for these segments."""
        entries = np.zeros(len(indices), journal.ENTRY)
        entries["segment"], entries["record"] = indices, self.records[indices]
        return entries

    def write(self, share: Share, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        handle = self.handles[tensor.file]
        low, high = share.clip(tensor, first, len(piece))
        if low < high:
            with paths.output_errors(handle.path, self.job.partial):
                direct_io.write_at(handle, piece[low:high], tensor.begin + first + low)

    def note(self, done: Done, number: int, held: int) -> None:
        index = done.segment.index
        self.records[index] = done.records[number]
        (self.pending if held == done.bytes_written else self.halves).append(index)
        self.dirty.update(out.file for out in self.job.plan.items[done.segment.item].outs)
        self.job.written += held
        self.job.read += done.bytes_read

    def sync(self) -> None:
        """Sync written files, then record their segments in the journal."""
        with paths.output_errors(self.job.out, self.job.partial):
            for name in sorted(self.dirty):
                direct_io.sync(self.handles[name].descriptor)
            self.dirty.clear()
            if self.pending:
                self.journal.append(self.entries(self.pending))
                self.finished[self.pending] = True
                self.pending.clear()


def _create_folder(job: Job, recipe: bytes, size: int, stack: ExitStack) -> _OutputFolder:
    """Create or reopen the files of a folder, preallocated, with a journal for each rank."""
    plan, partial = job.plan, job.partial
    total = sum(item.segment_count for item in plan.items)
    if (partial / journal.JOURNAL).exists() and (
        journal.journal_format(partial) != (journal.VERSION, total)
        or any(_own_size(partial / name) != size for name, size in job.sizes.items())
    ):
        if journal.has_records(partial):
            text = "the unfinished merge lost files, or another version began it; starting over"
            job.notes.append(note("starting over", text))
        journal.empty(partial)
    (partial / STOP).unlink(missing_ok=True)
    own = journal.Journal(partial, recipe, total)
    stack.callback(own.close)
    others = journal.take_in(partial, own, recipe, total)
    handles = {}
    for file in plan.files:
        direct_io.make_folder((partial / file.name).parent)
        handle = handles[file.name] = direct_io.open_output(partial / file.name, file.size)
        stack.callback(when_unused, handle.close)
        direct_io.write_at(handle, memoryview(file.head), 0)
        job.written += len(file.head)
        if size > 1:
            direct_io.sync(handle.descriptor)  # before another machine writes after it
    for rank in range(1, size):
        journal.Journal(partial, recipe, total, rank).close()
    for parent in {(partial / name).parent for name in (*handles, journal.JOURNAL)}:
        direct_io.sync_folder(parent)  # a record is useless if its file is not in the folder after a crash
    folder = _OutputFolder(job, own, np.zeros(total, bool), handles)
    folder.record(others)
    return folder


def _open_folder(job: Job, recipe: bytes, rank: int, finished: Finished, stack: ExitStack) -> _OutputFolder:
    """Open the files that rank 0 created."""
    own = journal.Journal(job.partial, recipe, len(finished), rank)
    stack.callback(own.close)
    handles = {}
    for file in job.plan.files:
        handle = handles[file.name] = direct_io.open_output(job.partial / file.name, None)
        stack.callback(when_unused, handle.close)
    return _OutputFolder(job, own, finished, handles)


def stream(
    jobs: Sequence[Job], recipes: Sequence[bytes], device: Device, progress: Progress | None, ranks: Ranks = ALONE
) -> list[Records]:
    """Write the safetensors files of all jobs, or what they lack, from a single read of the inputs.

    Returns the records of all segments of each job; complete on rank 0 only.
    """
    if not jobs:
        return []
    began = time.perf_counter()
    with ExitStack() as stack:
        created = together(ranks, lambda: _create_folders(jobs, recipes, ranks, stack))
        finished = ranks.gather([(np.packbits(each.finished), len(each.finished)) for each in created])[0]

        def write() -> list[_OutputFolder]:
            with errors_of(jobs):
                folders = created or [
                    _open_folder(job, recipe, ranks.rank, np.unpackbits(each, count=count).astype(bool), stack)
                    for job, recipe, (each, count) in zip(jobs, recipes, finished, strict=True)
                ]
                _write_share(folders, device, progress, ranks)
                return folders

        folders = together(ranks, write)
        parts = ranks.gather([(each.job.read, each.job.written, each.entries(each.halves)) for each in folders])
        together(ranks, lambda: _finish_folders(jobs, recipes, folders, parts, ranks))
    for job in jobs:
        job.streamed = time.perf_counter() - began
    return [each.records for each in folders]


def _create_folders(
    jobs: Sequence[Job], recipes: Sequence[bytes], ranks: Ranks, stack: ExitStack
) -> list[_OutputFolder]:
    """Create or reopen the folders of all jobs on rank 0; return none on others."""
    if ranks.rank:
        return []
    folders = []
    for job, recipe in zip(jobs, recipes, strict=True):
        with errors_of([job]):
            folders.append(_create_folder(job, recipe, ranks.size, stack))
    return folders


def _write_share(folders: Sequence[_OutputFolder], device: Device, progress: Progress | None, ranks: Ranks) -> None:
    """Write this rank's share. A rank that fails creates the STOP file, and the others stop."""
    jobs = [each.job for each in folders]
    plans = [job.plan for job in jobs]
    lacking = np.sum([~each.finished for each in folders], axis=0)
    share = shares(plans[0], lacking, ranks.size)[ranks.rank]
    several = ranks.size > 1
    warm_up(plans, device)

    def sink(number: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        folders[number].write(share, tensor, first, piece)

    waiting, synced, looked = 0, time.perf_counter(), time.perf_counter()
    # Stop the workers before the files close: a descriptor may be reused.
    with closing(run_segments(plans, _todo(folders, share), sink, workers=jobs[0].workers, device=device)) as results:
        total = sum(plan.bytes_to_write for plan in plans)
        before, own = _amounts(folders, share) if progress is not None else (0, 0)
        done = 0
        try:
            for result in results:
                if result is not None:
                    held = share.held(result.segment)
                    for number in result.records:
                        folders[number].note(result, number, held)
                        waiting += held
                        done += held
                now = time.perf_counter()
                if waiting >= SYNC_BYTES or (waiting and now - synced >= SYNC_SECONDS):
                    for each in folders:
                        each.sync()
                    waiting, synced = 0, time.perf_counter()
                if several and now - looked >= 1:
                    if (jobs[0].partial / STOP).exists():
                        return
                    looked = now
                if progress is not None:  # assumes that all ranks are equally far
                    progress(before + done * (total - before) // max(own, 1), total)
        except Exception:
            if several:
                with suppress(OSError):
                    (jobs[0].partial / STOP).touch()
            raise
    for each in folders:
        each.sync()
    if progress is not None:
        progress(total, total)


def _todo(folders: Sequence[_OutputFolder], share: Share) -> Iterator[Task]:
    """Yield the segments of a share that some folders lack, and the indices of these folders."""
    for segment in segments(share.plan):
        lacking = [number for number, each in enumerate(folders) if not each.finished[segment.index]]
        if lacking and share.held(segment):
            yield segment, lacking


def _amounts(folders: Sequence[_OutputFolder], share: Share) -> tuple[int, int]:
    """Return the bytes that earlier processes finished, and the bytes this share has yet to write."""
    plan, before, own = share.plan, 0, 0
    for segment in segments(plan):
        finished = sum(bool(each.finished[segment.index]) for each in folders)
        before += finished * plan.items[segment.item].bytes_written(segment.count)
        own += (len(folders) - finished) * share.held(segment)
    return before, own


def _finish_folders(
    jobs: Sequence[Job],
    recipes: Sequence[bytes],
    folders: Sequence[_OutputFolder],
    parts: Sequence[Sequence[Part]],
    ranks: Ranks,
) -> None:
    """Collect the results of all ranks on rank 0, and read the files back."""
    if ranks.rank == 0:
        with errors_of(jobs):
            for folder, recipe, *of_ranks in zip(folders, recipes, *parts, strict=True):
                _finish_folder(folder, recipe, of_ranks)


def _finish_folder(folder: _OutputFolder, recipe: bytes, parts: Sequence[Part]) -> None:
    job, partial = folder.job, folder.job.partial
    reads, writes, halves = zip(*parts, strict=True)
    job.read, job.written = sum(reads), sum(writes)
    shared = np.concatenate(halves)
    if len(shared):  # all their parts are on the disk now
        folder.journal.append(shared)
        folder.record(shared)
    folder.record(journal.take_in(partial, folder.journal, recipe, len(folder.finished)))
    lost = int(np.count_nonzero(~folder.finished))
    if lost:
        raise OutputError(
            f"{lost} of the {len(folder.finished)} pieces of {shown(partial)} are in no rank's journal; run the same"
            " command again to write them"
        )
    for file in job.plan.files:
        _read_back(partial, file.name, job.plan)


def _own_size(path: Path) -> int:
    """Return the size of a regular file with a single hard link; -1 for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else -1


def _read_back(partial: Path, name: str, plan: Plan) -> None:
    """Check that a written file parses to the planned names, dtypes, shapes and offsets."""
    expected = {out.name: out for item in plan.items for out in item.outs if out.file == name}
    file = in_part(open_tensorfile(partial / name, name))
    if {tensor.name: tensor for tensor in file.tensors} != expected:
        raise OutputError(f"{partial / name} does not read back as planned; check the disk and merge again")
