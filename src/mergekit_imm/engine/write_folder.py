"""Write plans into folders: stream the tensors, write the side files, publish each folder once it is complete."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..checkpoint.reader import check_inputs
from ..common.messages import first_few, shown
from ..common.notes import note
from ..errors import ArgumentError, ChangedError, CheckpointError, MismatchError, NonFiniteError, OutputError
from ..options.options import Progress, RunOptions
from ..options.recipe import differences, read_recipe, to_json, without_places
from ..output import direct_io, journal, paths
from ..output import publish as swap
from ..plan.make_plan import recipes_of
from ..plan.plan import Plan
from ..plan.unchanged import is_unchanged, note_if_unchanged, note_of
from ..ranks.ranks import ALONE, Ranks, check_same, together
from .job import Job, errors_of, lack_of_space
from .report import MergeReport, written_files
from .stream import Recipe, Records, stream
from .verify import compare_folder
from .workers import Device, pick_device


def write(
    plans: Sequence[Plan], outs: Sequence[Path], options: RunOptions, *, ranks: Ranks = ALONE, began: float
) -> list[MergeReport]:
    """Execute plans with the same inputs, or only report what they would do (dry run); return a report for each.

    Complete outputs are left alone, unfinished ones resumed. Inputs are read once for all plans. `began` is when
    planning began (time.perf_counter). Raises MergeError.
    """
    jobs, recipes = together(ranks, lambda: _jobs(plans, outs, options, began))
    check_same(ranks, recipes)
    if options.dry_run:
        for job in jobs:
            job.notes += note_if_unchanged(job.plan.inputs, job.plan.items)
    if not recipes:
        return [job.report("dry run", lack_of_space(jobs)) for job in jobs]
    whole, lacking, recipes = ranks.gather(together(ranks, lambda: _check_outputs(jobs, recipes, options, ranks)))[0]
    pairs = list(zip(jobs, recipes, strict=True))
    there = [pair for pair, done in zip(pairs, whole, strict=True) if done]
    left = [pair for pair, done in zip(pairs, whole, strict=True) if not done]
    if not options.dry_run and (left or options.verify):
        device = together(ranks, lambda: pick_device(options.device))
        if left:
            _build(left, device, options, ranks)
        if options.verify:
            _verify_folders(there, device, options.progress, ranks)
    done = "dry run" if options.dry_run else "merged"
    return [
        job.report("already merged") if w else job.report(done, lacking) for job, w in zip(jobs, whole, strict=True)
    ]


def checked_outs(out: str, names: Sequence[str]) -> list[Path]:
    """Return the output folders. Raises OutputError for one that cannot be created, ArgumentError for two alike."""
    outs = [paths.expanded(name) for name in names]
    for each in outs:
        paths.check_name(each)
        swap.check_marker(each)
    if len({each.resolve() for each in outs}) < len(outs):
        raise ArgumentError(f"two merges would go to one folder; give an output that {shown(out)} names once for each")
    return outs


def check_apart(outs: Sequence[Path], inputs: Mapping[str, Path]) -> None:
    """Raise OutputError for an output that would touch an input; `inputs` maps labels to files or folders."""
    for each in outs:
        paths.check_place(each, inputs)


def _jobs(
    plans: Sequence[Plan], outs: Sequence[Path], options: RunOptions, began: float
) -> tuple[list[Job], list[dict[str, Any]]]:
    """Return jobs and their recipes; no recipes in a dry run on a hub id, which has no files to fingerprint."""
    jobs = [Job(plan, out, options, began) for plan, out in zip(plans, outs, strict=True)]
    unread = any(each.folder is None for each in plans[0].inputs.values())
    return jobs, [] if unread else recipes_of(plans)


def _check_outputs(
    jobs: Sequence[Job], recipes: Sequence[dict[str, Any]], options: RunOptions, ranks: Ranks
) -> tuple[list[bool], str, list[dict[str, Any]]]:
    """Return which outputs are complete, the space the others lack, and all recipes, with paths as first given."""
    if ranks.rank:
        return [], "", []
    if not options.dry_run:
        for job in jobs:
            with paths.output_errors(job.out):
                swap.repair(job.out)
    begun = [recipe_as_begun(job, each) for job, each in zip(jobs, recipes, strict=True)]
    whole = [paths.is_whole(job.out, to_json(each), job.whole) for job, each in zip(jobs, begun, strict=True)]
    left = [(job, each) for job, each, done in zip(jobs, begun, whole, strict=True) if not done]
    for job, each in left:
        if paths.is_occupied(job.out) and not options.overwrite:
            there = _what_is_there(job.out, each)
            raise OutputError(f"output {shown(job.out)} exists and {there}; give another, or --overwrite")
        if not options.restart:
            check_unfinished(job.partial, each)
    lacking = lack_of_space([job for job, _ in left])
    if lacking and not options.dry_run:
        raise OutputError(lacking)
    return whole, lacking, begun


def _what_is_there(out: Path, recipe: Mapping[str, Any]) -> str:
    """Describe an output that is not this merge."""
    try:
        found = read_recipe(out)
    except CheckpointError:
        found = None
    changes = differences(without_places(found), without_places(recipe)) if found else []
    if changes:
        return f"holds another merge ({first_few(changes)})"
    return "lacks files of this merge" if found else "is not empty"


def _build(pairs: Sequence[tuple[Job, Recipe]], device: Device, options: RunOptions, ranks: Ranks) -> None:
    """Create each job's folder from its plan, or resume an unfinished one.

    With `verify`, everything is recomputed and compared before a folder appears. Rank 0 creates, locks and publishes
    the folders; all ranks write into them. Raises OutputError, VerifyError, and what `stream`
    raises. OUT.partial stays for the next attempt, unless an input was refused.
    """
    jobs, recipes = [job for job, _ in pairs], [recipe for _, recipe in pairs]
    progress = options.progress
    bytes_to_write = sum(job.plan.bytes_to_write for job in jobs)
    total = bytes_to_write * (2 if options.verify else 1)

    def advance(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        unwritten = ranks.gather(together(ranks, lambda: _lock_folders(pairs, ranks, stack)))[0]
        try:
            recipes_left = [to_json(recipes[number]) for number in unwritten]
            records = stream([jobs[number] for number in unwritten], recipes_left, device, advance, ranks)
            together(ranks, lambda: _complete_folders(pairs, unwritten, records, ranks))
        except (NonFiniteError, MismatchError, ChangedError):
            if ranks.rank == 0:
                with errors_of(jobs):
                    for job in jobs:
                        journal.empty(job.partial)
            raise
        if options.verify:
            _verify_folders(pairs, device, lambda done, _: advance(bytes_to_write + done, 0), ranks)
        together(ranks, lambda: _publish_folders(jobs, ranks))


def _lock_folders(pairs: Sequence[tuple[Job, Recipe]], ranks: Ranks, stack: ExitStack) -> list[int]:
    """Create and lock every OUT.partial on rank 0; return the indices of those to be written."""
    if ranks.rank:
        return []
    # Sorted, so that two sweeps over the same outputs cannot deadlock.
    for job, recipe in sorted(pairs, key=lambda pair: str(pair[0].partial.absolute())):
        with errors_of([job]):
            created = direct_io.make_folder(job.partial)
            if stack.enter_context(paths.locked(job.partial)) is None:
                text = "the filesystem of {out} has no locks: make sure that nothing else merges there"
                job.notes.append(note("no locks", text, out=shown(job.out)))
            stack.callback(_remove_empty, {job.partial, *created})
            _recheck(job, recipe)
    return [number for number, (job, recipe) in enumerate(pairs) if _is_unwritten(job, recipe)]


def _complete_folders(
    pairs: Sequence[tuple[Job, Recipe]], unwritten: Sequence[int], records: Sequence[Records], ranks: Ranks
) -> None:
    """Write the side files on rank 0; check on every rank that no input changed meanwhile."""
    jobs = [job for job, _ in pairs]
    if ranks.rank == 0:
        with errors_of(jobs):
            for job in jobs:
                _remove_foreign(job)
            for number, each in zip(unwritten, records, strict=True):
                job, recipe = pairs[number]
                if is_unchanged(job.plan, each):
                    job.notes.append(note_of(job.plan.inputs, "the norms of all deltas are 0"))
                _write_side(job.plan, job.partial, recipe, each)
    check_inputs(jobs[0].plan.inputs)


def _publish_folders(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Move each OUT.partial to OUT, on rank 0."""
    for job in jobs if ranks.rank == 0 else ():
        with errors_of([job]):
            swap.publish(job.out, replace=job.options.overwrite)


def _remove_empty(folders: set[Path]) -> None:
    """Remove those of the created folders that are still empty."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def recipe_as_begun(job: Job, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of OUT or OUT.partial if it is this merge's, else the given one.

    The two may spell the input paths differently; the bytes must be those of the command that began the merge.
    """
    for folder in (job.out, *(() if job.options.restart else (job.partial,))):
        try:
            found = journal.unfinished(folder) or read_recipe(folder)
        except CheckpointError:
            continue
        if found is not None and without_places(found) == without_places(recipe):
            places = {role: str(entry["path"]) for role, entry in found["inputs"].items()}
            inputs = {role: dataclasses.replace(each, ref=places[role]) for role, each in job.plan.inputs.items()}
            job.plan = dataclasses.replace(job.plan, inputs=inputs)
            return found
    return recipe


def _recheck(job: Job, recipe: Recipe) -> None:
    """Check OUT and OUT.partial again, now under the lock."""
    if paths.is_occupied(job.out) and not job.options.overwrite:
        raise OutputError(
            f"output {shown(job.out)} was not there when the merge began, and now it is; run the same command again"
        )
    if job.options.restart:
        journal.empty(job.partial)
    check_unfinished(job.partial, recipe)


def _remove_foreign(job: Job) -> None:
    """Remove what is not part of this merge from OUT.partial: links, copies of files that the inputs no longer have."""
    own = {*job.whole, journal.JOURNAL}
    for path in sorted(job.partial.rglob("*"), reverse=True):
        name = str(path.relative_to(job.partial))
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()  # if empty
        elif path.is_symlink() or name not in own:
            path.unlink()


def _is_unwritten(job: Job, recipe: Recipe) -> bool:
    return (job.partial / journal.JOURNAL).exists() or not paths.is_whole(job.partial, to_json(recipe), job.whole)


def _verify_folders(
    pairs: Sequence[tuple[Job, Recipe]], device: Device, progress: Progress | None, ranks: Ranks
) -> None:
    """Recompute folders, published or not, and compare every byte."""
    total, before = sum(job.plan.bytes_to_write for job, _ in pairs), 0
    for job, recipe in pairs:
        began = time.perf_counter()

        def advance(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        _verify_folder(job, recipe, device, advance, ranks)
        job.verified = time.perf_counter() - began
        before += job.plan.bytes_to_write
        if progress is not None:
            progress(before, total)


def _verify_folder(job: Job, recipe: Recipe, device: Device, progress: Progress, ranks: Ranks) -> None:
    folder, cure = job.partial, "memory or disk has failed; merge again with --restart"
    if not folder.is_dir():
        folder, cure = job.out, "remove it and merge again"
    found = compare_folder(
        job.plan, recipe, folder, workers=job.workers, device=device, progress=progress, cure=cure, ranks=ranks
    )

    def refuse_foreign() -> None:
        foreign = [name for name in found.not_of_the_merge if name != journal.JOURNAL]
        if foreign and folder == job.partial:
            raise OutputError(f"{shown(folder / foreign[0])} is not part of the merge; {cure}")

    together(ranks, refuse_foreign)


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


def _write_side(plan: Plan, folder: Path, recipe: Mapping[str, Any], records: Records) -> None:
    """Write all files beside the safetensors files; the recipe last, as it marks a complete folder."""
    for path, (_, source) in plan.side.items():
        assert source is not None
        direct_io.copy_file(source, folder / path)
    for path, content in written_files(plan, recipe, records).items():
        direct_io.write_file(folder / path, content)
