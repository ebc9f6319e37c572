"""From the arguments of a merge to its plans: inputs opened, parameters checked, recipes made."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, is_hub_id, open_checkpoint
from ..checkpoint.hub import is_offline
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.parts import matches
from ..checkpoint.reader import same_bytes, same_values
from ..checkpoint.safetensors_file import fingerprint
from ..common.checks import as_path
from ..common.json_files import is_utf8
from ..common.messages import bytes_text, first_few, shown
from ..errors import ArgumentError, CheckpointError
from ..model.tensor_names import is_end, matcher
from ..options.layer_factors import read_importance, read_layer_factors
from ..options.recipe import (
    RECIPE_FILE,
    Parameters,
    differences,
    history_of,
    make_recipe,
    parse_size,
    read_recipe,
    without_places,
)
from ..transforms.fp8 import check_unquantised, dequantized
from ..transforms.kept_quantised import without_kept
from ..transforms.lora_adapter import applied
from ..transforms.match_names import matched
from ..transforms.vocabulary import resized
from .accounts import check_plan, check_tensors
from .compatibility import chosen
from .plan import Decided, Plan, decide, make_plan
from .tied_embeddings import SameBytes


def check_platform() -> None:
    """Raise CheckpointError where files cannot be read as merges do."""
    if sys.platform == "win32":
        raise CheckpointError(
            "merging checkpoints on disk needs Linux or macOS (use WSL); the functions of tensors work everywhere"
        )


def parameters_of(
    points: Sequence[Mapping[str, Any]],
    *,
    iteration: int | None = None,
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    **values: Any,
) -> list[Parameters]:
    """Return the parameters of merges that differ in alpha, drop and seed. Raises ArgumentError for a wrong value."""
    values = listed(**values)
    if (
        values.get("sparsify", "dare") != "dare"
        and len({(point.get("drop"), point.get("seed")) for point in points}) > 1
    ):
        raise ArgumentError(
            f"several drops or seeds with sparsify {shown(values['sparsify'])}: what is dropped differs for each of"
            " them; merge them one by one (several alphas are read once)"
        )
    return [
        Parameters(
            iteration=0 if iteration is None else iteration,
            dtype="base" if dtype is None else dtype,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            **point,
            **values,
        )
        for point in points
    ]


def open_inputs(
    base: str | Path,
    sft: str | Path,
    start: str | Path | None,
    *,
    outs: Sequence[Path] = (),
    dry_run: bool = False,
    iteration: int | None = None,
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    points: Sequence[Mapping[str, Any]] = ({},),
    **values: Any,
) -> tuple[dict[str, Checkpoint], list[Parameters], list[dict[str, Any]]]:
    """Check the arguments, open the inputs, and return the parameters of each merge, and the rounds before it."""
    # The values are checked before anything is opened.
    parameters = parameters_of(points, iteration=iteration, dtype=dtype, max_shard_size=max_shard_size, **values)
    refs = {"base": as_path("base", base), "sft": as_path("sft", sft)}
    if start is not None:
        refs["start"] = as_path("start", start)
    for role, ref in refs.items():
        if not is_utf8(str(ref)):  # a recipe is JSON
            raise CheckpointError(f"the path of {role}, {shown(ref)}, is not valid UTF-8; rename it, or link to it")

    def opened(dry_run: bool) -> dict[str, Checkpoint]:
        code, leave_out = parameters[0].copy_code, parameters[0].leave_out
        found = {
            role: open_checkpoint(ref, role, copy_code=code, dry_run=dry_run, outs=outs, leave_out=leave_out)
            for role, ref in refs.items()
        }
        check_left_out(found, leave_out)
        return found

    if not dry_run and any(is_hub_id(ref) for ref in refs.values()):
        # Refuse from headers, before hours of downloading.
        plans_of(prepared(opened(dry_run=True), parameters[0]), parameters)
    inputs = prepared(without_same_start(opened(dry_run)), parameters[0])
    if iteration is None:
        parameters = [replace(each, iteration=round_of(inputs)) for each in parameters]
    return inputs, parameters, history_of(inputs["start"].recipe if "start" in inputs else None)


def listed(
    *,
    importance: Mapping[str, float] | str | Path | None = None,
    layer_factors: Mapping[str, float] | str | Path | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Return parameters, lists of patterns as tuples, and importance and factors read if they are files."""
    found = dict(values)
    for option in {"keep", "take", "no_drop", "rename", "leave_out"} & set(values):
        found[option] = as_patterns(option, values[option])
    if isinstance(importance, str | os.PathLike):
        importance = read_importance(as_path("importance", importance))
    if importance is not None and not isinstance(importance, Mapping):
        raise ArgumentError(
            f"importance is {importance!r:.60}; give a mapping of layers, or a JSON file that holds one"
        )
    if isinstance(layer_factors, str | os.PathLike):
        layer_factors = read_layer_factors(as_path("layer_factors", layer_factors))
    return found | {
        "importance": None if importance is None else dict(importance),
        "layer_factors": dict(layer_factors) if isinstance(layer_factors, Mapping) else layer_factors,
    }


def check_left_out(inputs: Mapping[str, Checkpoint], leave_out: Sequence[str]) -> None:
    """Raise ArgumentError for a name to be left out by which no file of the inputs goes."""
    if any(each.repo for each in inputs.values()) and is_offline():
        return  # a cache lacks what was left out when it was downloaded
    for pattern in leave_out:
        if not any(matches(path, [pattern]) for each in inputs.values() for path in each.left_out):
            labels = ", ".join(each.label for each in inputs.values())
            raise ArgumentError(
                f"--leave-out {shown(pattern)} names no file of {labels}; give the path in the model, such as"
                " value_head.safetensors or 2_Dense"
            )


def as_patterns(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return the values of a repeatable option. Raises ArgumentError for a bare text, and for what is no list."""
    if isinstance(values, str):
        raise ArgumentError(f"{option} is a string; give a list of patterns, [{values!r}]")
    try:
        return tuple(values)
    except TypeError as error:
        raise ArgumentError(f"{option} is {shown(repr(values), 60)}; give a list of patterns") from error


def without_same_start(inputs: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the inputs without a start that is the base itself."""
    same = "start" in inputs and same_place(inputs["start"], inputs["base"])
    return {role: each for role, each in inputs.items() if role != "start" or not same}


def round_of(inputs: Mapping[str, Checkpoint]) -> int:
    """Return the round that a merge is: one more than in start's recipe, 0 without start. Raises ArgumentError."""
    if "start" not in inputs:
        return 0
    found = inputs["start"].recipe
    if found is None:
        raise ArgumentError(
            f"{inputs['start'].label} has no {RECIPE_FILE} that tells its round; say which round this one is"
            " with --iteration N (counted from 0)"
        )
    return int(found["parameters"]["iteration"]) + 1


def prepared(inputs: dict[str, Checkpoint], parameters: Parameters) -> dict[str, Checkpoint]:
    """Return the inputs as they are merged: under the base's names, each tensor as a whole."""
    inputs = matched(without_quantisation(inputs, parameters), parameters.rename)
    inputs = without_kept(inputs, chosen(parameters)) if parameters.keep or parameters.take else inputs
    return resized(with_adapter(inputs, parameters), parameters)


def without_quantisation(inputs: dict[str, Checkpoint], parameters: Parameters) -> dict[str, Checkpoint]:
    """Return the inputs with FP8 weights multiplied by their scales, if that is asked for.

    Raises CheckpointError for quantised ones, ArgumentError if there is nothing to do.
    """
    copied = chosen(parameters)
    if not parameters.dequantize:
        for each in inputs.values():
            check_unquantised(each, copied)
        return inputs
    found = {role: dequantized(each, copied) for role, each in inputs.items()}
    if all(found[role] is each for role, each in inputs.items()):
        labels = ", ".join(each.label for each in inputs.values())
        raise ArgumentError(f"--dequantize is given, but no tensor is FP8 in {labels}; leave it out")
    return found


def with_adapter(inputs: dict[str, Checkpoint], parameters: Parameters) -> dict[str, Checkpoint]:
    """Return the inputs with an adapter given as sft applied to the start, which it was trained on."""
    adapter = inputs["sft"]
    if adapter.adapter is None:
        return inputs
    if "start" in inputs and parameters.reference == "base":
        raise ArgumentError(
            f"{adapter.label} is an adapter: its delta is taken from the start it was trained on; leave out"
            " --reference base"
        )
    model = inputs.get("start", inputs["base"])

    def equal(one: Tensor, other: Tensor) -> bool:
        if model.folder is None or adapter.folder is None:
            return True  # a dry run on a hub id; compared when it is merged
        return same_values(inputs, ("sft", one), (model.role, other))

    return {**inputs, "sft": applied(adapter, model, equal, parameters.rename, matcher(parameters.take))}


def same_place(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two inputs are one."""
    if one.folder is None or other.folder is None:
        return (one.repo, one.commit) == (other.repo, other.commit) and one.repo is not None
    return one.folder.samefile(other.folder) and list(one.files) == list(other.files)


def places_of(inputs: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Return every file and folder of the inputs, each under a label for messages."""
    return {
        f"{role} file {name}" if name else role: path
        for role, each in inputs.items()
        if each.folder is not None
        for name, path in [
            ("", each.folder),
            *((n, f.path) for n, f in each.files.items() if f.path),
            *((n, path) for n, path in each.side.items() if path),
            *((path.name, path) for path in each.stamps),
        ]
    }


def comparer(inputs: Mapping[str, Checkpoint]) -> SameBytes:
    """Return what compares two tensors of one of the inputs, each pair once."""

    @functools.cache
    def compare(role: str, one: str, other: str) -> bool:
        tensors = inputs[role].tensors
        return same_bytes(inputs, (role, tensors[one]), (role, tensors[other]))

    def equal(checkpoint: Checkpoint, one: Tensor, other: Tensor) -> bool:
        # A dry run on a hub id downloads no tensors; it takes the config's word for the tie.
        if checkpoint.folder is None:
            return is_end(one.name) and is_end(other.name)
        return compare(checkpoint.role, one.name, other.name)

    return equal


def plans_of(inputs: Mapping[str, Checkpoint], parameters: Sequence[Parameters]) -> list[Plan]:
    """Plan merges of opened inputs that differ in their numbers."""
    equal = comparer(inputs)
    return [plan_of(inputs, each, decide(inputs, each, equal), equal) for each in parameters]


def plan_of(inputs: Mapping[str, Checkpoint], parameters: Parameters, decided: Decided, equal: SameBytes) -> Plan:
    """Plan a merge of which everything is decided about the tensors, and check that nothing is lost."""
    plan = make_plan(inputs, parameters, decided)
    check_tensors(decided, equal)
    check_plan(plan, decided.ties)
    linked = [
        f"{each.label}/{name}" for each in inputs.values() if each.role != "start" for name in each.left_out
        if name.endswith("/") and not Path(name).name.startswith(".")
    ]  # fmt: skip
    notes = list(plan.notes)
    if linked:
        more = ", …" if len(linked) > 4 else ""
        notes.append(f"note: left out, as they are links to folders: {', '.join(map(shown, linked[:4]))}{more}")
    limit = parameters.max_shard_size
    larger = [out for item in plan.items for out in item.outs if limit is not None and out.nbytes > limit]
    if larger:
        first = max(larger, key=lambda out: out.nbytes)
        files = "it has a file of its own" if len(larger) == 1 else f"{len(larger)} tensors have files of their own"
        notes.append(
            f"note: '{shown(first.name)}' has {bytes_text(first.nbytes)}, more than a file may have: {files}, as no"
            " tensor is split"
        )
    if same_place(inputs["base"], inputs["sft"]):
        notes.append("note: BASE and SFT are the same model; the result is that model")
    return replace(plan, notes=tuple(notes))


def origin(each: Checkpoint) -> dict[str, Any]:
    """Return where an input came from, and the fingerprints of its files, as recipes hold it."""
    return {
        "path": each.ref,
        **({"repo": each.repo, "commit": each.commit} if each.repo else {}),
        **({} if each.adapter is None else {"adapter": each.adapter}),
        "files": {name: {"size": file.size, "fingerprint": fingerprint(file)} for name, file in each.files.items()},
    }


def recipes_of(plans: Sequence[Plan], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the recipe of each plan, with the fingerprints of the inputs, which all share."""
    inputs = {role: origin(each) for role, each in plans[0].inputs.items()}
    return [make_recipe(plan.parameters, inputs, plan.config_changes, history) for plan in plans]


def what_is_there(out: Path, recipe: Mapping[str, Any]) -> str:
    """Say what an output holds that is not this merge."""
    try:
        found = read_recipe(out)
    except CheckpointError:
        found = None
    changes = differences(without_places(found), without_places(recipe)) if found else []
    if changes:
        return f"holds another merge ({first_few(changes)})"
    return "lacks files of this very merge" if found else "not empty"
