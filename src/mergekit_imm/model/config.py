"""config.json: do the models belong together, are their embeddings tied, and what the merged one must say."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ..common.messages import shown
from ..errors import MismatchError

Config = Mapping[str, Any]
# Settings that decide neither which tensors there are nor their shapes.
_NO_TENSORS = re.compile(
    "architectures|cache|checkpoint|dropout|dtype|^output_|^return_|^tie_|token_i|torchscript|version|^vocab_size$|window"
)
_QUANTISED = ("quantization_config", "compression_config")


def check_configs(configs: Mapping[str, tuple[str, Config | None]], renamed: Collection[str] = ()) -> None:
    """Check the configs of all inputs: role -> (label for messages, config or None).

    A model may be another class of the same model: a part of it alone, or it with other parts. One in `renamed`, whose
    names were taken for the base's, need only have a part in common with it. Raises MismatchError for different
    architectures.
    """
    base_label, base = configs["base"]
    for role, (label, config) in configs.items():
        for key in ("model_type", "architectures"):
            if role == "base" or not base or not config or not base.get(key) or config.get(key) == base[key]:
                continue
            if not _is_related(config, base, role in renamed):
                raise MismatchError(
                    f"{base_label} has {key} {shown(base[key])}, {label} has {shown(config.get(key) or 'none')};"
                    " they must be one architecture"
                )


def is_other_class(config: Config | None, base: Config | None) -> bool:
    """Whether a config is that of a part of the base's model, or of one that the base is a part of.

    >>> is_other_class({"model_type": "m_text"}, {"model_type": "m", "text_config": {"model_type": "m_text"}})
    True
    """
    kinds = [each.get("model_type") if each else None for each in (config, base)]
    if config is None or base is None or None in kinds or kinds[0] == kinds[1]:
        return False
    return kinds[0] in _types(base) or kinds[1] in _types(config)


def _is_related(config: Config, base: Config, renamed: bool) -> bool:
    return is_other_class(config, base) or (renamed and bool(_types(base) & _types(config)))


def _types(config: Config) -> set[str]:
    """The model types of a config and of those nested in it."""
    found = (level.get("model_type") for _, level in _levels(config))
    return {kind for kind in found if isinstance(kind, str)}


def quantisation(config: Config | None) -> tuple[str, Mapping[str, Any]] | None:
    """Return where a config says that its model is quantised, `text_config.quantization_config`, and what it says."""
    for place, level in _levels(config or {}):
        for key in _QUANTISED:
            if level.get(key):
                return f"{place}{key}", level[key] if isinstance(level[key], Mapping) else {}
    return None


def says_tied(config: Config | None) -> bool:
    """Whether a config ties the output head to the input embedding; transformers' default is that it does."""
    return config is not None and tie_said(config) is not False


def setting(config: Config | None, key: str) -> Any:
    """What a config says about its language model: at the top, else in `text_config`; None if nothing."""
    levels = (config, (config or {}).get("text_config"))
    return next((level[key] for level in levels if isinstance(level, Mapping) and key in level), None)


def differences(one: Config | None, other: Config | None) -> list[tuple[str, Any, Any]]:
    """Return what two configs say otherwise that may decide which tensors there are: (place, in one, in the other)."""
    known = dict(_levels(other or {}))
    return [
        (f"{place}{key}", value, known[place][key])
        for place, level in _levels(one or {})
        for key, value in level.items()
        if isinstance(value, (int, list)) and not _NO_TENSORS.search(key)
        and place in known and type(known[place].get(key)) is type(value) and known[place][key] != value
    ]  # fmt: skip


def tie_said(config: Config | None) -> bool | None:
    """Whether a config says that the head is tied; None if it does not say."""
    for level in (config or {}, (config or {}).get("text_config")):
        if isinstance(level, Mapping) and "tie_word_embeddings" in level:
            return bool(level["tie_word_embeddings"])
    return None


def vocabulary_sizes(config: Config | None) -> set[int]:
    """The vocabulary sizes that a config and those nested in it name."""
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
    """Return the config of a merged model, and the changes made to sft's (base's, if sft has none).

    `dtype` is the torch name of the float tensors written (None: there are none), `tied` whether head and
    embedding were written as one tensor (None: nothing to say), `rows` the row counts of the input embeddings,
    `resized` those of vocabularies as the inputs have them -> as merged, `quantised` where the config of quantised
    tensors that were copied has its quantization_config, and what it is.
    Changes are keyed by their place, `text_config.dtype`; None is for what was taken out.
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
            if level.get(key) and (quantised is None or quantised[0] != f"{place}{key}"):  # what is merged is not
                del level[key]
                changes[f"{place}{key}"] = None
    if quantised is not None:
        where, _, key = quantised[0].rpartition(".")
        where = f"{where}." if f"{where}." in dict(_levels(config)) else ""
        put(where, dict(_levels(config))[where], key, copy.deepcopy(quantised[1]))
    before = dict(_levels(base or {}))
    for place, level in _levels(config):
        # Trainers that recompute activations turn the cache off, and save the model so; whoever generates needs it.
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
    """The config itself and the configs nested in it, each with its place: "" and "text_config."."""
    if isinstance(config, dict):
        yield "", config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            for place, level in _levels(value):
                yield f"{key}.{place}", level
