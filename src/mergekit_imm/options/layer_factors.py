"""Layer factors: multipliers of each layer's delta.

    tuned = start + factor * DARE(sft - start)

Given as a mapping layer key -> factor, as a rule ("lines:0.3,1", "groups:0.5,1,0.5"), or computed by IIMM from layer
importances, which `layer_importance` measures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.checks import as_number, is_number
from ..common.display import Displayed, Summary, bars
from ..common.json_files import parse_json, without_duplicates
from ..common.messages import first_few, shown
from ..errors import ArgumentError
from ..model.tensor_names import layer_order, resolve_layers, stacks, thirds
from ..numerics.mask import check_factor

IMPORTANCE_FORMAT, IMPORTANCE_VERSION = "mergekit_imm importance", 1
OUTSIDE = "outside"  # key for tensors in no layer: embeddings, final norm, head
_RULES = {"lines": 2, "groups": 3}
_RULES_TEXT = "lines:FIRST,LAST and groups:EARLY,MIDDLE,LATE"


@dataclass(frozen=True, repr=False)
class Importance(Displayed):
    """Result of `layer_importance`. All importances are in nats: they estimate changes of the mean loss.

    layers: layer key -> I_n, the sum over the layer's linear weights. outside: sums over all other parameters:
    "embeddings", "head", "norms", "biases", "other" (norms and biases inside layers too); they yield no factors.
    modules: kind of weight (its name without numbers) -> layer key -> its part of I_n. unused: layer stacks that the
    loss does not use, such as a vision tower without pictures; `layers` leaves them out. order: as given to
    `layer_importance`. sequences, tokens: how many were used; tokens counts only those in the loss. loss: mean loss of
    these tokens, in nats per token.
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
        """Return the content of an importance file, which `imm-merge --importance` reads."""
        content = {"format": IMPORTANCE_FORMAT, "version": IMPORTANCE_VERSION, **asdict(self)}
        return content | {"unused": list(self.unused)}

    def _summary(self) -> Summary:
        total = math.fsum(self.layers.values()) or 1.0
        shares = ", ".join(
            f"{name} {100 * math.fsum(self.layers[key] for key in third) / total:.3g} %"
            for name, third in zip(("early", "middle", "late"), thirds(list(self.layers)), strict=True)
        )
        line = f"{len(self.layers)} layers, order {self.order}; by thirds: {shares}"
        measured = f"{self.sequences} sequences, {self.tokens} tokens, loss {self.loss:.4f} nats a token"
        unused = [f"not used by the loss: {first_few([*map(shown, self.unused)], ', ')}"] if self.unused else []
        rows = [[shown(key, 40), f"{value:.4g}"] for key, value in self.outside.items() if value]
        return Summary(line, [measured, *unused], ("outside the layers", "nats"), rows)

    def _picture(self) -> str:
        return bars(self.layers, "importance by layer, nats") if self.layers else ""


def importance_factors(
    importance: Mapping[str, float], *, shrink: float = 1.0, clip: tuple[float, float] | None = None
) -> dict[str, float]:
    """Compute IIMM layer factors, of mean 1, from layer importances.

        c_n = N * I_n / sum(I);   c_n <- 1 + shrink * (c_n - 1);   c_n <- min(max(c_n, low), high)

    Args:
        importance: layer key (`model.layers.3`, or `3`) -> I_n, finite and >= 0, with a positive sum. The unit does
            not matter: only ratios count.
        shrink: 0 to 1, pulls the factors towards 1; at 0 the merge is that of Eq. 6. The mean stays 1.
        clip: (low, high) with 0 <= low <= high, clamps the factors after shrinking. The mean may then differ from 1.

    Returns the factors as floats under the same keys; N and the sum run over the layers given. Raises ArgumentError
    for an empty mapping or values out of range.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 7; `shrink` and
    `clip` are not in the paper.

    >>> importance_factors({"model.layers.0": 1.0, "model.layers.1": 3.0})
    {'model.layers.0': 0.5, 'model.layers.1': 1.5}
    >>> importance_factors({"model.layers.0": 1.0, "model.layers.1": 3.0}, shrink=0.5, clip=(0.0, 1.2))
    {'model.layers.0': 0.75, 'model.layers.1': 1.2}
    """
    shrink = check_shrink(shrink)
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
    factors = {key: len(values) * value / total for key, value in values.items()}
    if not all(map(math.isfinite, factors.values())):
        raise ArgumentError("importances are too large to compute factors; only ratios count: divide all by one number")
    if shrink != 1:
        factors = {key: 1 + shrink * (factor - 1) for key, factor in factors.items()}
    if clip is not None:
        low, high = map(float, clip)
        factors = {key: min(max(factor, low), high) for key, factor in factors.items()}
    return factors


def check_shrink(shrink: float) -> float:
    """Return shrink as a Python number, or raise ArgumentError unless 0 <= shrink <= 1."""
    if not is_number(shrink) or not 0 <= shrink <= 1:
        raise ArgumentError(f"shrink is {shown(repr(shrink), 60)}; it must be a number from 0 to 1")
    return as_number(shrink)  # type: ignore[no-any-return]


def read_importance(path: str | Path) -> dict[str, float]:
    """Read an importance file: a JSON mapping layer key -> importance, bare or under "layers".

    Raises ArgumentError.
    """
    return read_layers(path, "importance")[0]


def read_layers(path: str | Path, what: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Read a JSON mapping of layers to numbers, bare or under "layers"; return it and the file's whole content."""
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


def lines_factors(layers: Iterable[str], first: float, last: float) -> dict[str, float]:
    """Return LiNeS factors, linear in depth from the first layer to the last.

        factor_l = first + (last - first) * l / (L - 1)      l = 0..L-1;   everything outside the layers: first

    Args:
        layers: layer keys (`model.layers.3`) or tensor names. Each stack of layers has its own line; a single layer
            counts as the last.
        first, last: factors >= 0.

    Returns factors by layer key, and one for "outside". Raises ArgumentError for a factor out of range.

    Source: LiNeS (arXiv 2410.17146), with first = alpha and last = alpha + beta; the authors' code also multiplies
    tensors outside the layers by alpha.

    >>> lines_factors(["h.0", "h.1", "h.2"], 0.5, 1.0)
    {'h.0': 0.5, 'h.1': 0.75, 'h.2': 1.0, 'outside': 0.5}
    """
    first, last = check_factor(first), check_factor(last)
    factors: dict[str, float] = {}
    for keys in _stacks(layers):
        for number, key in enumerate(keys):
            factors[key] = first + (last - first) * (number / (len(keys) - 1)) if len(keys) > 1 else last
    return {**factors, OUTSIDE: first}


def group_factors(layers: Iterable[str], early: float, middle: float, late: float) -> dict[str, float]:
    """Return one factor for each third of the layers.

        factor_l = early, middle or late, by the third of the L layers that l is in;   outside the layers: 1

    Args and errors as in `lines_factors`. Returns factors by layer key.

    Source: the early, middle and late layers of arXiv 2503.02103; the cut where 3 does not divide L is ours.

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
    """Return the layer keys of each stack, ordered by their numbers."""
    keys_of = stacks(f"{layer}.weight" if layer.rpartition(".")[2].isdigit() else layer for layer in layers)
    return [sorted(keys, key=layer_order) for keys in keys_of.values()]


def is_rule(text: str) -> bool:
    """Whether a string is meant as a rule, not as a file.

    >>> is_rule("lines:0.3"), is_rule("factors.json")
    (True, False)
    """
    return ":" in text and text.partition(":")[0] in _RULES


def check_rule(text: str) -> tuple[str, list[float]]:
    """Parse a rule into its kind and numbers. Raises ArgumentError.

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
    """Return a rule unchanged, or read a JSON file: layer key -> factor, bare or under "layers" beside "outside".

    Raises ArgumentError.
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
            f"{shown(text)} has '{shown(other[0])}' beside its layers; only \"{OUTSIDE}\" may stand there"
        )
    return layers | ({OUTSIDE: content[OUTSIDE]} if OUTSIDE in content else {})


def check_factors(factors: Mapping[str, float] | str) -> None:
    """Raise ArgumentError unless the factors are a mapping of finite numbers >= 0, or a rule."""
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
    """Return a model's layer factors by full layer key, and that of tensors outside the layers under ""."""
    names = list(names)
    check_factors(factors)
    if isinstance(factors, str):
        kind, values = check_rule(factors)
        if not stacks(names):
            raise ArgumentError(f"layer factors '{shown(factors)}' need layers, and the model has none")
        factors = (lines_factors if kind == "lines" else group_factors)(names, *values)
    layers = {str(key): value for key, value in factors.items() if key != OUTSIDE}
    return {**resolve_layers(layers, names), "": factors.get(OUTSIDE, 1.0)}
