"""config.json: do the models belong together, are their embeddings tied, and what the merged one must say."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .errors import CheckpointError, MismatchError, shown

Config = Mapping[str, Any]


def check_configs(configs: Mapping[str, tuple[str, Config | None]]) -> None:
    """Check the configs of all inputs: role -> (label for messages, config or None).

    Raises CheckpointError for a quantised model, MismatchError for different architectures.
    """
    for label, config in configs.values():
        for key in ("quantization_config", "compression_config"):
            if config and config.get(key):
                method = config[key].get("quant_method", "") if isinstance(config[key], Mapping) else ""
                raise CheckpointError(
                    f"{label} is quantised (config.json has a {key}{f' of {shown(method)}' if method else ''});"
                    " merge the unquantised checkpoints and quantise the result"
                )
    base_label, base = configs["base"]
    for role, (label, config) in configs.items():
        for key in ("model_type", "architectures"):
            if role != "base" and base and config and base.get(key) and config.get(key) != base[key]:
                raise MismatchError(
                    f"{base_label} has {key} {shown(base[key])}, {label} has {shown(config.get(key) or 'none')};"
                    " they must be one architecture"
                )


def says_tied(config: Config | None) -> bool:
    """Whether a config ties the output head to the input embedding; transformers' default is that it does."""
    if config is None:
        return False
    return next((bool(level["tie_word_embeddings"]) for level in _tie_levels(config)), True)


def mentions_tie(config: Config | None) -> bool:
    """Whether a config says in so many words if the head is tied."""
    return config is not None and any(True for _ in _tie_levels(config))


def _tie_levels(config: Config) -> Iterator[Mapping[str, Any]]:
    for level in (config, config.get("text_config")):
        if isinstance(level, Mapping) and "tie_word_embeddings" in level:
            yield level


def merged_config(
    sft: Config | None,
    base: Config | None,
    *,
    dtype: str | None,
    tied: bool | None,
    rows: set[int],
    resized: Mapping[int, int] = MappingProxyType({}),
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the config of a merged model, and the changes made to sft's (base's, if sft has none).

    `dtype` is the torch name of the float tensors written (None: there are none), `tied` whether head and
    embedding were written as one tensor (None: nothing to say), `rows` the row counts of the input embeddings,
    `resized` those of vocabularies as the inputs have them -> as merged.
    Changes are keyed by their place, `text_config.dtype`.
    """
    origin = sft if sft is not None else base
    if origin is None:
        return None, {}
    config = copy.deepcopy(dict(origin))
    changes: dict[str, Any] = {}

    def put(place: str, level: dict[str, Any], key: str, value: Any) -> None:
        if key not in level or level[key] != value:
            level[key] = value
            changes[f"{place}{key}"] = value

    if dtype is not None:
        if not {"dtype", "torch_dtype"} & set(config):
            put("", config, "torch_dtype" if base and "torch_dtype" in base else "dtype", dtype)
        for place, level in _levels(config):
            for key in ("dtype", "torch_dtype"):
                if key in level:
                    put(place, level, key, dtype)
    if tied is not None and says_tied(config) != tied:
        put("", config, "tie_word_embeddings", tied)
        for place, level in _levels(config):
            if place and "tie_word_embeddings" in level and "vocab_size" in level:
                put(place, level, "tie_word_embeddings", tied)
    for place, level in _levels(config):
        size = level.get("vocab_size")
        if isinstance(size, int) and size in resized:
            put(place, level, "vocab_size", resized[size])
    if len(rows) == 1:
        known = dict(_levels(base or {}))
        for place, level in _levels(config):
            other = known.get(place, {}).get("vocab_size")
            if "vocab_size" in level and isinstance(other, int) and other != level["vocab_size"] and other in rows:
                put(place, level, "vocab_size", other)
    return config, changes


def _levels(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config itself and the configs nested in it, each with its place: "" and "text_config."."""
    if isinstance(config, dict):
        yield "", config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            for place, level in _levels(value):
                yield f"{key}.{place}", level
