"""The config of a LoRA adapter, as PEFT writes it: what is read, what is refused, and the scaling of each module."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..common.messages import shown
from ..errors import CheckpointError

# Settings that change what the factors mean, and why. None, false and empty count as absent.
_REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools its input",
    "use_bdlora": "its factors are block-diagonal",
    "layer_replication": "it repeats layers of the base",
    "velora_config": "it changes how the factors are trained",
    "monteclora_config": "its factors are samples",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it has a third factor between the two",
}
MERGE_FIRST = "merge it first: peft's `merge_and_unload()`, then `save_pretrained`"
_USES = ("use_rslora", "use_dora")
# Initialisations that leave the base unchanged; others move part of it into the adapter.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_KEPT_IN_RECIPE = (
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out use_dora trainable_token_indices"
    " ensure_weight_tying target_parameters"
).split()


def read_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings that decide an adapter's numbers. Raises CheckpointError for any that is not supported."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is a {shown(kind)} adapter, but only LORA is supported; {MERGE_FIRST}")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{where} has {name}: {reason}, which is not supported; {MERGE_FIRST}")
    unknown = [key for key, value in config.items() if key.startswith("use_") and value and key not in _USES]
    if unknown:
        raise CheckpointError(f"{where} has {shown(unknown[0])}, an unknown setting; {MERGE_FIRST}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointError(
            f"{where} was initialised by {shown(start)}, which changed its base: the adapter alone is not the change;"
            " save it with peft's `path_initial_model_for_weight_conversion`, or merge it first"
        )
    found = {name: config.get(name) for name in _KEPT_IN_RECIPE}
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = found[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{where}: its {name} is {shown(value)}, not a positive number; save the adapter again"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = found[name] or {}
        if not isinstance(pattern, dict) or not all(map(_is_pattern, pattern, pattern.values())):
            raise CheckpointError(
                f"{where}: its {name} is not a mapping of patterns to positive numbers; save the adapter again"
            )
        found[name] = pattern
    targets = found["target_parameters"] or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: its target_parameters is not a list of names; save the adapter again")
    try:
        json.dumps(found, allow_nan=False)  # it goes into the recipe
    except ValueError as error:
        raise CheckpointError(
            f"{where}: its adapter_config.json holds infinity or NaN; save the adapter again"
        ) from error
    return {**found, "target_parameters": targets}


def _is_pattern(key: str, value: object) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return isinstance(value, (int, float)) and 0 < value < math.inf


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and scaling of a module: by the first pattern that ends its name, else the adapter's defaults."""
    rank, alpha = _chosen(config["rank_pattern"], module, config["r"]), alpha_of(config, module)
    return rank, alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """Return the lora_alpha of a module, chosen in the same way."""
    alpha: float = _chosen(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha


def _chosen(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
