"""Layer importance and the factors that IIMM makes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArgumentError, shown
from .json_input import parse_json, without_duplicates


def importance_factors(
    importance: Mapping[str, float], *, shrink: float = 1.0, clip: tuple[float, float] | None = None
) -> dict[str, float]:
    """Turn layer importances into IIMM layer factors of mean 1.

        c_n = N * I_n / sum(I);   c_n <- 1 + shrink * (c_n - 1);   then clipped to clip = (low, high)

    Args: `importance`, layer key (`model.layers.3`, or `3`) -> I_n, finite and >= 0 with a positive sum. Any
    unit: only ratios count. `shrink`, 0 to 1, pulls the factors towards 1, which keeps their mean; `clip` does not keep
    it. Both are ours, not the paper's. Returns the factors under the same keys, as doubles; N and the sum run over the
    layers given. Raises ArgumentError for an empty mapping or values out of range.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 7.

    >>> importance_factors({"model.layers.0": 1.0, "model.layers.1": 3.0})
    {'model.layers.0': 0.5, 'model.layers.1': 1.5}
    """
    if not importance:
        raise ArgumentError("importance is empty; give one value for each layer")
    values = {}
    for key, value in importance.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= sys.float_info.max:
            raise ArgumentError(
                f"importance of layer '{shown(key)}' is {shown(repr(value), 60)}; it must be a finite number >= 0"
            )
        values[str(key)] = float(value)
    try:
        total = math.fsum(values.values())
    except OverflowError:
        total = math.inf
    if not 0 < total < math.inf:
        raise ArgumentError(f"importances sum to {total}; at least one must be > 0, and the sum finite")
    if not 0 <= shrink <= 1:
        raise ArgumentError(f"shrink is {shrink!r}; it is a number from 0 (all factors are 1) to 1 (as they are)")
    factors = {key: len(values) * value / total for key, value in values.items()}
    if shrink != 1:
        factors = {key: 1 + shrink * (factor - 1) for key, factor in factors.items()}
    if clip is not None:
        low, high = clip
        if not 0 <= low <= high < math.inf:
            raise ArgumentError(f"clip is {clip!r}; it is two numbers, 0 <= low <= high")
        factors = {key: min(max(factor, low), high) for key, factor in factors.items()}
    return factors


def read_importance(path: str | Path) -> dict[str, float]:
    """Read an importance file: a JSON mapping layer key -> importance, bare or under "layers".

    Raises ArgumentError if it is not one.
    """
    return read_layers(path, "importance")[0]


def read_layers(path: str | Path, what: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Read a JSON file that maps layers to numbers, bare or under "layers"; return the mapping, and all it holds."""
    try:
        content = parse_json(Path(path).read_bytes(), without_duplicates)
    except OSError as error:
        raise ArgumentError(f"{what} file {shown(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArgumentError(f"{what} file {shown(path)} is not JSON: {shown(error, 200)}") from error
    layers = content.get("layers", content) if isinstance(content, dict) else content
    if not isinstance(layers, dict):
        raise ArgumentError(
            f'{what} file {shown(path)} must hold a mapping {{"model.layers.0": 1.5, ...}}, bare or under "layers"'
        )
    return layers, content
