"""Merge checkpoints: from folders to a folder, or to a stream of tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, overload

from ..checkpoint.reader import check_inputs
from ..checkpoint.safetensors_file import TensorInfo
from ..common.checks import as_path
from ..common.messages import shown
from ..errors import CheckpointError
from ..options.options import MergeOptions, Progress, RunOptions, files_of, options_from
from ..options.sweep import SWEPT, is_list, sweep
from ..plan.make_plan import make_plans
from ..plan.open_inputs import check_platform, open_inputs, places_of
from ..plan.plan import Item, Plan, segments
from ..ranks.ranks import ALONE, Ranks, together
from .report import MergeReport
from .workers import Device, Task, default_workers, pick_device, run

if TYPE_CHECKING:
    import torch

AHEAD = 64 << 20  # bytes of tensors that are merged before the one in front of them is taken


class _Keywords(TypedDict, total=False):
    """The keyword arguments of `merge_checkpoints` beside alpha, drop and seed, of which there may be lists."""

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
    alpha: float = 0.5, drop: float = 0.2, seed: int = 0, **options: Unpack[_Keywords],
) -> MergeReport: ...  # fmt: skip


@overload
def merge_checkpoints(
    base: str | Path, sft: str | Path, out: str | Path, *,
    alpha: float | Sequence[float] = 0.5, drop: float | Sequence[float] = 0.2, seed: int | Sequence[int] = 0,
    **options: Unpack[_Keywords],
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
    dtype: str | torch.dtype | None = "base",
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
    given, began = locals(), time.perf_counter()
    check_platform()
    from .write_folder import check_apart, checked_outs, write  # not on every platform

    ranks = ranks or ALONE
    run_options = options_from(given, RunOptions)

    def planned() -> tuple[list[Plan], list[Path]]:
        name = str(as_path("out", out, "a folder to make"))
        merges = sweep(name, given)
        outs, options = checked_outs(name, [place for place, _ in merges]), [each for _, each in merges]
        inputs = open_inputs({"base": base, "sft": sft, "start": start}, options, outs=outs, dry_run=dry_run)
        check_apart(outs, places_of(inputs.models) | files_of(options[0]))
        return make_plans(inputs), outs

    plans, outs = together(ranks, planned)
    reports = write(plans, outs, run_options, ranks=ranks, began=began)
    return reports if any(is_list(given[name]) for name in SWEPT) else reports[0]


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
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge two checkpoints and yield (name, tensor) one by one, as model loaders take them; nothing is written.

    Arguments as in `merge_checkpoints`; the bits are those it would write. Tensors are on the CPU, in the order
    of the base's files; a tied tensor is yielded under each name the base stores. Memory: one tensor at a time.
    Everything that headers can tell is checked before the first tensor; that no input was written meanwhile, after the
    last. Raises MergeError.

    >>> names = [name for name, tensor in iter_merged(base_folder, sft_folder, alpha=0.5)]
    """
    given = locals()
    check_platform()
    import torch

    from ..numerics.reference import DTYPES

    options, run_options = options_from(given, MergeOptions), options_from(given, RunOptions)
    inputs = open_inputs({"base": base, "sft": sft, "start": start}, options)
    (plan,) = make_plans(inputs)
    computes = pick_device(run_options.device)
    for item in plan.items:
        if item.outs[0].dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{shown(item.name)}' is {item.outs[0].dtype}, which cannot be given as a torch tensor;"
                " merge into a folder instead"
            )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for item, content in _contents(plan, run_options.workers or default_workers(), computes):
            out = item.outs[0]
            if content:
                tensor = torch.frombuffer(content, dtype=DTYPES[out.dtype]).view(out.shape)
            else:
                tensor = torch.empty(out.shape, dtype=DTYPES[out.dtype])
            for each in item.outs:
                yield each.name, tensor
        check_inputs(inputs.models)

    return tensors()


def _contents(plan: Plan, workers: int, device: Device) -> Iterator[tuple[Item, bytearray]]:
    """Yield each item of a plan and its bytes, in order, from one pool of workers.

    Workers go on with the next items while the caller has one, as long as what waits is at most AHEAD bytes.
    """
    contents: dict[str, bytearray] = {}
    left = [item.segment_count for item in plan.items]
    room, stop = threading.Condition(), threading.Event()
    front = 0  # the item that the caller waits for

    def todo() -> Iterator[Task]:
        for segment in segments(plan):
            item = plan.items[segment.item]
            name = item.outs[0].name
            if name not in contents:
                with room:
                    while segment.item > front and sum(map(len, contents.values())) > AHEAD and not stop.is_set():
                        room.wait(0.1)
                    contents[name] = bytearray(item.outs[0].nbytes)
            yield segment, (0,)

    def sink(_: int, tensor: TensorInfo, first: int, piece: memoryview) -> None:
        if tensor.name in contents:  # and not under its other names
            memoryview(contents[tensor.name])[first : first + len(piece)] = piece

    with closing(run([plan], todo(), sink, workers=workers, device=device, stop=stop)) as results:
        for front, item in enumerate(plan.items):
            while left[front]:
                done = next(results)
                if done is not None:
                    left[done.segment.item] -= 1
            with room:
                content = contents.pop(item.outs[0].name, bytearray())
                room.notify_all()
            yield item, content
        for _ in results:  # to its end, where failures are raised
            pass
