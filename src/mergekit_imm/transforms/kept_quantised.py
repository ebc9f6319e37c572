"""Quantised weights that are copied unchanged: drop their counterparts in other inputs, and keep their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import leaves
from ..common.messages import shown
from ..common.notes import note
from ..errors import CheckpointError
from ..model.tensor_names import ready_option
from .fp8 import Dequantised, stated_quantisation
from .quantised_units import Copied, units_of


def without_kept(inputs: Mapping[str, Checkpoint], chosen: Copied) -> dict[str, Checkpoint]:
    """Return the inputs without the counterparts of quantised weights that are kept from the base.

    An unquantised model has `X.weight` where the base has `X.qweight`, `X.qzeros` and `X.scales`. Raises
    CheckpointError for quantised weights that are taken from the sft but unquantised in the base.
    """
    base, sft = inputs["base"], inputs["sft"]
    for unit in units_of(sft.tensors, said=True) if sft.adapter is None else ():
        if unit.weight in base.tensors.keys() - {*unit.names} and all(map(chosen.taken, unit.names)):
            raise CheckpointError(
                f"'{shown(unit.evidence)}' of {sft.label} is taken, but {base.label} has '{shown(unit.weight)}'"
                f" instead, which would remain beside it; keep that: {ready_option('--keep', unit.weight, *unit.names)}"
            )
    own = {unit.weight for unit in units_of(base.tensors, said=True) if all(map(chosen.kept, unit.names))}
    found = dict(inputs)
    for role, each in inputs.items():
        if role == "base" or each.adapter is not None:
            continue
        parts = {
            n for unit in units_of(each.tensors, said=True) if all(map(chosen.kept, unit.names)) for n in unit.names
        }
        gone = [name for name in each.tensors if name not in base.tensors and (name in own or name in parts)]
        if gone:
            kept = note(
                "other form kept",
                "{count} tensors of {label}, such as '{first}', are not merged: {base} has them in another form,"
                " which is kept",
                count=len(gone),
                label=each.label,
                first=shown(gone[0]),
                base=base.label,
            )
            tensors = {name: tensor for name, tensor in each.tensors.items() if name not in {*gone}}
            unread = tuple(leaf for name in gone for _, leaf in leaves(each.tensors[name], role))
            found[role] = replace(each, tensors=tensors, notes=(*each.notes, kept), unread=(*each.unread, *unread))
    return found


@dataclass(frozen=True)
class Intact:
    """The quantised weights of a merged model."""

    names: frozenset[str]  # tensors copied byte for byte
    settings: tuple[str, Any] | None  # their place in config.json, and its content


def intact(base: Checkpoint, sft: Checkpoint, chosen: Copied) -> Intact:
    """Return which tensors of a merged model are quantised, and the config that describes them.

    Raises CheckpointError if some are kept from base, others taken from sft, and the two configs differ.
    """
    names: set[str] = set()
    settings: dict[str, tuple[str, Any] | None] = {}
    for each, copied in ((base, chosen.kept), (sft, chosen.taken)):
        if each.adapter is not None:
            continue
        said = None if any(isinstance(t, Dequantised) for t in each.tensors.values()) else stated_quantisation(each)
        units = [unit for unit in units_of(each.tensors, said=said is not None) if all(map(copied, unit.names))]
        names.update(name for unit in units for name in unit.names)
        if units:
            settings[each.label] = said
    if len(settings) == 2 and len({json.dumps(said, sort_keys=True) for said in settings.values()}) > 1:
        one, other = settings
        raise CheckpointError(
            f"quantised tensors of {one} are kept and of {other} are taken, but their quantization_config differ; keep"
            " or take all of them"
        )
    return Intact(frozenset(names), next(iter(settings.values()), None))
