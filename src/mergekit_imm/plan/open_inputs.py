"""Open the inputs of a merge and make them comparable: same names, whole tensors, adapters applied."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.hub import is_offline
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.model_files import matches
from ..checkpoint.open_checkpoint import is_hub_id, open_checkpoint
from ..checkpoint.reader import same_values
from ..common.checks import as_path
from ..common.garbage import uncollected
from ..common.json_files import is_utf8
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError
from ..model.config import quantisation
from ..model.tensor_names import matcher
from ..numerics.dtypes import MERGED
from ..options.options import MergeOptions, with_files_read
from ..options.recipe import RECIPE_FILE
from ..transforms.fp8 import check_unquantised, dequantised
from ..transforms.kept_quantised import without_kept
from ..transforms.lora_adapter import applied
from ..transforms.match_names import matched
from ..transforms.vocabulary import resized
from .compatibility import copied_by
from .make_plan import make_plans
from .plan import Inputs, same_place


@uncollected()
def open_inputs(
    refs: Mapping[str, str | Path | None],
    options: MergeOptions | Sequence[MergeOptions],
    *,
    outs: Sequence[Path] = (),
    dry_run: bool = False,
) -> Inputs:
    """Open base, sft and optionally start for one merge, or for several that differ in alpha, drop and seed.

    refs: role -> folder, file or hub id. A `start` that is None or the base itself is left out. `dry_run` downloads
    only headers from a hub; otherwise headers are checked before weights are downloaded. Raises MergeError.
    """
    check_platform()
    several = (options,) if isinstance(options, MergeOptions) else tuple(options)
    several = tuple(map(with_files_read, several))
    refs = input_refs(refs)
    first = several[0]

    def opened(dry_run: bool) -> Inputs:
        indexes: dict[bytes, Any] = {}
        models = {
            role: open_checkpoint(
                ref,
                role,
                copy_code=first.copy_code,
                dry_run=dry_run,
                outs=outs,
                leave_out=first.leave_out,
                indexes=indexes,
            )
            for role, ref in refs.items()
        }
        indexes.clear()
        if first.leave_out:
            check_left_out(models, first.leave_out)
        models = prepared(without_same_start(models), first)
        known = first.iteration is not None
        return Inputs(models, several if known else tuple(replace(o, iteration=round_of(models)) for o in several))

    if not dry_run and any(map(is_hub_id, refs.values())):
        make_plans(opened(dry_run=True))  # refuse before downloading for hours
    return opened(dry_run)


def input_refs(refs: Mapping[str, str | Path | None]) -> dict[str, str | Path]:
    """Return the inputs' paths and hub ids, without a start of None. Raises MergeError for anything else."""
    given = {role: as_path(role, ref) for role, ref in refs.items() if not (role == "start" and ref is None)}
    for role, ref in given.items():
        if not is_utf8(str(ref)):  # a recipe is JSON
            raise CheckpointError(f"the path of {role}, {shown(ref)}, is not valid UTF-8; rename it, or link to it")
    return given


def check_platform() -> None:
    """Raise CheckpointError on Windows, where checkpoints cannot be merged."""
    if sys.platform == "win32":
        raise CheckpointError(
            "merging checkpoints on disk needs Linux or macOS (use WSL); the tensor functions work everywhere"
        )


def check_left_out(models: Mapping[str, Checkpoint], leave_out: Sequence[str]) -> None:
    """Raise ArgumentError for a --leave-out pattern that matches no file of the inputs."""
    if any(each.repo for each in models.values()) and is_offline():
        return  # files left out were never downloaded
    for pattern in leave_out:
        if not any(matches(path, [pattern]) for each in models.values() for path in each.left_out):
            labels = ", ".join(each.label for each in models.values())
            raise ArgumentError(
                f"--leave-out {shown(pattern)} names no file of {labels}; give the path in the model, such as"
                " value_head.safetensors or 2_Dense"
            )


def without_same_start(models: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the inputs, without the start if it is the base."""
    same = "start" in models and same_place(models["start"], models["base"])
    return {role: each for role, each in models.items() if role != "start" or not same}


def round_of(models: Mapping[str, Checkpoint]) -> int:
    """Return the round of a merge: start's plus 1, or 0 without start. Raises ArgumentError."""
    if "start" not in models:
        return 0
    recipe = models["start"].recipe
    if recipe is None:
        raise ArgumentError(
            f"{models['start'].label} has no {RECIPE_FILE} with its round; give the round of this merge with"
            " --iteration N (counted from 0)"
        )
    return int(recipe["parameters"]["iteration"]) + 1


def prepared(models: dict[str, Checkpoint], options: MergeOptions) -> dict[str, Checkpoint]:
    """Return the inputs ready to merge: dequantised, under the base's names, whole tensors, adapters applied."""
    models = dequantised_or_refused(models, options)
    if options.rename or not all(_has_names_of(models["base"], each) for each in models.values()):
        models = matched(models, options.rename)
    if options.keep or options.take:
        models = without_kept(models, copied_by(options))
    if models["sft"].adapter is not None:
        models = with_adapter(models, options)
    if options.vocab != "strict":
        models = resized(models, options)
    return models


def _has_names_of(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether names already match: each is one of the base's, and no tensor could be transposed experts."""
    return other.tensors.keys() <= base.tensors.keys() and 3 not in {len(t.shape) for t in other.tensors.values()}


def dequantised_or_refused(models: dict[str, Checkpoint], options: MergeOptions) -> dict[str, Checkpoint]:
    """Return the models with FP8 weights dequantised if --dequantize is given, else unchanged.

    Raises CheckpointError for quantised weights that are left, ArgumentError if no model is FP8.
    """
    if not options.dequantize:
        for each in models.values():
            if quantisation(each.config) or not {tensor.dtype for tensor in each.tensors.values()} <= {*MERGED}:
                check_unquantised(each, copied_by(options))
        return models
    unquantised = {role: dequantised(each, copied_by(options)) for role, each in models.items()}
    if all(unquantised[role] is each for role, each in models.items()):
        labels = ", ".join(each.label for each in models.values())
        raise ArgumentError(f"--dequantize is given, but no tensor is FP8 in {labels}; leave it out")
    return unquantised


def with_adapter(models: dict[str, Checkpoint], options: MergeOptions) -> dict[str, Checkpoint]:
    """Apply an sft that is an adapter to the start, which it was trained on."""
    adapter = models["sft"]
    if "start" in models and options.reference == "base":
        raise ArgumentError(
            f"{adapter.label} is an adapter: its delta is relative to the start it was trained on; leave out"
            " --reference base"
        )
    model = models.get("start", models["base"])

    def equal(one: Tensor, other: Tensor) -> bool:
        if any(each.folder is None and each.repo for each in (model, adapter)):
            return True  # a dry run on a hub id; the merge compares them
        return same_values(models, ("sft", one), (model.role, other))

    return {**models, "sft": applied(adapter, model, equal, options.rename, matcher(options.take))}


def places_of(models: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Return every file and folder of the inputs, by a label for messages."""
    return {
        f"{role} file {name}" if name else role: path
        for role, each in models.items()
        if each.folder is not None
        for name, path in [
            ("", each.folder),
            *((n, f.path) for n, f in each.files.items() if f.path),
            *((n, path) for n, path in each.side.items() if path),
            *((path.name, path) for path in each.stamps),
        ]
    }
