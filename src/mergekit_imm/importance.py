"""Layer importance, as it was measured and as files hold it, and the factors that IIMM makes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import ArgumentError, shown
from .json_input import parse_json, without_duplicates
from .mask import as_number, is_number

IMPORTANCE_FORMAT, IMPORTANCE_VERSION = "mergekit_imm importance", 1


@dataclass(frozen=True)
class Importance:
    """What `layer_importance` measured. All importances are in nats: they estimate differences of the mean loss.

    layers: layer key -> I_n, the sum over the layer's linear weights. outside: the same sums over all that is no
    linear weight of a layer: "embeddings", "head", "norms", "biases", "other" (norms and biases of the layers too);
    factors are not made of them. modules: kind of weight, its name without its numbers -> layer key -> its part of
    I_n. unused: stacks of layers that took no part in the loss, as a vision tower that saw no picture; they are not
    among `layers`. order: of `layer_importance`. sequences, tokens: of how many it is; only tokens that count in the
    loss. loss: their mean loss, in nats per token.
    """

    layers: dict[str, float]
    outside: dict[str, float]
    modules: dict[str, dict[str, float]]
    unused: tuple[str, ...]
    order: str
    sequences: int
    tokens: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as files hold it; `read_importance` and `imm-merge --importance` take that."""
        content = {"format": IMPORTANCE_FORMAT, "version": IMPORTANCE_VERSION, **asdict(self)}
        return content | {"unused": list(self.unused)}


def importance_factors(
    importance: Mapping[str, float], *, shrink: float = 1.0, clip: tuple[float, float] | None = None
) -> dict[str, float]:
    """Turn layer importances into IIMM layer factors of mean 1.

        c_n = N * I_n / sum(I);   c_n <- 1 + shrink * (c_n - 1);   c_n <- min(max(c_n, low), high)

    Args: `importance`, layer key (`model.layers.3`, or `3`) -> I_n, finite and >= 0 with a positive sum. Any
    unit: only ratios count. `shrink`, 0 to 1, pulls the factors towards 1: at 0 the merge is that of Eq. 6. `clip`,
    (low, high) with 0 <= low <= high, cuts them off after that. Both are ours, not the paper's; the mean stays 1 when
    factors shrink, and need no longer be 1 when some are cut off. Returns the factors under the same keys, as
    doubles; N and the sum run over the layers given. Raises ArgumentError for an empty mapping or values out of
    range.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 7.

    >>> importance_factors({"model.layers.0": 1.0, "model.layers.1": 3.0})
    {'model.layers.0': 0.5, 'model.layers.1': 1.5}
    >>> importance_factors({"model.layers.0": 1.0, "model.layers.1": 3.0}, shrink=0.5, clip=(0.0, 1.2))
    {'model.layers.0': 0.75, 'model.layers.1': 1.2}
    """
    if not is_number(shrink) or not 0 <= shrink <= 1:
        raise ArgumentError(f"shrink is {shown(repr(shrink), 60)}; it must be a number from 0 to 1")
    if clip is not None:
        pair = list(map(as_number, clip)) if isinstance(clip, (tuple, list)) else []
        is_pair = len(pair) == 2 and all(map(is_number, pair))
        if not is_pair or not 0 <= pair[0] <= pair[1] <= sys.float_info.max:
            raise ArgumentError(
                f"clip is {shown(repr(clip), 60)}; it must be (low, high), two finite numbers with 0 <= low <= high"
            )
    if not isinstance(importance, Mapping):
        raise ArgumentError(f"importance is {shown(repr(importance), 60)}; give a mapping layer -> importance")
    if not importance:
        raise ArgumentError("importance is empty; give one value for each layer")
    values = {}
    for key, given in importance.items():
        value = as_number(given)
        if not is_number(value) or not 0 <= value <= sys.float_info.max:
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
    shrink = as_number(shrink)
    factors = {key: len(values) * value / total for key, value in values.items()}
    if not all(map(math.isfinite, factors.values())):
        raise ArgumentError("importances are too large to make factors of; only ratios count: divide all by one number")
    if shrink != 1:
        factors = {key: 1 + shrink * (factor - 1) for key, factor in factors.items()}
    if clip is not None:
        low, high = map(float, clip)
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
        content = parse_json(Path(path).expanduser().read_bytes(), without_duplicates)
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
