"""config.json: whether models belong together, whether embeddings are tied, and the config of a merged model."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ..common.messages import shown
from ..errors import MismatchError

CONFIG = "config.json"
Config = Mapping[str, Any]
# Settings that affect neither the set of tensors nor their shapes.
_NO_TENSORS = re.compile(
    "architectures|cache|checkpoint|dropout|dtype|^output_|^return_|^tie_|token_i|torchscript|version|^vocab_size$|window"
)
_QUANTISED = ("quantization_config", "compression_config")


def check_configs(configs: Mapping[str, tuple[str, Config | None]], renamed: Collection[str] = ()) -> None:
    """Check that the configs of all inputs, role -> (label for messages, config or None), are of one architecture.

    An input may be another class of the base's model: a part of it, or the model with further parts. An input in
    `renamed`, its names mapped to the base's, needs only a part in common with it. Raises MismatchError.
    """
    base_label, base = configs["base"]
    for role, (label, config) in configs.items():
        for key in ("model_type", "architectures"):
            if role == "base" or not base or not config or not base.get(key) or config.get(key) == base[key]:
                continue
            has_part_in_common = role in renamed and _types(base) & _types(config)
            if not is_other_class(config, base) and not has_part_in_common:
                raise MismatchError(
                    f"{base_label} has {key} {shown(base[key])}, {label} has {shown(config.get(key) or 'none')};"
                    " they must be one architecture"
                )


def is_other_class(config: Config | None, base: Config | None) -> bool:
    """Whether one of two models is a part of the other, by their configs.

    >>> is_other_class({"model_type": "m_text"}, {"model_type": "m", "text_config": {"model_type": "m_text"}})
    True
    >>> is_other_class({"model_type": []}, {"model_type": "m"})
    False
    """
    kinds = [each.get("model_type") if each else None for each in (config, base)]
    if config is None or base is None or kinds[0] == kinds[1]:
        return False
    if not all(isinstance(kind, str) for kind in kinds):  # none, or of a damaged config
        return False
    return kinds[0] in _types(base) or kinds[1] in _types(config)


def _types(config: Config) -> set[str]:
    """Model types of a config and its nested configs."""
    found = (level.get("model_type") for _, level in _levels(config))
    return {kind for kind in found if isinstance(kind, str)}


def quantisation(config: Config | None) -> tuple[str, Mapping[str, Any]] | None:
    """Return the place of a quantization config, such as `text_config.quantization_config`, and its value; or None."""
    for place, level in _levels(config or {}):
        for key in _QUANTISED:
            if level.get(key):
                return f"{place}{key}", level[key] if isinstance(level[key], Mapping) else {}
    return None


def says_tied(config: Config | None) -> bool:
    """Whether a config ties the output head to the input embedding; it does by default, as in transformers."""
    return config is not None and stated_tie(config) is not False


def setting(config: Config | None, key: str) -> Any:
    """A setting of the language model: at the top level, else in `text_config`, else None."""
    levels = (config, (config or {}).get("text_config"))
    return next((level[key] for level in levels if isinstance(level, Mapping) and key in level), None)


def differences(one: Config | None, other: Config | None) -> list[tuple[str, Any, Any]]:
    """Return settings that differ and may affect the set of tensors: (place, value in one, value in other)."""
    known = dict(_levels(other or {}))
    return [
        (f"{place}{key}", value, known[place][key])
        for place, level in _levels(one or {})
        for key, value in level.items()
        if isinstance(value, (int, list))
        and not _NO_TENSORS.search(key)
        and place in known
        and type(known[place].get(key)) is type(value)
        and known[place][key] != value
    ]


def stated_tie(config: Config | None) -> bool | None:
    """What a config states about tying head and embedding; None if nothing."""
    for level in (config or {}, (config or {}).get("text_config")):
        if isinstance(level, Mapping) and "tie_word_embeddings" in level:
            return bool(level["tie_word_embeddings"])
    return None


def vocabulary_sizes(config: Config | None) -> set[int]:
    """Vocabulary sizes in a config and its nested configs."""
    sizes = (level.get("vocab_size") for _, level in _levels(config or {}))
    return {size for size in sizes if type(size) is int}


def merged_config(
    sft: Config | None,
    base: Config | None,
    *,
    dtype: str | None,
    tied: bool | None,
    rows: set[int],
    resized: Mapping[int, int] = MappingProxyType({}),
    quantised: tuple[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the config of a merged model, and the changes made to sft's config (base's if sft has none).

    Args:
        dtype: torch name of the dtype of the float tensors written; None if there are none.
        tied: whether head and embedding were written as one tensor; None if unknown.
        rows: row counts of the input embeddings.
        resized: vocabulary size in the inputs -> merged size.
        quantised: place and value of the quantization_config of quantised tensors that were copied.

    Changes are keyed by place, such as `text_config.dtype`; None marks a removed setting.
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

    for place, level in list(_levels(config)):
        for key in _QUANTISED:
            if level.get(key) and (quantised is None or quantised[0] != f"{place}{key}"):  # merged tensors are floats
                del level[key]
                changes[f"{place}{key}"] = None
    if quantised is not None:
        where, _, key = quantised[0].rpartition(".")
        where = f"{where}." if f"{where}." in dict(_levels(config)) else ""
        put(where, dict(_levels(config))[where], key, copy.deepcopy(quantised[1]))
    before = dict(_levels(base or {}))
    for place, level in _levels(config):
        # Trainers with gradient checkpointing turn the cache off and save that; generation needs it.
        if level.get("use_cache") is False and place in before and before[place].get("use_cache") is not False:
            if "use_cache" in before[place]:
                put(place, level, "use_cache", before[place]["use_cache"])
            else:
                del level["use_cache"]
                changes[f"{place}use_cache"] = None
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
        for place, level in _levels(config):
            other = before.get(place, {}).get("vocab_size")
            if "vocab_size" in level and isinstance(other, int) and other != level["vocab_size"] and other in rows:
                put(place, level, "vocab_size", other)
    return config, changes


def _levels(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, config) of a config and its nested configs; the places are "" and such as "text_config."."""
    if isinstance(config, dict):
        yield "", config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            for place, level in _levels(value):
                yield f"{key}.{place}", level
