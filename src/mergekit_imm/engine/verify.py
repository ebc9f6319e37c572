"""Recompute a merge from its recipe and compare every byte."""

from __future__ import annotations

import errno
import filecmp
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..checkpoint.safetensors_file import TensorInfo, fingerprint, read_into
from ..common.checks import as_path, why_no_folder
from ..common.display import Displayed, Summary
from ..common.messages import first_few, shown
from ..common.progress import Progress, Watched, check_progress, watched
from ..common.threads import default_workers
from ..errors import ArgumentError, CheckpointError, VerifyError
from ..numerics.devices import Device, pick_device
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.statistics import RECORD
from ..options.options import RunOptions
from ..options.recipe import (
    RECIPE_FILE,
    REPORT_FILE,
    STATEMENT_FILE,
    history_of,
    make_recipe,
    options_in,
    read_recipe,
    without_places,
)
from ..options.values import check_sample
from ..plan.make_plan import make_plans
from ..plan.open_inputs import prepared
from ..plan.plan import Inputs, Plan, segments
from ..ranks.ranks import ALONE, Ranks, on_leader, part_of_another, together
from .provenance import file_digests, stated_digests
from .report import statistics, written_files
from .workers import run_segments

MERGE_AGAIN = "remove the folder and merge again"  # a finished merge is not written again


@dataclass(frozen=True, repr=False)
class VerifyReport(Displayed):
    """What `verify` compared, all of it equal; `imm-verify --json` prints it."""

    out: str
    segments: int  # pieces of tensors recomputed
    of_segments: int  # all pieces
    bytes_compared: int
    files_compared: list[str]
    not_of_the_merge: list[str] = field(default_factory=list)  # other files in the folder

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def _summary(self) -> Summary:
        pieces = f"{self.segments} of {self.of_segments} pieces"
        line = f"{shown(self.out)} is this merge: {pieces} and {len(self.files_compared)} files compared, all equal"
        others = [f"not of the merge: {first_few([*map(shown, self.not_of_the_merge)], ', ')}"]
        return Summary(line, others if self.not_of_the_merge else ())


def verify(
    out: str | Path,
    *,
    base: str | Path | None = None,
    start: str | Path | None = None,
    sft: str | Path | None = None,
    sample: float = 1.0,
    device: str = "cpu",
    workers: int | None = None,
    progress: Watched = None,
) -> VerifyReport:
    """Recompute a merge from the recipe in its folder and compare bytes: tensors, headers and side files.

    Args:
        out: the merged folder.
        base, start, sft: where the inputs are now, if they moved. A relative path in the recipe is tried from the
            current folder, then from the parents of `out`.
        sample: share of the tensors' bytes to recompute, in random pieces of 2^20 elements; small files are always
            compared, the report only with sample=1. sample=1 finds any flipped bit in what the merge wrote.
        device, workers, progress: as in `merge_checkpoints`.

    Returns a VerifyReport. Raises VerifyError naming the first difference (tensor, element, file), CheckpointError if
    an input is gone or has changed.

    >>> verify(out_folder).files_compared[0]
    'model.safetensors'
    """
    sample = check_sample(sample)
    folder = Path(as_path("out", out, "a folder that imm-merge made")).expanduser()
    recipe = read_recipe(folder)
    if recipe is None and not folder.is_dir():
        raise CheckpointError(f"{shown(out)} {why_no_folder(folder)}; give a folder that imm-merge made")
    if recipe is None:
        raise CheckpointError(
            f"{shown(out)} has no {RECIPE_FILE}; give a folder that imm-merge made, or audit what another tool made:"
            f" `imm-verify {shown(out)} --base BASE --sft SFT`"
        )
    run_options = RunOptions(device=device, workers=workers, progress=check_progress(progress))
    given = {"base": base, "start": start, "sft": sft}
    inputs = {role: _reopen(role, entry, given[role], recipe, folder) for role, entry in recipe["inputs"].items()}
    surplus = [role for role, ref in given.items() if ref is not None and role not in inputs]
    if surplus:
        raise ArgumentError(f"--{surplus[0]} is given, but the recipe in {shown(out)} has no {surplus[0]}")
    options = options_in(recipe)
    inputs = prepared(inputs, options)
    if inputs["sft"].adapter != recipe["inputs"]["sft"].get("adapter"):
        raise CheckpointError(
            f"{inputs['sft'].label} is not what was merged: its adapter_config.json has changed; give the original with"
            " --sft"
        )
    (plan,) = make_plans(Inputs(inputs, (options,)))

    found = inputs["start"].recipe if "start" in inputs else None
    again = make_recipe(plan.options, recipe["inputs"], plan.config_changes, history_of(found))
    one, other = without_places(again), without_places(recipe)
    wrong = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    if wrong:
        raise VerifyError(
            f"{shown(folder / RECIPE_FILE)}: its {shown(wrong[0])} differs from this merge's; {MERGE_AGAIN}"
        )

    workers = run_options.workers or default_workers()
    with watched(progress, "verifying", rate=lambda x: f"{x / 1e9:.2f} GB/s compared") as update:
        report = compare_folder(
            plan,
            recipe,
            folder,
            sample=sample,
            workers=workers,
            device=pick_device(run_options.device),
            progress=update,
        )
    stated = stated_digests(folder) if sample == 1 else None
    if stated is not None:
        found = file_digests(folder, report.files_compared, workers=workers)
        wrong = [name for name in (*found, *stated) if found.get(name) != stated.get(name)]
        if wrong:
            raise VerifyError(
                f"{shown(folder / STATEMENT_FILE)} has another digest of {shown(wrong[0])} than the file, which is as"
                " its recipe makes it; remove the statement; the same merge with `digests` makes it again"
            )
        report.files_compared.append(STATEMENT_FILE)
    return replace(report, out=str(out))


def compare_folder(
    plan: Plan,
    recipe: Mapping[str, Any],
    folder: Path,
    *,
    sample: float = 1.0,
    workers: int,
    device: Device,
    progress: Progress | None,
    cure: str = MERGE_AGAIN,
    ranks: Ranks = ALONE,
) -> VerifyReport:
    """Recompute a plan and compare it with the bytes in a folder. Raises VerifyError naming the first difference.

    Each of several ranks compares a part of the tensors (`sample` is 1 then), rank 0 the small files.
    """
    everything = list(segments(plan))
    mine = part_of_another(ranks, len(everything))
    chosen = everything[mine]
    if sample < 1:
        import random

        chosen = random.sample(everything, max(1, round(sample * len(everything)))) if everything else []
        chosen.sort(key=lambda segment: segment.index)
    records = np.zeros((len(everything), RECORD))

    def recompute() -> int:
        compared = 0
        with ExitStack() as stack:
            handles = {file.name: stack.enter_context(_opened(folder / file.name, cure)) for file in plan.files}
            for file in plan.files:
                _compare_head(handles[file.name], file.head, file.size, folder / file.name, cure)

            def compare_piece(_: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
                found = np.empty(len(piece), np.uint8)
                read_into(handles[tensor.file], memoryview(found), tensor.begin + first, folder / tensor.file)  # type: ignore[arg-type]
                expected = np.frombuffer(piece, np.uint8)
                if not np.array_equal(found, expected):
                    at = int(np.flatnonzero(found != expected)[0])
                    element = (first + at) * 8 // DTYPE_BITS[tensor.dtype]
                    raise VerifyError(
                        f"tensor '{shown(tensor.name)}' in {shown(folder / tensor.file)} differs from its recipe, first"
                        f" at element {element} (byte {tensor.begin + first + at} of the file); {cure}"
                    )

            total = sum(file.size for file in plan.files)
            todo = ((segment, (0,)) for segment in chosen)
            results = run_segments([plan], todo, compare_piece, workers=workers, device=device)
            for done in stack.enter_context(closing(results)):
                if done is not None:
                    records[done.segment.index] = done.records[0]
                    compared += done.bytes_written
                if progress is not None:
                    progress(min(round(compared * ranks.size / sample), total), total)
        return compared

    def compare_small() -> tuple[list[str], list[str]]:
        expected = written_files(plan, recipe, statistics(plan, records))
        if sample < 1:
            del expected[REPORT_FILE]
        _compare_files(plan, folder, expected, cure)
        compared = [*(file.name for file in plan.files), *plan.side, *expected]
        there = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        return compared, [name for name in there if name not in {*compared, REPORT_FILE, STATEMENT_FILE}]

    compared = together(ranks, recompute)
    for part, of_rank in ranks.gather((mine, records[mine])):
        records[part] = of_rank
    files, foreign = on_leader(ranks, compare_small)
    return VerifyReport(
        out=str(folder),
        segments=len(chosen),
        of_segments=len(everything),
        bytes_compared=compared,
        files_compared=files,
        not_of_the_merge=foreign,
    )


def _reopen(
    role: str, entry: dict[str, Any], given: str | Path | None, recipe: dict[str, Any], out: Path
) -> Checkpoint:
    """Open an input of a recipe where it was, near OUT, or where the user says; check that it has not changed."""
    places: list[str | Path]
    if given is not None:
        places = [given]
    elif entry.get("commit"):
        places = [f"{entry['repo']}@{entry['commit']}"]
    else:
        typed = Path(entry["path"])
        # The merge of a relative path may have run in any folder above OUT.
        beside = [parent / typed for parent in out.absolute().parents]
        places = list(dict.fromkeys(place for place in (entry["path"], *beside) if _exists(place)))
    if not places:
        here, there = shown(Path.cwd()), shown(out.absolute().parent)
        where = "" if Path(entry["path"]).is_absolute() else f", neither in {here} nor in {there} or a folder above it"
        raise CheckpointError(
            f"{role} {shown(entry['path'])} does not exist{where}; if it has moved, say where it is with --{role}"
        )
    refused: CheckpointError | None = None
    for place in places:
        try:
            found = open_checkpoint(
                place,
                role,
                copy_code=recipe["parameters"]["copy_code"],
                outs=[out],
                leave_out=recipe["parameters"].get("leave_out", ()),
            )
            _check_same(found, entry)
        except CheckpointError as error:
            refused = refused or error  # keep the first: the path as typed
        else:
            return replace(found, ref=entry["path"], repo=entry.get("repo"), commit=entry.get("commit"))
    assert refused is not None
    cure = f" (if it has moved, say where it is with --{role})" if given is None and "--" not in refused.args[0] else ""
    raise CheckpointError(f"{refused.args[0]}{cure}") from refused


def _exists(place: str | Path) -> bool:
    with suppress(OSError, RuntimeError):
        return Path(place).expanduser().exists()
    return False


def _check_same(found: Checkpoint, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an input's files are those that were merged."""
    for name, recorded in entry["files"].items():
        same = name in found.files and found.files[name].size == recorded["size"]
        if not same or fingerprint(found.files[name]) != recorded["fingerprint"]:
            raise CheckpointError(
                f"{found.label} is not what was merged: its {shown(name)} has changed; give the original with"
                f" --{found.role}"
            )


@contextmanager
def _opened(path: Path, cure: str) -> Iterator[int]:
    """Open a regular file for reading, as a descriptor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a plain file")
    except OSError as error:
        raise VerifyError(f"{shown(path)} cannot be read: {error.strerror}; {cure}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _compare_head(descriptor: int, head: bytes, size: int, path: Path, cure: str) -> None:
    found = os.fstat(descriptor).st_size
    if found != size:
        raise VerifyError(f"{shown(path)} has {found} bytes, its recipe gives {size}; {cure}")
    if os.pread(descriptor, len(head), 0) != head:
        raise VerifyError(f"the header of {shown(path)} differs from its recipe; {cure}")


def _compare_files(plan: Plan, folder: Path, expected: dict[str, bytes], cure: str) -> None:
    try:
        for name, (role, source) in plan.side.items():
            assert source is not None
            filecmp.clear_cache()  # else a file of unchanged size and time counts as equal
            if not filecmp.cmp(source, folder / name, shallow=False):
                raise VerifyError(f"{shown(folder / name)} differs from the {role}'s, {shown(source)}; {cure}")
        for name, content in expected.items():
            with _opened(folder / name, cure) as descriptor:
                same = os.fstat(descriptor).st_size == len(content) and os.pread(descriptor, len(content), 0) == content
            if not same:
                raise VerifyError(f"{shown(folder / name)} differs from its recipe; {cure}")
    except OSError as error:
        raise VerifyError(f"{error.filename} cannot be read: {error.strerror}; {cure}") from error
