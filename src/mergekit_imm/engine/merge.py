"""Merge checkpoints: from folders to a folder, or to a stream of tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from ..checkpoint.reader import check_inputs
from ..checkpoint.safetensors_file import TensorInfo
from ..common.checks import as_path
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, OutputError
from ..options.recipe import MergeReport, to_json
from ..options.sweep import is_list, points
from ..plan.open_inputs import (
    check_platform,
    open_inputs,
    places_of,
    plans_of,
    recipes_of,
    what_is_there,
)
from ..plan.plan import segments
from ..plan.unchanged import note_if_unchanged
from ..ranks.ranks import ALONE, Ranks, check_same, together
from .workers import Progress, check_device, check_workers, pick_device, run

if TYPE_CHECKING:
    import torch


class MergeOptions(TypedDict, total=False):
    """The keyword arguments of `merge_checkpoints` that are no lists of numbers."""

    start: str | Path | None
    iteration: int | None
    importance: Mapping[str, float] | str | Path | None
    shrink: float
    clip: tuple[float, float] | None
    layer_factors: Mapping[str, float] | str | Path | None
    sparsify: str
    reference: str
    dtype: str | torch.dtype | None
    max_shard_size: int | str | None
    keep: Sequence[str]
    take: Sequence[str]
    no_drop: Sequence[str]
    vocab: str
    rename: Sequence[str]
    leave_out: Sequence[str]
    dequantize: bool
    device: str
    workers: int | None
    overwrite: bool
    restart: bool
    verify: bool
    allow_nonfinite: bool
    copy_code: bool
    dry_run: bool
    progress: Progress | None
    ranks: Ranks | None


@overload
def merge_checkpoints(
    base: str | Path, sft: str | Path, out: str | Path, *,
    alpha: float = 0.5, drop: float = 0.2, seed: int = 0, **options: Unpack[MergeOptions],
) -> MergeReport: ...  # fmt: skip


@overload
def merge_checkpoints(
    base: str | Path, sft: str | Path, out: str | Path, *,
    alpha: float | Sequence[float] = 0.5, drop: float | Sequence[float] = 0.2, seed: int | Sequence[int] = 0,
    **options: Unpack[MergeOptions],
) -> list[MergeReport]: ...  # fmt: skip


def merge_checkpoints(
    base: str | Path,
    sft: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    alpha: float | Sequence[float] = 0.5,
    drop: float | Sequence[float] = 0.2,
    seed: int | Sequence[int] = 0,
    iteration: int | None = None,
    importance: Mapping[str, float] | str | Path | None = None,
    shrink: float = 1.0,
    clip: tuple[float, float] | None = None,
    layer_factors: Mapping[str, float] | str | Path | None = None,
    sparsify: str = "dare",
    reference: str = "start",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    vocab: str = "strict",
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> MergeReport | list[MergeReport]:
    """Merge two checkpoints on disk (three, with start) into a third, streaming, in constant memory.

        tuned  = start + factor * DARE(sft - start)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        base, sft, start: a folder, a .safetensors file, or a hub id org/name[@revision]. `start` is what the
            fine-tuning started from; the base if None. `sft` may be a LoRA adapter, trained on `start`.
        out: the folder to make. It appears only when it is whole.
        alpha, drop, seed, reference: as in `dare_merge`. Of alpha, drop and seed lists may be given: a sweep, one
            output for each of their product, all from one reading of the inputs; `out` names them, "out-{alpha}".
        iteration: the round, from 0; if None, one more than in start's recipe, and 0 without start.
        importance, shrink, clip: IIMM layer importance, a mapping or a JSON file; see `importance_factors`.
        layer_factors: factors of the layers' deltas, a mapping layer key -> factor (and "outside" for all else), a JSON
            file of one, or a rule: "lines:FIRST,LAST" (`lines_factors`), "groups:EARLY,MIDDLE,LATE" (`group_factors`).
        sparsify: "dare"; "trim": keep the largest elements of each tensor, see `trim`; "della" or "della:EPSILON": drop
            the smaller ones more often, see `della`.
        dtype: "bfloat16", "float16" or "float32" for all float tensors, "bf16" and so on, or torch's; "start": the
            start's, tensor by tensor; if None, the base's.
        max_shard_size: "5GB", or bytes, a million or more; if None, the base's own files.
        keep, take, no_drop: regular expressions (re.search on the base's names): tensors to leave as in the
            base, to take from the sft, to merge without dropping.
        vocab: "strict": vocabularies of different sizes are an error; "base" or "sft": whose the result has. Rows that
            both have are merged, the others are that model's.
        rename: "REGEX=REPLACEMENT" each: what the names of sft and start are in the base, where the rules that are
            tried by themselves do not find it.
        leave_out: files, or folders, of the inputs that are no weights of the model, by their path in it ("vit.pt").
        dequantize: multiply FP8 weights by the scales stored beside them; the output is bfloat16.
        device: "cpu", or "cuda" to compute the same bits there.
        workers: threads; min(4, 2 x CPUs) if None.
        overwrite: replace an `out` that holds something else.
        restart: do not resume an unfinished merge.
        verify: compute all again and compare every byte, before `out` appears (or where it already has).
        allow_nonfinite: let NaN and infinity in the inputs through.
        copy_code: copy *.py files too.
        dry_run: plan and check everything, write nothing. Too little space is told in the report (`refused`).
        progress: called with (bytes done, bytes in all) now and then, in this thread.
        ranks: the processes that make this call together, each a part of the work, on a filesystem that all of them
            see; `Ranks.of_group()` of a process group. If None, this process alone.

    Returns a MergeReport, of a sweep a list; its status is "already merged" where `out` holds this very merge. Raises
    MergeError (see `mergekit_imm.errors`), one line that names the cure. After an interruption the same call goes on
    where it stopped. Source: arXiv 2503.02103, Eq. 5 to 7.

    >>> report = merge_checkpoints(base_folder, sft_folder, out_folder, alpha=0.5, drop=0.9)
    >>> report.status
    'merged'
    >>> reports = merge_checkpoints(base_folder, sft_folder, "out-{alpha}", alpha=[0.3, 0.7])
    >>> [report.out for report in reports]
    ['out-0.3', 'out-0.7']
    """
    check_platform()
    from ..output import paths
    from ..output import publish as swap
    from .stream import Job, lack_of_space
    from .write_folder import as_begun, build, check, check_unfinished  # not on every platform

    began = time.perf_counter()
    ranks = ranks or ALONE
    numbers = {"alpha": alpha, "drop": drop, "seed": seed}
    workers = check_workers(workers)
    check_device(device)

    def prepare() -> tuple[list[Job], list[dict[str, Any]]]:
        name = str(as_path("out", out, "a folder to make"))
        found = points(name, numbers)
        targets = [paths.expanded(point.out) for point in found]
        for target in targets:
            paths.check_name(target)
            swap.check_marker(target)
        if len({target.resolve() for target in targets}) < len(targets):
            raise ArgumentError(
                f"two merges would go to one folder; give an output that {shown(name)} names once for each"
            )
        inputs, parameters, history = open_inputs(
            base, sft, start, outs=targets, dry_run=dry_run, iteration=iteration, importance=importance,
            shrink=shrink, clip=clip, layer_factors=layer_factors, sparsify=sparsify,
            points=[point.values for point in found], reference=reference, dtype=dtype, max_shard_size=max_shard_size,
            keep=keep, take=take, no_drop=no_drop, vocab=vocab, rename=rename, leave_out=leave_out,
            dequantize=dequantize, allow_nonfinite=allow_nonfinite, copy_code=copy_code,
        )  # fmt: skip
        places = places_of(inputs)
        if isinstance(importance, str | Path):
            places["the importance file"] = Path(importance)
        if isinstance(layer_factors, str | Path) and Path(layer_factors).is_file():
            places["the file of layer factors"] = Path(layer_factors)
        for target in targets:
            paths.check_place(target, places)
        plans = plans_of(inputs, parameters)
        jobs = [
            Job(plan, target, workers, device, began, replace=overwrite, restart=restart)
            for plan, target in zip(plans, targets, strict=True)
        ]
        # Of a hub id there are no files in a dry run.
        unread = any(each.folder is None for each in inputs.values())
        return jobs, [] if unread else recipes_of(plans, history)

    def decide() -> tuple[list[bool], str, list[dict[str, Any]]]:
        """Which outputs are there already, what the others lack, and their recipes, with paths as they were begun."""
        if ranks.rank:
            return [], "", []
        if not dry_run:
            for job in jobs:
                with paths.output_errors(job.out):
                    swap.repair(job.out)
        begun = [as_begun(job, each, restart=restart) for job, each in zip(jobs, recipes, strict=True)]
        whole = [paths.is_whole(job.out, to_json(each), job.whole) for job, each in zip(jobs, begun, strict=True)]
        left = [(job, each) for job, each, done in zip(jobs, begun, whole, strict=True) if not done]
        for job, each in left:
            if paths.is_occupied(job.out) and not overwrite:
                there = what_is_there(job.out, each)
                raise OutputError(f"output {shown(job.out)} is there and {there}; give another, or --overwrite")
            if not restart:
                check_unfinished(job.partial, each)
        lacking = lack_of_space([job for job, _ in left])
        if lacking and not dry_run:
            raise OutputError(lacking)
        return whole, lacking, begun

    def reported(reports: list[MergeReport]) -> MergeReport | list[MergeReport]:
        return reports if any(map(is_list, numbers.values())) else reports[0]

    jobs, recipes = together(ranks, prepare)
    check_same(ranks, recipes)
    if dry_run:
        for job in jobs:
            job.notes += note_if_unchanged(job.plan.inputs, job.plan.items)
    if not recipes:
        return reported([job.report("dry run", lack_of_space(jobs)) for job in jobs])
    whole, lacking, recipes = ranks.gather(together(ranks, decide))[0]
    left = [(job, each) for job, each, done in zip(jobs, recipes, whole, strict=True) if not done]
    computes = together(ranks, lambda: pick_device(device)) if not dry_run and (left or verify) else None
    if left and computes is not None:
        jobs_left, recipes_left = zip(*left, strict=True)
        build(jobs_left, recipes_left, computes, restart=restart, verify=verify, progress=progress, ranks=ranks)
    if verify and computes is not None:
        found_whole = [(job, each) for job, each, done in zip(jobs, recipes, whole, strict=True) if done]
        jobs_whole, recipes_whole = [job for job, _ in found_whole], [each for _, each in found_whole]
        check(jobs_whole, recipes_whole, computes, progress, ranks)
    merged = "dry run" if dry_run else "merged"
    return reported(
        [job.report("already merged") if w else job.report(merged, lacking) for job, w in zip(jobs, whole, strict=True)]
    )


def iter_merged(
    base: str | Path,
    sft: str | Path,
    *,
    start: str | Path | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int | None = None,
    importance: Mapping[str, float] | str | Path | None = None,
    shrink: float = 1.0,
    clip: tuple[float, float] | None = None,
    layer_factors: Mapping[str, float] | str | Path | None = None,
    sparsify: str = "dare",
    reference: str = "start",
    dtype: str | torch.dtype | None = None,
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    vocab: str = "strict",
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge two checkpoints and yield (name, tensor) one by one, as model loaders take them; nothing is written.

    Arguments as in `merge_checkpoints`; the bits are those it would write. Tensors are on the CPU, in the order
    of the base's files; a tied tensor is yielded under each name the base stores. Memory: one tensor at a time.
    Everything that headers can tell is checked before the first tensor; that no input was written meanwhile, after the
    last. Raises MergeError.

    >>> names = [name for name, tensor in iter_merged(base_folder, sft_folder, alpha=0.5)]
    """
    check_platform()
    import torch

    from ..numerics.reference import DTYPES

    inputs, parameters, _ = open_inputs(
        base, sft, start, iteration=iteration, importance=importance,
        shrink=shrink, clip=clip, layer_factors=layer_factors, sparsify=sparsify,
        points=[{"alpha": alpha, "drop": drop, "seed": seed}], reference=reference, dtype=dtype,
        keep=keep, take=take, no_drop=no_drop, vocab=vocab, rename=rename, leave_out=leave_out, dequantize=dequantize,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    (plan,) = plans_of(inputs, parameters)
    workers, computes = check_workers(workers), pick_device(device)
    for item in plan.items:
        if item.outs[0].dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{shown(item.name)}' is {item.outs[0].dtype}, which cannot be given as a torch tensor;"
                " merge into a folder instead"
            )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for item in plan.items:
            out = item.outs[0]
            content = bytearray(out.nbytes)
            view = memoryview(content)

            def sink(_: int, tensor: TensorInfo, first: int, piece: memoryview, name: str = out.name,
                     view: memoryview = view) -> None:  # fmt: skip
                if tensor.name == name:
                    view[first : first + len(piece)] = piece

            one = replace(plan, items=(item,))
            todo = ((segment, (0,)) for segment in segments(one))
            for _ in run([one], todo, sink, workers=workers, device=computes):
                pass
            if content:
                tensor = torch.frombuffer(content, dtype=DTYPES[out.dtype]).view(out.shape)
            else:
                tensor = torch.empty(out.shape, dtype=DTYPES[out.dtype])
            for each in item.outs:
                yield each.name, tensor
        check_inputs(plan.inputs)

    return tensors()
