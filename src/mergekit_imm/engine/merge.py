"""Merge checkpoints into a folder, or into a stream of tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np

from ..checkpoint.lazy_tensor import Raw
from ..checkpoint.reader import check_inputs
from ..checkpoint.safetensors_file import TensorInfo
from ..common.checks import as_path
from ..common.garbage import uncollected
from ..common.messages import shown
from ..common.progress import Watched, watched
from ..common.threads import default_workers
from ..errors import ArgumentError, CheckpointError
from ..model.tensor_names import loading_order
from ..numerics.devices import Device, pick_device
from ..options.options import MergeOptions, RunOptions, files_of, options_from
from ..options.sweep import SWEPT, is_list, sweep
from ..plan.make_plan import make_plans
from ..plan.open_inputs import check_platform, open_inputs, places_of
from ..plan.plan import Item, Plan, segments
from ..ranks.ranks import ALONE, Ranks, together
from .report import MergeReport
from .workers import Also, Task, run_segments

if TYPE_CHECKING:
    import torch

AHEAD = 64 << 20  # bytes of merged tensors that may wait for the caller


class _Keywords(TypedDict, total=False):
    """Keyword arguments of `merge_checkpoints` except alpha, drop and seed, which may be lists."""

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
    as_adapter: bool
    device: str
    workers: int | None
    overwrite: bool
    restart: bool
    verify: bool
    digests: bool
    allow_nonfinite: bool
    copy_code: bool
    dry_run: bool
    progress: Watched
    ranks: Ranks | None


@overload
def merge_checkpoints(
    base: str | Path,
    sft: str | Path,
    out: str | Path,
    *,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    **options: Unpack[_Keywords],
) -> MergeReport: ...


@overload
def merge_checkpoints(
    base: str | Path,
    sft: str | Path,
    out: str | Path,
    *,
    alpha: float | Sequence[float] = 0.5,
    drop: float | Sequence[float] = 0.2,
    seed: int | Sequence[int] = 0,
    **options: Unpack[_Keywords],
) -> list[MergeReport]: ...


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
    dtype: str | torch.dtype | None = "base",
    max_shard_size: int | str | None = None,
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    vocab: str = "strict",
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dequantize: bool = False,
    as_adapter: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    digests: bool = False,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Watched = None,
    ranks: Ranks | None = None,
) -> MergeReport | list[MergeReport]:
    """Merge two checkpoints on disk (three with start) into a new one, streaming, in constant memory.

        tuned  = start + factor * DARE(sft - start)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        base, sft, start: a folder, a .safetensors file, or a hub id org/name[@revision]. `start` is the model that
            fine-tuning started from; None: the base. `sft` may be a LoRA adapter trained on `start`.
        out: the folder to create. It appears only when complete.
        alpha, drop, seed, reference: as in `dare_merge`. Lists of alpha, drop or seed make a sweep: one output for each
            combination, all from a single read of the inputs; `out` names them, e.g. "out-{alpha}".
        iteration: the round, from 0; None: one more than in start's recipe, or 0 without start.
        importance, shrink, clip: IIMM layer importance, a mapping or a JSON file; see `importance_factors`.
        layer_factors: factors on the layers' deltas: a mapping layer key -> factor ("outside" for all else), a JSON
            file, or a rule: "lines:FIRST,LAST" (`lines_factors`), "groups:EARLY,MIDDLE,LATE" (`group_factors`).
        sparsify: "dare"; "trim": keep the largest elements of each tensor, see `trim`; "della" or "della:EPSILON": drop
            smaller elements more often, see `della`.
        dtype: of all float tensors: "bfloat16", "float16", "float32", a short form such as "bf16", or a torch dtype;
            "start": the start's, tensor by tensor; None: the base's.
        max_shard_size: "5GB", or a number of bytes, at least a million; None: the base's files.
        keep, take, no_drop: regular expressions (re.search on the base's names): tensors to keep from the base, to take
            from the sft, to merge without dropping.
        vocab: "strict": vocabularies of different sizes are an error; "base" or "sft": the vocabulary of the result.
            Rows in both models are merged, the rest come from that model.
        rename: rules "REGEX=REPLACEMENT" that map names in sft and start to the base's, where the built-in rules do
            not.
        leave_out: paths of files or folders in the inputs that are not weights of the model ("vit.pt").
        dequantize: multiply FP8 weights by their stored scales; the output is bfloat16.
        as_adapter: write an adapter again, whose change to the base is the merge's. `sft` is a LoRA adapter trained on
            the base, `drop` is 0, and there is no `start`.
        device: "cpu", or "cuda" to compute the same bits on a GPU.
        workers: threads; None: min(4, 2 x CPUs).
        overwrite: replace an `out` with other contents.
        restart: do not resume an unfinished merge.
        verify: recompute everything and compare every byte, before `out` appears (or in an existing `out`).
        digests: hash every file of `out` (sha256, in the report) and write an unsigned in-toto statement of the merge
            for sigstore's model-signing, imm_statement.json.
        allow_nonfinite: accept NaN and infinity in the inputs.
        copy_code: copy *.py files too.
        dry_run: plan and check everything, write nothing. The report's `refused` says if there is too little space.
        progress: None: a bar, where a person watches: in a terminal, after half a second in a notebook; not in a pipe,
            a log, a test, or with CI set. False: no bar. A function: called with (bytes done, total bytes) from time to
            time, in this thread.
        ranks: the processes that make this call together and share the work, on a shared filesystem:
            `Ranks.of_group()` for a process group. None: this process alone.

    Returns a MergeReport, or a list of them for a sweep; status "already merged" if `out` already holds this merge.
    Raises MergeError (see `mergekit_imm.errors`), one line that names the cure. After an interruption the same call
    resumes. Source: arXiv 2503.02103, Eq. 5 to 7.

    >>> report = merge_checkpoints(base_folder, sft_folder, out_folder, alpha=0.5, drop=0.9)
    >>> report.status
    'merged'
    >>> reports = merge_checkpoints(base_folder, sft_folder, "out-{alpha}", alpha=[0.3, 0.7])
    >>> [report.out for report in reports]
    ['out-0.3', 'out-0.7']
    """
    given = locals()
    with watched(progress, "merging", here=ranks is None or ranks.rank == 0) as update:
        return merged({**given, "progress": update})


def merged(given: Mapping[str, Any], also: Also | None = None) -> MergeReport | list[MergeReport]:
    """Merge as `merge_checkpoints` does with these arguments; tell `also` of each piece that is merged.

    Whoever is told may write more from the same reading, in the workers' threads.
    """
    began = time.perf_counter()
    check_platform()
    from .write_folder import check_apart, checked_outs, write  # not on every platform

    ranks = given.get("ranks") or ALONE
    run_options = options_from(given, RunOptions)

    def planned() -> tuple[list[Plan], list[Path]]:
        name = str(as_path("out", given["out"], "a folder to make"))
        merges = sweep(name, given)
        outs, options = checked_outs(name, [place for place, _ in merges]), [each for _, each in merges]
        refs = {role: given.get(role) for role in ("base", "sft", "start")}
        inputs = open_inputs(refs, options, outs=outs, dry_run=run_options.dry_run)
        check_apart(outs, places_of(inputs.models) | files_of(options[0]))
        return make_plans(inputs), outs

    with uncollected():
        plans, outs = together(ranks, planned)
    reports = write(plans, outs, run_options, ranks=ranks, began=began, also=also)
    return reports if any(is_list(given.get(name)) for name in SWEPT) else reports[0]


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
    dtype: str | torch.dtype | None = "base",
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
    order: str = "files",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge two checkpoints and yield (name, tensor) pairs, as model loaders take them; write nothing.

    Args:
        order: "files": the order of the base's files; "layers": embeddings first, then layer 0, 1, 2, … (of each stack
            of layers in turn), then the rest, such as the last norm and the head.
        all others: as in `merge_checkpoints`.

    The bits are those that `merge_checkpoints` would write. Tensors are on the CPU; a tied tensor is yielded under each
    name the base stores. Workers merge the next tensors while the caller uses this one. Memory: the yielded tensor and
    the next; more only while less than 64 MiB wait. Headers are checked before the first tensor; after the last, that
    no input changed meanwhile. Closing the iterator stops the workers and closes the files. Raises MergeError.

    >>> for name, tensor in iter_merged(base_folder, sft_folder, alpha=0.5, order="layers"):
    ...     print(name, tuple(tensor.shape))
    model.layers.0.w (8, 8)
    """
    given = locals()
    import torch

    from ..numerics.reference import DTYPES

    options, run_options = options_from(given, MergeOptions), options_from(given, RunOptions)
    if order not in ("files", "layers"):
        raise ArgumentError(f"order is {shown(repr(order), 60)}; it must be 'files' or 'layers'")
    inputs = open_inputs({"base": base, "sft": sft, "start": start}, options)
    (plan,) = make_plans(inputs)
    if order == "layers":
        plan = replace(plan, items=tuple(sorted(plan.items, key=lambda item: loading_order(item.name))))
    computes = pick_device(run_options.device)
    for item in plan.items:
        if item.outs[0].dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{shown(item.name)}' is {item.outs[0].dtype}, which has no torch dtype here;"
                " merge into a folder instead"
            )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for item, content in _contents(plan, run_options.workers or default_workers(), computes):
            out = item.outs[0]
            tensor = torch.from_numpy(content).view(DTYPES[out.dtype]).view(out.shape)
            for each in item.outs:
                yield each.name, tensor
        check_inputs(inputs.models)

    return tensors()


def _contents(plan: Plan, workers: int, device: Device) -> Iterator[tuple[Item, Raw]]:
    """Yield each item of a plan with its bytes, in order, from one pool of workers.

    Workers run ahead of the caller by at most AHEAD bytes.
    """
    import torch

    contents: dict[str, Raw] = {}
    left = [item.segment_count for item in plan.items]
    room, stop = threading.Condition(), threading.Event()
    front = 0  # the item the caller waits for

    def todo() -> Iterator[Task]:
        for segment in segments(plan):
            item = plan.items[segment.item]
            name = item.outs[0].name
            if name not in contents:
                with room:
                    while segment.item > front and sum(map(len, contents.values())) > AHEAD and not stop.is_set():
                        room.wait(0.1)
                    contents[name] = torch.empty(item.outs[0].nbytes, dtype=torch.uint8).numpy()
            yield segment, (0,)

    def sink(_: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        if tensor.name in contents:  # not under its other names
            contents[tensor.name][first : first + len(piece)] = piece

    with closing(run_segments([plan], todo(), sink, workers=workers, device=device, stop=stop)) as results:
        for front, item in enumerate(plan.items):
            while left[front]:
                done = next(results)
                if done is not None:
                    left[done.segment.item] -= 1
            with room:
                content = contents.pop(item.outs[0].name, np.empty(0, np.uint8))
                room.notify_all()
            yield item, content
        for _ in results:  # exhaust it: failures are raised at the end
            pass
