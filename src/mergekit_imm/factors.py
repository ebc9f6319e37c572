"""Layer factors: by how much the delta of each layer is multiplied before it is merged.

    tuned = start + factor * DARE(sft - start)

A mapping layer key -> factor, or a rule that makes one of a model's layers: "lines:0.3,1" and "groups:0.5,1,0.5".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import ArgumentError, shown
from .importance import IMPORTANCE_FORMAT, importance_factors, read_layers
from .layers import layer_order, resolve_layers, stacks, thirds
from .mask import check_factor

OUTSIDE = "outside"  # embeddings, final norm, head: what lies in no layer
_RULES = {"lines": 2, "groups": 3}
_RULES_TEXT = "lines:FIRST,LAST and groups:EARLY,MIDDLE,LATE"


def lines_factors(layers: Iterable[str], first: float, last: float) -> dict[str, float]:
    """Return factors that grow with depth, on a line from the first layer to the last: LiNeS.

        factor_l = first + (last - first) * l / (L - 1)      l = 0..L-1;   everything outside the layers: first

    Args: `layers`, layer keys (`model.layers.3`) or names of tensors; each stack of layers has its own line; a single
    layer is the last. The factors, >= 0, need no mean of 1. Returns them by layer key, and one for "outside".

    Source: LiNeS (arXiv 2410.17146), with first = alpha and last = alpha + beta; its authors' code multiplies what is
    in no layer by alpha, as here.

    >>> lines_factors(["h.0", "h.1", "h.2"], 0.5, 1.0)
    {'h.0': 0.5, 'h.1': 0.75, 'h.2': 1.0, 'outside': 0.5}
    """
    first, last = check_factor(first), check_factor(last)
    found: dict[str, float] = {}
    for keys in _stacks(layers):
        for number, key in enumerate(keys):
            found[key] = first + (last - first) * (number / (len(keys) - 1)) if len(keys) > 1 else last
    return {**found, OUTSIDE: first}


def group_factors(layers: Iterable[str], early: float, middle: float, late: float) -> dict[str, float]:
    """Return one factor for each third of the layers.

        factor_l = early, middle or late, by the third of the L layers that l is in;   outside the layers: 1

    Args as in `lines_factors`. The thirds are `layers.thirds`: early, middle and late layers, as the paper speaks of
    them; where L is no multiple of three the cut is ours.

    >>> group_factors(["h.0", "h.1", "h.2", "h.3"], 0.5, 1.0, 0.25)
    {'h.0': 0.5, 'h.1': 1.0, 'h.2': 0.25, 'h.3': 0.25}
    """
    values = [check_factor(value) for value in (early, middle, late)]
    return {
        key: value
        for keys in _stacks(layers)
        for value, third in zip(values, thirds(keys), strict=True)
        for key in third
    }


def _stacks(layers: Iterable[str]) -> list[list[str]]:
    """Layer keys, stack by stack, each in the order of its numbers."""
    found = stacks(f"{layer}.weight" if layer.rpartition(".")[2].isdigit() else layer for layer in layers)
    return [sorted(keys, key=layer_order) for keys in found.values()]


def is_rule(text: str) -> bool:
    """Whether a text is meant as a rule, and not as a file.

    >>> is_rule("lines:0.3"), is_rule("factors.json")
    (True, False)
    """
    return ":" in text and text.partition(":")[0] in _RULES


def check_rule(text: str) -> tuple[str, list[float]]:
    """Return the kind and the numbers of a rule. Raises ArgumentError for any other text.

    >>> check_rule("groups:0.5,1,0.5")
    ('groups', [0.5, 1.0, 0.5])
    """
    kind, _, rest = text.partition(":")
    try:
        values = [check_factor(float(part)) for part in rest.split(",")]
    except ValueError:
        values = []
    if kind not in _RULES or len(values) != _RULES[kind]:
        raise ArgumentError(
            f"layer factors '{shown(text)}' are not understood; rules are {_RULES_TEXT}, with factors >= 0"
        )
    return kind, values


def read_layer_factors(given: str | Path) -> dict[str, float] | str:
    """Return what an option names: a rule as it is, or what stands in a JSON file, layer key -> factor.

    A file may hold the mapping under "layers", with "outside" beside it. Raises ArgumentError.
    """
    text = str(given)
    if not isinstance(given, Path) and is_rule(text):
        check_rule(text)
        return text
    try:
        layers, content = read_layers(given, "layer factors")
    except ArgumentError as error:
        rules = "" if Path(text).expanduser().exists() else f"; rules are {_RULES_TEXT}"
        raise ArgumentError(f"{error}{rules}") from error
    if content.get("format") == IMPORTANCE_FORMAT:
        raise ArgumentError(f"{shown(text)} holds importances, not factors; give it as --importance")
    other = sorted(set(content) - {"layers", OUTSIDE}) if "layers" in content else []
    if other:
        raise ArgumentError(
            f"{shown(text)} has '{shown(other[0])}' beside its layers; it may have \"{OUTSIDE}\", and nothing else"
        )
    return layers | ({OUTSIDE: content[OUTSIDE]} if OUTSIDE in content else {})


def check_factors(factors: Mapping[str, float] | str) -> None:
    """Raise ArgumentError unless these are layer factors: finite numbers >= 0, or a rule."""
    if isinstance(factors, str):
        check_rule(factors)
        return
    if not isinstance(factors, Mapping) or not factors:
        raise ArgumentError(f"layer factors are {factors!r:.60}; give a mapping of layers, or lines:FIRST,LAST")
    for key, value in factors.items():
        try:
            check_factor(value)
        except ArgumentError as error:
            raise ArgumentError(f"factor of layer '{shown(key)}': {error}") from error


def resolve_factors(factors: Mapping[str, float] | str, names: Iterable[str]) -> dict[str, float]:
    """Return the factors of a model's layers by full layer key; that of everything outside of them under ""."""
    names = list(names)
    check_factors(factors)
    if isinstance(factors, str):
        kind, values = check_rule(factors)
        if not stacks(names):
            raise ArgumentError(f"layer factors '{shown(factors)}' need layers, and the model has none")
        factors = (lines_factors if kind == "lines" else group_factors)(names, *values)
    layers = {str(key): value for key, value in factors.items() if key != OUTSIDE}
    return {**resolve_layers(layers, names), "": factors.get(OUTSIDE, 1.0)}


def factors_of(
    names: Iterable[str],
    importance: Mapping[str, float] | None,
    factors: Mapping[str, float] | str | None,
    shrink: float = 1.0,
    clip: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Return the factors of a merge, of either an importance (IIMM) or given factors, by full layer key."""
    if factors is not None:
        return resolve_factors(factors, names)
    if importance is None:
        return {}
    return resolve_factors(importance_factors(importance, shrink=shrink, clip=clip), names)
