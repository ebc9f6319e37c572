"""Plan a merge whose result is an adapter again: the same factors, scaled in adapter_config.json.

Without dropping, and with the base as start, the merge of a LoRA adapter is low-rank itself:

    merged = base + m * scaling * B A,    m = (1 - alpha) * factor

So A and B are copied, bit for bit, and `lora_alpha` (or a module's in `alpha_pattern`) is multiplied by m, in doubles.
What an adapter holds whole (modules_to_save, biases, rows of trained tokens) is merged with the base's, in its dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Slice, Tensor, is_stored
from ..checkpoint.safetensors_file import ADAPTER, ADAPTER_CONFIG, TensorInfo, build_header
from ..common.messages import shown
from ..common.notes import Note
from ..errors import ArgumentError, CheckpointError, MismatchError
from ..model.tensor_names import layer_key
from ..numerics.dtypes import MERGED
from ..numerics.mask import arithmetic
from ..options.options import MergeOptions, layer_factors_of
from ..transforms.lora_config import alpha_of
from ..transforms.lora_parts import module_of
from ..transforms.lora_tensor import LowRank, OfExperts, Rescaled, Rows, WithRows
from .decide import Decided
from .plan import Item, Plan
from .shard_layout import OutputFile, aligned

_WHOLE = "leave out --as-adapter, to write a whole model"
_Place = tuple[str, int]  # of a stored tensor: its file and offset


def adapter_plan(
    models: Mapping[str, Checkpoint], options: MergeOptions, decided: Decided, notes: tuple[Note, ...]
) -> Plan:
    """Return the plan of an adapter. Raises ArgumentError or CheckpointError if the result is not one."""
    sft = models["sft"]
    if sft.adapter is None:
        raise ArgumentError(f"--as-adapter is given, but {sft.label} is not an adapter; {_WHOLE}")
    if "start" in models:
        raise ArgumentError(
            f"--as-adapter is given with {models['start'].label}, which differs from the base by more than an adapter;"
            f" {_WHOLE}"
        )
    beside = next((part.files[0] for part in sft.parts if part.beside or part.folder), None)
    if beside is not None:
        raise CheckpointError(f"{sft.label} has weights beside the adapter, {shown(beside)}; {_WHOLE}")
    stored = [tensor for part in sft.parts for file in part.files for tensor in sft.files[file].tensors]
    merged = dict(_merged(models, decided))
    items = [_item(tensor, merged.get((tensor.file, tensor.begin)), options) for tensor in stored]
    items, file = _laid_out(items, sft.files[stored[0].file].metadata if stored[0].file == ADAPTER else {})
    changes = _scaled(models, options)
    config = {**(sft.adapter_config or {}), **changes}
    return Plan(
        options=options,
        models=models,
        items=tuple(items),
        files=(file,),
        indexes={},
        configs={ADAPTER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()},
        config_changes=changes,
        side={path: ("sft", sft.side[path]) for path in sorted(sft.side)},
        notes=notes,
    )


def _merged(models: Mapping[str, Checkpoint], decided: Decided) -> Iterator[tuple[_Place, Item]]:
    """Yield the place of each tensor to merge with the base's, and how. Raises CheckpointError for other changes."""
    sft = models["sft"]
    items = {name: item for item in decided.items for name in (item.name, *(out.name for out in item.outs))}
    for name, change in sft.tensors.items():
        group = decided.ties.groups.get(name)
        item = items[group.key if group else name]
        if isinstance(change, WithRows):
            base = models["base"].tensors.get(name) or item.sides["base"]
            rows = Rows(name, change.trained.shape, base, "base", change.places)
            yield _place(change.trained, sft), replace(item, sides={"base": rows, "sft": change.trained})
        elif is_stored(change):
            if item.action == "merge":
                yield _place(change, sft), replace(item, sides={"base": item.sides["base"], "sft": change})
        elif isinstance(change, Rescaled):
            raise CheckpointError(
                f"{sft.label} has DoRA for '{shown(name)}', whose change is not its factors' product; {_WHOLE}"
            )
        elif not isinstance(change.whole if isinstance(change, Slice) else change, LowRank | OfExperts):
            raise CheckpointError(f"{sft.label} stores '{shown(name)}' otherwise than the base does; {_WHOLE}")


def _place(tensor: Tensor, sft: Checkpoint) -> _Place:
    assert isinstance(tensor, TensorInfo)
    if not any(each.begin == tensor.begin for each in sft.files[tensor.file].tensors if each.shape == tensor.shape):
        raise CheckpointError(f"{sft.label} stores '{shown(tensor.name)}' otherwise than the base does; {_WHOLE}")
    return tensor.file, tensor.begin


def _item(stored: TensorInfo, merged: Item | None, options: MergeOptions) -> Item:
    """Return what happens to a stored tensor: it is merged, or taken as it is."""
    out = replace(stored, file=ADAPTER)
    if merged is not None and stored.dtype in MERGED:
        return replace(merged, name=stored.name, outs=(out,))
    constants = arithmetic(alpha=options.alpha, drop=0.0)
    return Item(stored.name, "take", {"sft": stored}, (out,), constants, (options.seed, options.round))


def _laid_out(items: list[Item], metadata: Mapping[str, str]) -> tuple[list[Item], OutputFile]:
    ordered = aligned([item.outs[0] for item in items])
    head, begins, size = build_header(
        ((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), {**metadata, "format": "pt"}
    )
    placed = {t.name: replace(t, begin=begin) for t, begin in zip(ordered, begins, strict=True)}
    of = {item.name: item for item in items}
    return [replace(of[name], outs=(place,)) for name, place in placed.items()], OutputFile(ADAPTER, head, size)


def _scaled(models: Mapping[str, Checkpoint], options: MergeOptions) -> dict[str, Any]:
    """Return the settings of adapter_config.json that change."""
    base, sft = models["base"], models["sft"]
    assert sft.adapter is not None
    layers = layer_factors_of(options, base.tensors)
    factors: dict[str, float] = {}  # by module
    experts = False
    for name, change in sft.tensors.items():
        whole = change.whole if isinstance(change, Slice) else change
        factor = layers.get(layer_key(name) or "", 1.0) if layers else 1.0
        if isinstance(whole, LowRank):
            factors[module_of(whole.left.name)] = factor
        elif isinstance(whole, OfExperts):
            factors[f"{module_of(whole.b.name)} {name}"], experts = factor, True
        if factor == 0:
            raise ArgumentError(f"the factor of '{shown(name)}' is 0, which no adapter's scaling can be; {_WHOLE}")
    share, settings = 1 - options.alpha, sft.adapter
    alike = {*factors.values()} or {1.0}
    if len(alike) == 1:
        scale = share * alike.pop()
        patterns = {key: _plain(value * scale) for key, value in settings["alpha_pattern"].items()}
        found = {
            "lora_alpha": _plain(settings["lora_alpha"] * scale),
            **({"alpha_pattern": patterns} if patterns else {}),
        }
    elif experts:
        raise MismatchError(
            f"{sft.label} changes experts, for which adapters have no scaling of a layer's own; leave out"
            f" --importance and --layer-factors, or --as-adapter"
        )
    else:
        # PEFT takes the first pattern that ends a module's name: the longest comes first.
        modules = sorted(factors, key=lambda module: (-len(module), module))
        own = {m: _plain(alpha_of(settings, m) * share * factors[m]) for m in modules}
        found = {
            "lora_alpha": _plain(settings["lora_alpha"] * share),
            "alpha_pattern": {re.escape(module): value for module, value in own.items()},
        }
    raw = sft.adapter_config or {}
    return {key: value for key, value in found.items() if raw.get(key) != value}


def _plain(value: float) -> float | int:
    """Return a whole number as an integer, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
