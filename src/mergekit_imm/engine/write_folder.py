"""Write plans into folders: stream the tensors, write the side files, publish each folder once it is complete."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..checkpoint.model_files import WEIGHTS
from ..checkpoint.reader import check_inputs
from ..common.messages import first_few, shown
from ..common.notes import note
from ..common.progress import Progress
from ..errors import ArgumentError, ChangedError, CheckpointError, MismatchError, NonFiniteError, OutputError
from ..numerics.devices import Device, pick_device
from ..options.options import RunOptions
from ..options.recipe import STATEMENT_FILE, differences, read_recipe, to_json, without_places
from ..output import direct_io, journal, paths, publish
from ..output.write_errors import lack_of_space, output_errors
from ..plan.make_plan import recipes_of
from ..plan.plan import Plan, same_place
from ..plan.resolution import note_if_rounded
from ..plan.unchanged import note_if_unchanged, note_of
from ..ranks.ranks import ALONE, Ranks, check_same, on_leader, together
from .job import Job
from .provenance import file_digests, statement
from .report import MergeReport, statistics, written_files
from .stream import stream
from .verify import MERGE_AGAIN, compare_folder
from .workers import Also


def write(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    options: RunOptions,
    *,
    ranks: Ranks = ALONE,
    began: float,
    also: Also | None = None,
) -> list[MergeReport]:
    """Execute plans with the same inputs, or only report what they would do (dry run); return a report for each.

    Complete outputs are left alone, unfinished ones resumed. Inputs are read once for all plans. `began` is when
    planning began (time.perf_counter). Raises MergeError.
    """
    jobs = together(ranks, lambda: _jobs(plans, outs, options, began))
    if not jobs[0].recipe:  # a dry run on a hub id
        return [job.report("dry run", lack_of_space({each.out: each.needed for each in jobs})) for job in jobs]
    check_same(ranks, [job.recipe for job in jobs])
    if options.dry_run:
        for job in jobs:
            job.notes += note_if_unchanged(job.plan.models, job.plan.items)
    whole, lacking, recipes = on_leader(ranks, lambda: _check_outputs(jobs, options))
    for job, recipe in zip(jobs, recipes, strict=True):
        job.recipe = recipe
    left = [job for job, done in zip(jobs, whole, strict=True) if not done]
    rounded = on_leader(ranks, lambda: [note_if_rounded(job.plan.models, job.plan.items) for job in left])
    for job, notes in zip(left, rounded, strict=True):
        job.notes += notes
    if not options.dry_run and (left or options.verify or options.digests):
        device = together(ranks, lambda: pick_device(options.device))
        if left:
            _build(left, device, options, ranks, also)
        done = [job for job in jobs if job not in left]
        if options.verify:
            _verify(done, device, options.progress, ranks)
        if options.digests:
            on_leader(ranks, lambda: _write_statements(done))
    status = "dry run" if options.dry_run else "merged"
    return [job.report(status, lacking) if job in left else job.report("already merged") for job in jobs]


def checked_outs(out: str, names: Sequence[str]) -> list[Path]:
    """Return the output folders. Raises OutputError for one that cannot be created, ArgumentError for two alike."""
    outs = [paths.expanded(name) for name in names]
    for each in outs:
        paths.check_name(each)
        publish.check_marker(each)
    if len({each.resolve() for each in outs}) < len(outs):
        raise ArgumentError(f"two merges would go to one folder; give an output that {shown(out)} names once for each")
    return outs


def check_apart(outs: Sequence[Path], inputs: Mapping[str, Path]) -> None:
    """Raise OutputError for an output that would touch an input; `inputs` maps labels to files or folders."""
    for each in outs:
        paths.check_place(each, inputs)


def _jobs(plans: Sequence[Plan], outs: Sequence[Path], options: RunOptions, began: float) -> list[Job]:
    """Return jobs with their recipes; without, in a dry run on a hub id, which has no files to fingerprint."""
    unread = any(each.folder is None for each in plans[0].models.values())
    recipes: list[dict[str, Any]] = [{} for _ in plans] if unread else recipes_of(plans)
    return [Job(*each, options, began) for each in zip(plans, recipes, outs, strict=True)]


def _check_outputs(jobs: Sequence[Job], options: RunOptions) -> tuple[list[bool], str, list[dict[str, Any]]]:
    """Return which outputs are complete, the space the others lack, and all recipes, with paths as first given."""
    whole = []
    for job in jobs:
        if not options.dry_run:
            with output_errors(job.out):
                publish.repair(job.out)
        _take_begun(job)
        whole.append(paths.is_whole(job.out, to_json(job.recipe), job.whole))
    left = [job for job, done in zip(jobs, whole, strict=True) if not done]
    for job in left:
        if paths.is_occupied(job.out):
            if models := _models_inside(job):
                cure = f"--overwrite would delete {'them' if len(models) > 1 else 'it'}; give another output"
                raise OutputError(f"output {shown(job.out)} holds other models, {first_few(models, ', ')}: {cure}")
            if not options.overwrite:
                cure = "give another, or --overwrite, which deletes all of it"
                raise OutputError(f"output {shown(job.out)} exists and {_what_is_there(job)}; {cure}")
        if not options.restart:
            check_unfinished(job.partial, job.recipe)
    lacking = lack_of_space({job.out: job.needed for job in left})
    if lacking and not options.dry_run:
        raise OutputError(lacking)
    return whole, lacking, [job.recipe for job in jobs]


def _what_is_there(job: Job) -> str:
    """Describe an output that is not this merge."""
    try:
        found = read_recipe(job.out)
    except CheckpointError:
        found = None
    changes = differences(without_places(found), without_places(job.recipe)) if found else []
    if changes:
        return f"holds another merge ({first_few(changes)})"
    if found:
        return "lacks files of this merge"
    holds = sorted(f"{each.name}/" if each.is_dir() else each.name for each in job.out.iterdir())
    return f"is not empty ({first_few([shown(each) for each in holds], ', ')})"


def _models_inside(job: Job) -> list[str]:
    """Return the sub-folders of an output that hold weights but no part of this model: checkpoints of a training."""
    parts = {path.partition("/")[0] for path in job.whole}
    folders = sorted(each for each in job.out.iterdir() if each.is_dir() and each.name not in parts)
    return [f"{shown(each.name)}/" for each in folders if any(path.suffix in WEIGHTS for path in each.rglob("*"))]


def _build(jobs: Sequence[Job], device: Device, options: RunOptions, ranks: Ranks, also: Also | None) -> None:
    """Create each job's folder from its plan, or resume an unfinished one.

    With `verify`, everything is recomputed and compared before a folder appears. Rank 0 creates, locks and publishes
    the folders; all ranks write into them. Raises OutputError, VerifyError, and what `stream` raises. OUT.partial
    stays for the next attempt, unless an input was refused.
    """
    bytes_to_write = sum(job.plan.bytes_to_write for job in jobs)
    total = bytes_to_write * (1 + options.verify + options.digests)

    def advance(done: int, _: int) -> None:
        if options.progress is not None:
            options.progress(done, total)

    with ExitStack() as stack:
        unwritten = on_leader(ranks, lambda: _lock_folders(jobs, stack))
        to_write = [jobs[number] for number in unwritten]
        try:
            stream(to_write, device, advance, ranks, also)
            on_leader(ranks, lambda: _write_beside(jobs, to_write))
            together(ranks, lambda: check_inputs(jobs[0].plan.models))  # by now their side files were read too
        except (NonFiniteError, MismatchError, ChangedError):
            if ranks.rank == 0:
                for job in jobs:
                    with job.errors():
                        journal.empty(job.partial)
            raise
        if options.verify:
            _verify(jobs, device, lambda done, _: advance(bytes_to_write + done, 0), ranks)
        if options.digests:
            on_leader(ranks, lambda: _write_statements(jobs, lambda done: advance(total - bytes_to_write + done, 0)))
        on_leader(ranks, lambda: _publish(jobs))


def _lock_folders(jobs: Sequence[Job], stack: ExitStack) -> list[int]:
    """Create and lock every OUT.partial; return the indices of those to be written."""
    # Sorted, so that of two sweeps over the same outputs one gets all the locks.
    for job in sorted(jobs, key=lambda job: str(job.partial.absolute())):
        with job.errors():
            created = direct_io.make_folder(job.partial)
            if stack.enter_context(paths.locked(job.partial)) is None:
                text = "the filesystem of {out} has no locks: make sure that nothing else merges there"
                job.notes.append(note("no locks", text, out=shown(job.out)))
            stack.callback(_remove_empty, {job.partial, *created})
            if paths.is_occupied(job.out) and not job.options.overwrite:  # checked again, now under the lock
                raise OutputError(
                    f"output {shown(job.out)} was not there when the merge began, and now it is; run the same command"
                    " again"
                )
            if job.options.restart:
                journal.empty(job.partial)
            check_unfinished(job.partial, job.recipe)
    return [
        number
        for number, job in enumerate(jobs)
        if (job.partial / journal.JOURNAL).exists() or not paths.is_whole(job.partial, to_json(job.recipe), job.whole)
    ]


def _write_beside(jobs: Sequence[Job], written: Sequence[Job]) -> None:
    """Write all files beside the safetensors files; the recipe last, as it marks a complete folder."""
    for job in jobs:
        with job.errors():
            _remove_foreign(job)
            if job not in written:
                continue
            assert job.records is not None
            found = statistics(job.plan, job.records)
            models = job.plan.models
            if found.get("sft_equals_start") and not same_place(models["base"], models["sft"]):
                job.notes.append(note_of(models, "the norms of all deltas are 0"))
            for path, (_, source) in job.plan.side.items():
                assert source is not None
                direct_io.copy_file(source, job.partial / path)
            for path, content in written_files(job.plan, job.recipe, found).items():
                direct_io.write_file(job.partial / path, content)


def _write_statements(jobs: Sequence[Job], advance: Callable[[int], None] = lambda _: None) -> None:
    """Hash the files of each folder, published or not, and write its statement; tell `advance` of the bytes."""
    before = 0

    def add(size: int) -> None:
        nonlocal before
        before += size
        advance(min(before, sum(job.plan.bytes_to_write for job in jobs)))

    for job in jobs:
        with job.errors():
            folder = job.partial if job.partial.is_dir() else job.out
            job.digests = file_digests(folder, job.whole, workers=job.workers, advance=add)
            path, content = folder / STATEMENT_FILE, to_json(statement(job.recipe, job.digests))
            if path.exists() and path.read_bytes() != content:
                raise OutputError(
                    f"{shown(path)} is not the statement of what {shown(folder)} holds; `imm-verify {shown(job.out)}`"
                    f" tells whether the merge is as it was: if so remove the statement, else {MERGE_AGAIN}"
                )
            if not path.exists():
                direct_io.replace_file(path, content)


def _publish(jobs: Sequence[Job]) -> None:
    """Move each OUT.partial to OUT."""
    for job in jobs:
        with job.errors():
            publish.publish(job.out, replace=job.options.overwrite)


def _remove_empty(folders: set[Path]) -> None:
    """Remove those of the created folders that are still empty."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def _take_begun(job: Job) -> None:
    """Take the recipe of OUT or OUT.partial if it is this merge's.

    The two may spell the input paths differently; the bytes must be those of the command that began the merge.
    """
    for folder in (job.out, *(() if job.options.restart else (job.partial,))):
        try:
            found = journal.unfinished(folder) or read_recipe(folder)
        except CheckpointError:
            continue
        if found is not None and without_places(found) == without_places(job.recipe):
            places = {role: str(entry["path"]) for role, entry in found["inputs"].items()}
            models = {role: dataclasses.replace(each, ref=places[role]) for role, each in job.plan.models.items()}
            job.plan, job.recipe = dataclasses.replace(job.plan, models=models), found
            return


def _remove_foreign(job: Job) -> None:
    """Remove what is not part of this merge from OUT.partial: links, copies of files that the inputs no longer have."""
    own = {*job.whole, journal.JOURNAL}
    for path in sorted(job.partial.rglob("*"), reverse=True):
        name = str(path.relative_to(job.partial))
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()  # if empty
        elif path.is_symlink() or name not in own:
            path.unlink(missing_ok=True)


def _verify(jobs: Sequence[Job], device: Device, progress: Progress | None, ranks: Ranks) -> None:
    """Recompute folders, published or not, and compare every byte."""
    total, before = sum(job.plan.bytes_to_write for job in jobs), 0
    for job in jobs:
        began = time.perf_counter()

        def advance(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        folder, cure = job.partial, "memory or disk has failed; merge again with --restart"
        if not folder.is_dir():
            folder, cure = job.out, MERGE_AGAIN
        found = compare_folder(
            job.plan, job.recipe, folder, workers=job.workers, device=device, progress=advance, cure=cure, ranks=ranks
        )
        foreign = [name for name in found.not_of_the_merge if name != journal.JOURNAL]
        if foreign and folder == job.partial:
            raise OutputError(f"{shown(folder / foreign[0])} is not part of the merge; {cure}")
        job.verified = time.perf_counter() - began
        before += job.plan.bytes_to_write
        advance(job.plan.bytes_to_write, 0)


def check_unfinished(partial: Path, recipe: Mapping[str, Any]) -> None:
    """Raise OutputError if OUT.partial holds anything but this merge."""
    if not paths.is_occupied(partial):
        return
    found = journal.unfinished(partial)
    if found is None:
        if [entry.name for entry in partial.iterdir()] == [journal.JOURNAL + ".new"]:
            return  # killed before anything else was written
        if paths.is_whole(partial, to_json(recipe), {}):
            return
        raise OutputError(
            f"{shown(partial)} exists and is not an unfinished merge; move it away, or --restart, which empties it"
        )
    changes = differences(without_places(found), without_places(recipe))
    if changes:
        raise OutputError(
            f"{shown(partial)} is an unfinished merge of another recipe ({first_few(changes)});"
            " finish that one, or --restart to start over"
        )
