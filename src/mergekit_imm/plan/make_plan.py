"""Plan merges of opened inputs: decide, assign output files, and check that no tensor is lost."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.lfs_pointer import check_no_pointer
from ..checkpoint.model_files import SPLIT, is_side_file, leave_out_option
from ..checkpoint.reader import same_bytes
from ..checkpoint.safetensors_file import TensorInfo, fingerprint
from ..common.garbage import uncollected
from ..common.messages import bytes_text, shown
from ..common.notes import Note, note
from ..errors import CheckpointError, MismatchError
from ..model.config import CONFIG, is_other_class, merged_config
from ..model.tensor_names import folder_of, is_embedding_or_head, is_input_embedding
from ..numerics.dtypes import MERGED, TORCH_NAMES
from ..options.options import MergeOptions
from ..options.recipe import RECIPE_FILE, history_of, make_recipe
from ..transforms.kept_quantised import intact
from .accounts import check_adapter, check_plan, check_tensors
from .as_adapter import adapter_plan
from .compatibility import copied_by
from .decide import Decided, decide
from .plan import Inputs, Item, Plan, result_config, same_place
from .shard_layout import OutputFile, lay_out
from .tied_embeddings import SameBytes, Ties
from .unchanged import note_if_unchanged


def make_plans(inputs: Inputs) -> list[Plan]:
    """Plan one merge for each of the options. Raises MergeError; see `decide`."""
    equal = comparer(inputs.models)
    return [plan_of(inputs.models, each, decide(inputs.models, each, equal), equal) for each in inputs.options]


@uncollected()
def plan_of(models: Mapping[str, Checkpoint], options: MergeOptions, decided: Decided, equal: SameBytes) -> Plan:
    """Plan a merge whose tensors are decided, and check that nothing is lost."""
    if options.as_adapter:
        check_tensors(decided, equal)
        notes = (*_notes(models, (), decided.ties, options), *note_if_unchanged(models, decided.items))
        plan = adapter_plan(models, options, decided, notes)
        check_adapter(plan)
        return plan
    plan = unchecked_plan(models, options, decided)
    check_tensors(decided, equal)
    check_plan(plan, decided.ties)
    return plan


def comparer(models: Mapping[str, Checkpoint]) -> SameBytes:
    """Return a function that compares two tensors of an input; results are cached."""

    @functools.cache
    def compare(role: str, one: str, other: str) -> bool:
        tensors = models[role].tensors
        return same_bytes(models, (role, tensors[one]), (role, tensors[other]))

    def equal(checkpoint: Checkpoint, one: Tensor, other: Tensor) -> bool:
        # A dry run on a hub id downloads no tensors; trust the config that they are tied.
        if checkpoint.folder is None and checkpoint.repo:
            return is_embedding_or_head(one.name) and is_embedding_or_head(other.name)
        return compare(checkpoint.role, one.name, other.name)

    return equal


def unchecked_plan(models: Mapping[str, Checkpoint], options: MergeOptions, decided: Decided) -> Plan:
    """Return the plan, not compared with the files of the inputs. Raises MismatchError if paths conflict."""
    outs = [out for item in decided.items for out in item.outs]
    placed, files, indexes = lay_out(outs, models["base"], options.max_shard_size)
    items = _in_order(decided.items, placed, files)
    configs, changes = _configs(items, models, decided, options)
    side = _side_files(models, configs)
    _check_downloaded(models, side)
    plan = Plan(
        options=options,
        models=models,
        items=tuple(items),
        files=files,
        indexes=indexes,
        configs=configs,
        config_changes=changes,
        side=side,
        notes=tuple(_notes(models, items, decided.ties, options)),
    )
    _check_paths(plan)
    return plan


def _in_order(items: Sequence[Item], placed: Mapping[str, TensorInfo], files: Sequence[OutputFile]) -> list[Item]:
    """Give the items their places in the output files, and return them in the order of the output."""
    order = {file.name: number for number, file in enumerate(files)}
    for each in items:
        each.outs = tuple([placed[out.name] for out in each.outs])
    return sorted(items, key=lambda item: (order[item.outs[0].file], item.outs[0].begin, item.name))


def _configs(
    items: Sequence[Item], models: Mapping[str, Checkpoint], decided: Decided, options: MergeOptions
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the changed config.json files by path, and the changes."""
    configs: dict[str, bytes] = {}
    changes: dict[str, Any] = {}
    for folder in ("", *models["base"].part_configs):
        config, changed = _config(folder, items, models, decided.used, decided.ties, options)
        if changed:
            configs[f"{folder}{CONFIG}"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            changes |= {folder + place: value for place, value in changed.items()}
    return configs, changes


def _config(
    folder: str,
    items: Sequence[Item],
    models: Mapping[str, Checkpoint],
    used: Mapping[str, Checkpoint],
    ties: Ties,
    options: MergeOptions,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the config of a part of the result, and the changes made to it."""
    base, sft = models["base"], models["sft"]
    config = result_config(base, sft, options, folder)
    if (folder and not (config or {}).get("model_type")) or "_class_name" in (config or {}):
        return None, {}  # not a transformers config: another module, or a diffusers component
    members = [item for item in items if folder_of(item.name) == folder]
    floats: dict[str, int] = {}
    for item in members:
        dtype = item.outs[0].dtype
        if dtype in MERGED:
            floats[dtype] = floats.get(dtype, 0) + item.source.count
    names = {code: name for name, code in TORCH_NAMES.items()}
    return merged_config(
        config if config is sft.config_of(folder) else None,
        base.config_of(folder),
        dtype=names[max(floats, key=floats.__getitem__)] if floats else None,
        tied=ties.tied.get(folder),
        rows={item.source.shape[0] for item in members if is_input_embedding(item.name) and item.source.shape},
        resized=dict(each.rows for each in used.values() if each.rows),
        quantised=intact(base, sft, copied_by(options)).settings
        if not folder and (options.keep or options.take)
        else None,
    )


def _side_files(models: Mapping[str, Checkpoint], configs: Collection[str]) -> dict[str, tuple[str, Path | None]]:
    """Return which other files to copy from which input, by path: the sft's first."""
    base, sft = models["base"], models["sft"]
    is_other = bool(sft.original_names) or is_other_class(sft.config, base.config)
    alone = _adapters_alone(models)
    side = {path: ("base", base.side[path]) for path in base.side}
    moved = {folder_of(old): folder_of(new) for new, old in sft.original_names.items()}
    moved = {old: new for old, new in moved.items() if old != new}
    for name, file in sft.side.items():
        path = _destination(name, moved, base) if moved else name
        if path is None:
            continue
        of_model = path.rpartition("/")[2] == CONFIG and folder_of(path) in ("", *base.part_configs)
        of_adapter = name.startswith(tuple(alone)) and not is_side_file(name, copy_code=True)
        if not of_adapter and not (of_model and is_other and path in base.side):
            side[path] = ("sft", file)
    return {path: side[path] for path in sorted(side) if path not in configs}


def _adapters_alone(models: Mapping[str, Checkpoint]) -> list[str]:
    """Return the folders of adapters in the sft that the base does not have."""
    return [folder for folder in models["sft"].adapters if folder not in models["base"].adapters]


def _destination(path: str, moved: Mapping[str, str], base: Checkpoint) -> str | None:
    """Return the output path of a side file of the sft: it follows the tensors of its folder, which have moved."""
    if path in SPLIT:
        return None  # it describes the folders of the sft
    folder = folder_of(path)
    if folder not in moved or (not folder and path in base.side):
        return path
    return moved[folder] + path.removeprefix(folder)


def _notes(
    models: Mapping[str, Checkpoint], items: Sequence[Item], ties: Ties, options: MergeOptions
) -> Iterator[Note]:
    """Yield what a user should know of a plan."""
    for each in models.values():
        yield from each.notes
    for folder in _adapters_alone(models):
        yield note(
            "adapter not merged",
            "{label} holds an adapter in {folder}, which is not merged; to merge it, give that folder as SFT",
            label=models["sft"].label,
            folder=shown(folder),
        )
    if ties.broken:
        text = "{broken}: both are merged under their own names, and config.json says untied"
        yield note("tie broken", text, broken=ties.broken)
    linked = [
        f"{each.label}/{name}"
        for each in models.values()
        if each.role != "start"
        for name in each.left_out
        if name.endswith("/") and not Path(name).name.startswith(".")
    ]
    if linked:
        more = ", …" if len(linked) > 4 else ""
        listed = ", ".join(map(shown, linked[:4])) + more
        yield note("links left out", "left out, because they are links to folders: {links}", links=listed)
    limit = options.max_shard_size
    larger = [out for item in items for out in item.outs if limit is not None and out.nbytes > limit]
    if larger:
        first = max(larger, key=lambda out: out.nbytes)
        files = "it has a file of its own" if len(larger) == 1 else f"{len(larger)} tensors have files of their own"
        yield note(
            "large tensor",
            "'{name}' has {size}, more than --max-shard-size: {files}, because tensors are not split",
            name=shown(first.name),
            size=bytes_text(first.nbytes),
            files=files,
        )
    if same_place(models["base"], models["sft"]):
        yield note("same model", "BASE and SFT are the same model; the result is that model")
        return
    if "start" not in models and not options.iteration and _is_merge(models["base"]):
        text = "{base} is a merge itself: for its next round give it as --start, and the model it was pulled to as BASE"
        yield note("base is a merge", text, base=models["base"].label)
    if _is_merge(models["sft"]):
        text = "{sft} is a merge itself; this one pulls it back once more"
        yield note("sft is a merge", text, sft=models["sft"].label)


def _is_merge(checkpoint: Checkpoint) -> bool:
    return checkpoint.folder is not None and (checkpoint.folder / RECIPE_FILE).exists()


def _check_downloaded(models: Mapping[str, Checkpoint], side: Mapping[str, tuple[str, Path | None]]) -> None:
    """Raise CheckpointError for a file to be copied that Git LFS has not downloaded: the result might not load."""
    for role, source in side.values():
        if source is None:
            continue
        try:
            check_no_pointer(source)
        except CheckpointError as error:
            name = next(name for name, file in models[role].side.items() if file == source)
            raise CheckpointError(f"{error}, or leave it out: {leave_out_option(name)}") from error


def _check_paths(plan: Plan) -> None:
    """Raise MismatchError if one output path is both a file and a folder."""
    paths = {file.name for file in plan.files} | {*plan.beside}

    def holder(path: str) -> str:
        return plan.models[plan.side[path][0]].label if path in plan.side else "the merge"

    for path in plan.beside:
        for folder in map(str, PurePosixPath(path).parents):
            if folder in paths:
                raise MismatchError(
                    f"'{shown(folder)}' is a file of {holder(folder)}, but a folder in '{shown(path)}' of"
                    f" {holder(path)}; rename or remove one of them"
                )


def recipes_of(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return the recipe of each plan, with the fingerprints of the shared inputs."""
    models = plans[0].models
    entries = {role: recipe_entry(each) for role, each in models.items()}
    history = history_of(models["start"].recipe) if "start" in models else []
    return [make_recipe(plan.options, entries, plan.config_changes, history) for plan in plans]


def recipe_entry(each: Checkpoint) -> dict[str, Any]:
    """Return the recipe entry of an input: its place, and the fingerprints of its files."""
    return {
        "path": each.ref,
        **({"repo": each.repo, "commit": each.commit} if each.repo else {}),
        **({} if each.adapter is None else {"adapter": each.adapter}),
        "files": {name: {"size": file.size, "fingerprint": fingerprint(file)} for name, file in each.files.items()},
    }
