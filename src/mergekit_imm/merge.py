"""Merge checkpoints: from folders to a folder, or to a stream of tensors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.source import Checkpoint, is_hub_id, open_checkpoint
from .checkpoint.tensorfile import TensorInfo, fingerprint
from .errors import ArgumentError, CheckpointError, OutputError, shown
from .execute import Merge, Progress, check_workers, pick_merge, run, same_bytes
from .importance import read_importance
from .plan import Plan, make_plan, segments
from .recipe import (
    RECIPE_FILE,
    MergeReport,
    Parameters,
    history_of,
    make_recipe,
    parse_size,
    read_recipe,
    to_json,
)

if TYPE_CHECKING:
    import torch


def merge_checkpoints(
    base: str | Path,
    sft: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int | None = None,
    importance: Mapping[str, float] | str | Path | None = None,
    reference: str = "start",
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    vocab: str = "strict",
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    allow_nonfinite: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge two checkpoints on disk (three, with start) into a third, streaming, in constant memory.

        tuned  = start + factor * DARE(sft - start)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        base, sft, start: a folder, a .safetensors file, or a hub id org/name[@revision]. `start` is what the
            fine-tuning started from; the base if None.
        out: the folder to make. It appears only when it is whole.
        alpha, drop, seed, reference: as in `dare_merge`.
        iteration: the round, from 0; if None, one more than in start's recipe, and 0 without start.
        importance: IIMM layer importance, a mapping or a JSON file; see `importance_factors`.
        dtype: "bfloat16", "float16" or "float32" for all float tensors; if None, the base's, tensor by tensor.
        max_shard_size: bytes, or "5GB"; if None, the base's own files.
        keep, take, no_drop: regular expressions (re.search on the base's names): tensors to leave as in the
            base, to take from the sft, to merge without dropping.
        vocab: "strict": vocabularies of different sizes are an error.
        device: "cpu", or "cuda" to compute the same bits there.
        workers: threads; min(4, CPUs) if None.
        overwrite: replace an `out` that holds something else.
        restart: do not resume an unfinished merge.
        allow_nonfinite: let NaN and infinity in the inputs through.
        copy_code: copy *.py files too.
        dry_run: plan and check everything, write nothing.
        progress: called with (bytes done, bytes in all) now and then, in this thread.

    Returns a MergeReport; its status is "already merged" where `out` holds this very merge. Raises MergeError
    (see `mergekit_imm.errors`), one line that names the cure. After an interruption the same call goes on where
    it stopped. Source: arXiv 2503.02103, Eq. 5 to 7.

    >>> report = merge_checkpoints(base_folder, sft_folder, out_folder, alpha=0.5, drop=0.9)
    >>> report.status
    'merged'
    """
    _check_platform()
    from .build import Job, build, check_unfinished  # not on every platform
    from .checkpoint import output

    began = time.perf_counter()
    target = output.expanded(out)
    workers = check_workers(workers)
    check_device(device)
    inputs, parameters, history = _open_inputs(
        base, sft, start, out=target, dry_run=dry_run, iteration=iteration, importance=importance,
        alpha=alpha, drop=drop, seed=seed, reference=reference, dtype=dtype, max_shard_size=max_shard_size,
        keep=keep, take=take, no_drop=no_drop, vocab=vocab, allow_nonfinite=allow_nonfinite, copy_code=copy_code,
    )  # fmt: skip
    places = _places(inputs)
    if isinstance(importance, str | Path):
        places["the importance file"] = Path(importance)
    output.check_place(target, places)
    job = Job(plan_of(inputs, parameters), target, workers, device, began)
    if any(each.folder is None for each in inputs.values()):  # a dry run on a hub id
        job.check_space()
        return job.report("dry run")
    recipe = _recipe(job.plan, history)
    if not dry_run:
        with output.output_errors(target):
            output.repair(target)
    if output.is_whole(target, to_json(recipe), job.sizes):
        return job.report("already merged")
    if output.is_occupied(target) and not overwrite:
        raise OutputError(
            f"output {shown(target)} is there and {_what_is_there(target, recipe)}; give another, or --overwrite it"
        )
    if not restart:
        check_unfinished(output.partial_of(target), recipe)
    job.check_space()
    if dry_run:
        return job.report("dry run")
    build(job, recipe, _pick_merge(device), restart=restart, progress=progress)
    return job.report("merged")


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
    reference: str = "start",
    dtype: str | None = None,
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    no_drop: Sequence[str] = (),
    vocab: str = "strict",
    device: str = "cpu",
    workers: int | None = None,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge two checkpoints and yield (name, tensor) one by one, as model loaders take them; nothing is written.

    Arguments as in `merge_checkpoints`; the bits are those it would write. Tensors are on the CPU, in the order
    of the base's files; a tied tensor is yielded under each name the base stores. Memory: one tensor at a time.
    Everything that headers can tell is checked before the first tensor. Raises MergeError.

    >>> names = [name for name, tensor in iter_merged(base_folder, sft_folder, alpha=0.5)]
    """
    _check_platform()
    import torch

    inputs, parameters, _ = _open_inputs(
        base, sft, start, out=None, dry_run=False, iteration=iteration, importance=importance,
        alpha=alpha, drop=drop, seed=seed, reference=reference, dtype=dtype, max_shard_size=None,
        keep=keep, take=take, no_drop=no_drop, vocab=vocab, allow_nonfinite=allow_nonfinite, copy_code=False,
    )  # fmt: skip
    plan = plan_of(inputs, parameters)
    workers, merge = check_workers(workers), _pick_merge(device)
    dtypes = {
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
        "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
        "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    }  # fmt: skip

    for item in plan.items:
        if item.outs[0].dtype not in dtypes:
            raise CheckpointError(
                f"tensor '{shown(item.name)}' is {item.outs[0].dtype}, which cannot be given as a torch tensor;"
                " merge into a folder instead"
            )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for item in plan.items:
            out = item.outs[0]
            content = bytearray(out.nbytes)
            view = memoryview(content)

            def sink(tensor: TensorInfo, first: int, piece: memoryview, name: str = out.name,
                     view: memoryview = view) -> None:  # fmt: skip
                if tensor.name == name:
                    view[first : first + len(piece)] = piece

            one = replace(plan, items=(item,))
            for _ in run(one, segments(one), sink, workers=workers, merge=merge):
                pass
            if content:
                tensor = torch.frombuffer(content, dtype=dtypes[out.dtype]).view(out.shape)
            else:
                tensor = torch.empty(out.shape, dtype=dtypes[out.dtype])
            for each in item.outs:
                yield each.name, tensor

    return tensors()


# --- from arguments to a plan


def _open_inputs(
    base: str | Path,
    sft: str | Path,
    start: str | Path | None,
    *,
    out: Path | None,
    dry_run: bool,
    iteration: int | None,
    importance: Mapping[str, float] | str | Path | None,
    dtype: str | None,
    max_shard_size: int | str | None,
    **values: Any,
) -> tuple[dict[str, Checkpoint], Parameters, list[dict[str, Any]]]:
    for option in ("keep", "take", "no_drop"):
        if isinstance(values[option], str):
            raise ArgumentError(f"{option} is a string; give a list of patterns, [{values[option]!r}]")
        values[option] = tuple(values[option])
    if isinstance(importance, str | Path):
        importance = read_importance(importance)
    if importance is not None and not isinstance(importance, Mapping):
        raise ArgumentError(
            f"importance is {importance!r:.60}; give a mapping of layers, or a JSON file that holds one"
        )
    parameters = Parameters(  # checks the values before anything is opened
        iteration=0 if iteration is None else iteration,
        importance=None if importance is None else dict(importance),
        dtype=dtype or "base",
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        **values,
    )
    refs = {role: ref for role, ref in (("base", base), ("sft", sft), ("start", start)) if ref is not None}
    for role, ref in refs.items():
        if str(ref) != str(ref).encode(errors="replace").decode():  # a recipe is JSON
            raise CheckpointError(f"the path of {role}, {shown(ref)}, is not valid UTF-8; rename it, or link to it")

    def opened(dry_run: bool) -> dict[str, Checkpoint]:
        copy_code = parameters.copy_code
        return {r: open_checkpoint(ref, r, copy_code=copy_code, dry_run=dry_run, out=out) for r, ref in refs.items()}

    if not dry_run and any(is_hub_id(ref) for ref in refs.values()):
        plan_of(opened(dry_run=True), parameters)  # refuse from headers, before hours of downloading
    inputs = opened(dry_run)
    if "start" in inputs and _same_place(inputs["start"], inputs["base"]):
        del inputs["start"]
    found = None
    if "start" in inputs:
        found = inputs["start"].recipe
        if iteration is None:
            if found is None:
                raise ArgumentError(
                    f"{inputs['start'].label} has no {RECIPE_FILE} that tells its round; say which round this one is"
                    " with --iteration N (counted from 0)"
                )
            parameters = replace(parameters, iteration=found["parameters"]["iteration"] + 1)
    return inputs, parameters, history_of(found)


def _check_platform() -> None:
    if sys.platform == "win32":
        raise CheckpointError(
            "merging checkpoints on disk needs Linux or macOS (use WSL); the functions of tensors work everywhere"
        )


def _same_place(one: Checkpoint, other: Checkpoint) -> bool:
    if one.folder is None or other.folder is None:
        return (one.repo, one.commit) == (other.repo, other.commit) and one.repo is not None
    return one.folder.samefile(other.folder) and list(one.files) == list(other.files)


def _places(inputs: Mapping[str, Checkpoint]) -> dict[str, Path]:
    return {
        f"{role} file {name}" if name else role: path
        for role, each in inputs.items()
        if each.folder is not None
        for name, path in [
            ("", each.folder),
            *((n, f.path) for n, f in each.files.items() if f.path),
            *((n, path) for n, path in each.side.items() if path),
        ]
    }


def plan_of(inputs: Mapping[str, Checkpoint], parameters: Parameters) -> Plan:
    """Plan a merge of opened inputs."""

    def equal(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
        # A dry run on a hub id downloads no tensors; it takes the config's word for the tie.
        return checkpoint.folder is None or same_bytes(checkpoint, one, other)

    plan = make_plan(inputs, parameters, equal)
    if _same_place(inputs["base"], inputs["sft"]):
        plan = replace(plan, notes=(*plan.notes, "note: BASE and SFT are the same model; the result is that model"))
    return plan


def _recipe(plan: Plan, history: list[dict[str, Any]]) -> dict[str, Any]:
    inputs = {}
    for role, each in plan.inputs.items():
        inputs[role] = {
            "path": each.ref,
            **({"repo": each.repo, "commit": each.commit} if each.repo else {}),
            "files": {name: {"size": file.size, "fingerprint": fingerprint(file)} for name, file in each.files.items()},
        }
    return make_recipe(plan.parameters, inputs, plan.config_changes, history)


def _what_is_there(out: Path, recipe: Mapping[str, Any]) -> str:
    from .checkpoint.output import differences

    try:
        found = read_recipe(out)
    except CheckpointError:
        found = None
    changes = differences(found, recipe) if found else []
    return (
        f"holds another merge ({'; '.join(changes[:3])}{'; …' if len(changes) > 3 else ''})" if changes else "not empty"
    )


def check_device(device: str) -> None:
    """Raise ArgumentError unless a device is one that merges run on; whether it is there is not looked up."""
    if device != "cpu" and not (device == "cuda" or device.startswith("cuda:")):
        raise ArgumentError(f"device is {device!r}; it must be cpu or cuda")


def _pick_merge(device: str) -> Merge:
    check_device(device)
    return pick_merge(device)
