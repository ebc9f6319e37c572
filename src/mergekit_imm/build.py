"""From a plan to a folder: stream the tensors, keep the journal, write what stands beside them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import output
from .checkpoint.tensorfile import TensorInfo, open_tensorfile
from .errors import MismatchError, NonFiniteError, OutputError, bytes_text, shown
from .execute import BUFFER, BUFFERS, Merge, Progress, run
from .plan import Plan, segments
from .recipe import CARD_FILE, RECIPE_FILE, REPORT_FILE, MergeReport, to_json
from .report import actions, kinds, model_card, statistics

Records = npt.NDArray[np.float64]  # one row for each segment of a plan

SYNC_BYTES, SYNC_SECONDS = 512 << 20, 5.0
INTERPRETER = 150 << 20  # measured on 1.5 B parameters: Python, numpy, numba, the compiled kernel
PER_TENSOR = 1024


class Job:
    """A plan under way: where it goes, and what is counted on the way for the report."""

    def __init__(self, plan: Plan, out: Path, workers: int, device: str, began: float) -> None:
        self.plan, self.out, self.workers, self.device = plan, out, workers, device
        self.began, self.planned = began, time.perf_counter()
        self.streamed: float | None = None
        self.read = self.written = 0
        self.notes = list(plan.notes)
        self.sizes = {file.name: file.size for file in plan.files}
        self.free = output.free_space(out)
        held = sum(_blocks(output.partial_of(out) / file.name) for file in plan.files)
        sides = sum(path.stat().st_size for _, path in plan.side.values() if path is not None)
        self.needed = max(0, plan.bytes_to_write + sides - held)

    def check_space(self) -> None:
        """Raise OutputError unless the output fits on its disk."""
        if self.needed > self.free:
            raise OutputError(
                f"output {shown(self.out)} needs {bytes_text(self.needed)} and its disk has"
                f" {bytes_text(self.free)} free; free some space or give an OUT on another disk"
            )

    def report(self, status: str) -> MergeReport:
        """Return what was done, or would be."""
        now = time.perf_counter()
        tensors = sum(len(each.tensors) for each in self.plan.inputs.values())
        seconds = {"plan": self.planned - self.began, "total": now - self.began}
        if self.streamed is not None:
            seconds["stream"] = self.streamed
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
            memory=INTERPRETER + _buffers(self.workers) + PER_TENSOR * tensors,
            workers=self.workers,
            device=self.device,
            seconds={key: round(value, 6) for key, value in seconds.items()},
            kinds=kinds(self.plan),
            config_changes=dict(self.plan.config_changes),
            side_files=side,
            left_out={r: list(each.left_out) for r, each in self.plan.inputs.items() if each.left_out and r != "start"},
            notes=self.notes,
        )


def build(job: Job, recipe: Mapping[str, Any], merge: Merge, *, restart: bool, progress: Progress | None) -> None:
    """Make `job.out` from its plan, or go on with what an earlier process began.

    Raises OutputError and what `run` raises. OUT.partial stays for the next try, unless an input was refused.
    """
    plan, partial = job.plan, output.partial_of(job.out)
    with ExitStack() as stack:
        stack.enter_context(output.output_errors(job.out))
        parents = [folder for folder in partial.parents if not folder.exists()]
        partial.mkdir(parents=True, exist_ok=True)
        stack.enter_context(output.locked(partial))
        if restart:
            _empty(partial)
        recipe_bytes = to_json(recipe)
        if (partial / output.JOURNAL).exists() or not output.is_whole(partial, recipe_bytes, job.sizes):
            try:
                records = _stream(job, partial, recipe_bytes, merge, progress)
            except (NonFiniteError, MismatchError):
                shutil.rmtree(partial)
                for folder in parents:
                    with suppress(OSError):
                        folder.rmdir()
                raise
            _write_side(plan, partial, recipe, records)
        output.publish(job.out)


def _buffers(workers: int) -> int:
    return min(BUFFER * workers, BUFFERS)


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def check_unfinished(partial: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to build over something that is not this very merge."""
    if not output.is_occupied(partial):
        return
    found = output.unfinished(partial)
    if found is None:
        if [entry.name for entry in partial.iterdir()] == [output.JOURNAL + ".new"]:
            return  # cut off before anything else was written
        if output.is_whole(partial, to_json(recipe), {}):
            return
        raise OutputError(
            f"{shown(partial)} is there and is not a merge under way; remove it, or --restart to build over it"
        )
    changes = output.differences(found, recipe)
    if changes:
        raise OutputError(
            f"{shown(partial)} is an unfinished merge of another recipe ({'; '.join(changes[:3])}"
            f"{'; …' if len(changes) > 3 else ''}); finish that one, or --restart to begin anew"
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _stream(job: Job, partial: Path, recipe: bytes, merge: Merge, progress: Progress | None) -> Records:
    """Write the safetensors files, or what is missing of them; return the records of all segments."""
    plan = job.plan
    began = time.perf_counter()
    total = sum(item.segment_count for item in plan.items)
    if (partial / output.JOURNAL).exists() and (
        output.segments_planned(partial) != total or any(_size(partial / file.name) != file.size for file in plan.files)
    ):
        job.notes.append("note: the unfinished merge has lost files or was cut otherwise; beginning anew")
        _empty(partial)
    journal = output.Journal(partial, recipe, total)
    records = np.zeros((total, 5))
    finished = np.zeros(total, bool)
    finished[journal.entries["segment"]] = True
    records[journal.entries["segment"]] = journal.entries["record"]
    with ExitStack() as stack:
        stack.callback(journal.close)
        handles: dict[str, int] = {}
        for file in plan.files:
            handles[file.name] = os.open(partial / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, handles[file.name])
            output.allocate(handles[file.name], file.size)
            output.write_all(handles[file.name], file.head, 0)
            job.written += len(file.head)

        def sink(tensor: TensorInfo, first: int, piece: memoryview) -> None:
            with output.output_errors(partial / tensor.file):
                output.write_all(handles[tensor.file], piece, tensor.begin + first)

        pending: list[tuple[int, npt.NDArray[np.float64]]] = []
        waiting, synced = 0, time.perf_counter()
        dirty = set(handles)

        def sync() -> None:
            nonlocal waiting, synced
            for name in sorted(dirty):
                output.sync(handles[name])
            dirty.clear()
            entries = np.zeros(len(pending), output.ENTRY)
            for entry, (index, record) in zip(entries, pending, strict=True):
                entry["segment"], entry["record"] = index, record
            if pending:
                journal.append(entries)
            pending.clear()
            waiting, synced = 0, time.perf_counter()

        todo = (segment for segment in segments(plan) if not finished[segment.index])
        done = _bytes_done(plan, finished)
        # Closed before the files are, whatever happens: a worker must not write to a descriptor that is another's.
        results = stack.enter_context(closing(run(plan, todo, sink, workers=job.workers, merge=merge)))
        for result in results:
            if result is not None:
                records[result.segment.index] = result.record
                pending.append((result.segment.index, result.record))
                dirty.update(out.file for out in plan.items[result.segment.item].outs)
                waiting += result.bytes_written
                done += result.bytes_written
                job.read += result.bytes_read
                job.written += result.bytes_written
            if waiting >= SYNC_BYTES or (waiting and time.perf_counter() - synced >= SYNC_SECONDS):
                sync()
            if progress is not None:
                progress(done, plan.bytes_to_write)
        sync()
        if progress is not None:
            progress(plan.bytes_to_write, plan.bytes_to_write)
    job.streamed = time.perf_counter() - began
    for file in plan.files:
        _read_back(partial / file.name, plan)
    return records


def _bytes_done(plan: Plan, finished: npt.NDArray[np.bool_]) -> int:
    if not finished.any():
        return 0
    return sum(plan.items[s.item].bytes_written(s.count) for s in segments(plan) if finished[s.index])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read_back(path: Path, plan: Plan) -> None:
    """Check that a written file is what other programs will read: names, dtypes, shapes, offsets."""
    file = open_tensorfile(path, path.name)
    expected = {out.name: out for item in plan.items for out in item.outs if out.file == path.name}
    if {tensor.name: tensor for tensor in file.tensors} != expected:
        raise OutputError(f"{path} does not read back as it was planned; check the disk and merge again")


def _write_side(plan: Plan, folder: Path, recipe: Mapping[str, Any], records: Records) -> None:
    """Write everything beside the safetensors files; the recipe last, since its presence says: whole."""
    for path, (_, source) in plan.side.items():
        assert source is not None
        output.copy_file(source, folder / path)
    for path, content in written_files(plan, recipe, records).items():
        output.write_file(folder / path, content)


def written_files(plan: Plan, recipe: Mapping[str, Any], records: Records) -> dict[str, bytes]:
    """Return the small files that a merge writes itself, the recipe last."""
    files: dict[str, bytes] = {}
    if plan.index is not None:
        files["model.safetensors.index.json"] = plan.index
    if plan.config is not None:
        files["config.json"] = plan.config
    files[REPORT_FILE] = to_json(statistics(plan, records))
    files[CARD_FILE] = model_card(plan, recipe)
    files[RECIPE_FILE] = to_json(recipe)
    return files
