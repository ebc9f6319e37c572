"""From plans to folders: stream the tensors, write what stands beside them, let the folders appear."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .checkpoint import disk, output
from .errors import MismatchError, NonFiniteError, OutputError, shown
from .execute import Device, Progress
from .plan import Plan
from .recipe import CARD_FILE, RECIPE_FILE, REPORT_FILE, to_json
from .report import model_card, statistics
from .stream import Job, Recipe, Records, empty, stream


def build(
    jobs: Sequence[Job], recipes: Sequence[Recipe], device: Device, *, restart: bool, progress: Progress | None
) -> None:
    """Make each job's folder from its plan, or go on with what an earlier process began; inputs are read once for all.

    Raises OutputError and what `run` raises. OUT.partial stays for the next try, unless an input was refused.
    """
    with ExitStack() as stack:
        parents: list[Path] = []
        for job in jobs:
            stack.enter_context(output.output_errors(job.out))
            parents += [folder for folder in job.partial.parents if not folder.exists()]
            job.partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(output.locked(job.partial))
            if restart:
                empty(job.partial)
        unwritten = [
            (job, recipe)
            for job, recipe in zip(jobs, recipes, strict=True)
            if (job.partial / output.JOURNAL).exists() or not output.is_whole(job.partial, to_json(recipe), job.sizes)
        ]
        try:
            records = stream([job for job, _ in unwritten], [to_json(each) for _, each in unwritten], device, progress)
        except (NonFiniteError, MismatchError):
            for job in jobs:
                shutil.rmtree(job.partial)
            for folder in sorted(parents, key=lambda folder: len(folder.parts), reverse=True):
                with suppress(OSError):
                    folder.rmdir()
            raise
        for (job, recipe), each in zip(unwritten, records, strict=True):
            _write_side(job.plan, job.partial, recipe, each)
        for job in jobs:
            with output.output_errors(job.out):
                output.publish(job.out)


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


def _write_side(plan: Plan, folder: Path, recipe: Mapping[str, Any], records: Records) -> None:
    """Write everything beside the safetensors files; the recipe last, since its presence says: whole."""
    for path, (_, source) in plan.side.items():
        assert source is not None
        disk.copy_file(source, folder / path)
    for path, content in written_files(plan, recipe, records).items():
        disk.write_file(folder / path, content)


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
