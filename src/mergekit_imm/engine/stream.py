"""Stream plans into safetensors files; sync them, then record the finished segments in each folder's ledger."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from ..checkpoint.checkpoint import in_part
from ..checkpoint.safetensors_file import TensorInfo, open_tensorfile
from ..common.notes import note
from ..common.progress import Progress
from ..common.threads import when_unused
from ..errors import OutputError
from ..numerics.devices import Device
from ..options.recipe import to_json
from ..output import direct_io, journal
from ..output.write_errors import output_errors
from ..plan.plan import segments
from ..ranks.ledger import Ledger, begin
from ..ranks.ranks import Ranks, on_leader, together
from ..ranks.share import Share, share_of
from .job import Job
from .workers import Also, Done, Task, run_segments, warm_up

SYNC_BYTES, SYNC_SECONDS = 512 << 20, 5.0


class _Output:
    """An output folder in progress: its open files, and the ledger of its segments."""

    def __init__(self, job: Job, ledger: Ledger, stack: ExitStack) -> None:
        self.job, self.ledger = job, ledger
        self.files: dict[str, direct_io.Handle] = {}
        for file in job.plan.files:
            self.files[file.name] = handle = direct_io.open_output(job.partial / file.name, None)
            stack.callback(when_unused, handle.close)
        self.unsynced: set[str] = set()

    def write(self, share: Share, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        """Write the part of a piece that is in the share."""
        handle = self.files[tensor.file]
        low, high = share.clip(tensor, first, len(piece))
        if low < high:
            with output_errors(handle.path, self.job.partial):
                direct_io.write_at(handle, piece[low:high], tensor.begin + first + low)

    def note(self, done: Done, number: int, held: int) -> None:
        """Note a segment of which `held` bytes were written here."""
        self.ledger.note(done.segment.index, done.records[number], whole=held == done.bytes_written)
        self.unsynced.update(out.file for out in self.job.plan.items[done.segment.item].outs)
        self.job.written += held
        self.job.read += done.bytes_read

    def sync(self) -> None:
        """Sync written files, then record their segments."""
        with self.job.errors():
            for name in sorted(self.unsynced):
                direct_io.sync_output(self.files[name])
            self.unsynced.clear()
            self.ledger.commit()


def stream(
    jobs: Sequence[Job], device: Device, progress: Progress | None, ranks: Ranks, also: Also | None = None
) -> None:
    """Write the safetensors files of all jobs, or what they lack, from a single read of the inputs.

    Sets `records` of each job, one row per segment; they are complete on rank 0 only.
    """
    if not jobs:
        return
    began = time.perf_counter()
    with ExitStack() as stack:
        finished = on_leader(ranks, lambda: [_prepare(job, ranks) for job in jobs])

        def write() -> list[_Output]:
            outputs = []
            for job, done in zip(jobs, finished, strict=True):
                with job.errors():
                    ledger = Ledger(job.partial, to_json(job.recipe), job.plan.segment_count, done, ranks)
                    stack.callback(ledger.close)
                    outputs.append(_Output(job, ledger, stack))
            with jobs[0].errors():
                _write_share(outputs, device, progress, ranks, also)
            return outputs

        outputs = together(ranks, write)
        written = ranks.gather([(each.job.read, each.job.written, each.ledger.hand_over()) for each in outputs])

        def finish() -> None:
            for output, *of_ranks in zip(outputs, *written, strict=True):
                with output.job.errors():
                    reads, writes, parts = zip(*of_ranks, strict=True)
                    output.job.read, output.job.written = sum(reads), sum(writes)
                    output.ledger.settle(parts)
                    _read_back(output.job)

        on_leader(ranks, finish)
    for output in outputs:
        output.job.records = output.ledger.records
        output.job.streamed = time.perf_counter() - began


def _prepare(job: Job, ranks: Ranks) -> journal.Entries:
    """Create or reopen the files of a folder, preallocated, and its journals; return the finished segments."""
    plan, partial = job.plan, job.partial
    with job.errors():
        if (partial / journal.JOURNAL).exists() and (
            journal.journal_format(partial) != (journal.VERSION, plan.segment_count)
            or any(_own_size(partial / name) != size for name, size in job.sizes.items())
        ):
            if journal.has_records(partial):
                text = "the unfinished merge lost files, or another version began it; starting over"
                job.notes.append(note("starting over", text))
            journal.empty(partial)
        finished = begin(partial, to_json(job.recipe), plan.segment_count, ranks)
        for file in plan.files:
            path = partial / file.name
            direct_io.make_folder(path.parent)
            with closing(direct_io.open_output(path, file.size)) as handle:
                direct_io.write_at(handle, memoryview(file.head), 0)
                direct_io.sync_output(handle)  # before another machine writes after it
            job.written += len(file.head)
        for folder in {partial, *((partial / name).parent for name in job.sizes)}:
            direct_io.sync_folder(folder)  # a record is useless if its file is not in the folder after a crash
    return finished


def _write_share(
    outputs: Sequence[_Output], device: Device, progress: Progress | None, ranks: Ranks, also: Also | None
) -> None:
    """Write this rank's share, until it is done or another rank has failed."""
    plans, ledger = [each.job.plan for each in outputs], outputs[0].ledger
    share = share_of(plans[0], [each.ledger.finished for each in outputs], ranks)
    warm_up(plans, device)

    def sink(number: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        outputs[number].write(share, tensor, first, piece)

    total = sum(plan.bytes_to_write for plan in plans)
    before, own = _amounts(outputs, share) if progress is not None else (0, 0)
    done = waiting = 0
    synced = looked = time.perf_counter()
    results = run_segments(plans, _todo(outputs, share), sink, workers=outputs[0].job.workers, device=device, also=also)
    try:
        with closing(results):  # the workers stop before the files close: a descriptor may be reused
            for result in results:
                if result is not None:
                    held = share.held(result.segment)
                    for number in result.records:
                        outputs[number].note(result, number, held)
                        waiting += held
                        done += held
                now = time.perf_counter()
                if waiting >= SYNC_BYTES or (waiting and now - synced >= SYNC_SECONDS):
                    for each in outputs:
                        each.sync()
                    waiting, synced = 0, time.perf_counter()
                if now - looked >= 1:
                    if ledger.is_stopped():
                        return
                    looked = now
                if progress is not None:  # assumes that all ranks are equally far
                    progress(before + done * (total - before) // max(own, 1), total)
        for each in outputs:
            each.sync()
    except BaseException:  # a signal too
        ledger.stop_others()
        raise
    if progress is not None:
        progress(total, total)


def _todo(outputs: Sequence[_Output], share: Share) -> Iterator[Task]:
    """Yield the segments of a share that some outputs lack, and the indices of these outputs."""
    for segment in segments(share.plan):
        lacking = [number for number, each in enumerate(outputs) if not each.ledger.finished[segment.index]]
        if lacking and share.held(segment):
            yield segment, lacking


def _amounts(outputs: Sequence[_Output], share: Share) -> tuple[int, int]:
    """Return the bytes that earlier processes finished, and the bytes this share has yet to write."""
    plan, before, own = share.plan, 0, 0
    for segment in segments(plan):
        finished = sum(bool(each.ledger.finished[segment.index]) for each in outputs)
        before += finished * plan.items[segment.item].bytes_written(segment.count)
        own += (len(outputs) - finished) * share.held(segment)
    return before, own


def _own_size(path: Path) -> int:
    """Return the size of a regular file with a single hard link; -1 for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else -1


def _read_back(job: Job) -> None:
    """Check that the written files parse to the planned names, dtypes, shapes and offsets."""
    for name in job.sizes:
        expected = {out.name: out for item in job.plan.items for out in item.outs if out.file == name}
        file = in_part(open_tensorfile(job.partial / name, name))
        if {tensor.name: tensor for tensor in file.tensors} != expected:
            raise OutputError(f"{job.partial / name} does not read back as planned; check the disk and merge again")
