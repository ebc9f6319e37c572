"""Importance against change: rank correlation over layers, shares of thirds, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import MismatchError
from ..evaluation.bootstrap import Interval, bootstrap
from ..model.tensor_names import layer_order, resolve_layers, thirds
from ..options.layer_factors import importance_factors
from .change import WeightChange

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LEAST = 6  # layers for a verdict
THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Third:
    """A third of the layers, with its shares of total importance and total change (None if nothing changed)."""

    layers: tuple[str, ...]
    importance: float
    change: float | None


@dataclass(frozen=True, repr=False)
class Mismatch(Displayed):
    """Importance against change over the layers of one stack; `rho` uses Eq. 4, `relative` the relative change."""

    rho: Interval
    relative: Interval
    thirds: dict[str, Third]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "rho": self.rho.to_dict(), "relative": self.relative.to_dict()}

    def _summary(self) -> Summary:
        rows = [
            [
                name,
                str(len(each.layers)),
                *("-" if x is None else f"{100 * x:.3g} %" for x in (each.importance, each.change)),
            ]
            for name, each in self.thirds.items()
        ]
        return Summary(self.verdict, (), ("third", "layers", "importance", "change"), rows)


@dataclass(frozen=True, repr=False)
class ModelChange(Displayed):
    """One checkpoint in a report: its label, its change, and the mismatch if importance is given."""

    label: str
    change: WeightChange
    mismatch: Mismatch | None = None

    def _summary(self) -> Summary:
        change = self.change._summary()
        verdict = [] if self.mismatch is None else [self.mismatch.verdict]
        return Summary(f"{shown(self.label)}: {change.line}", [*verdict, *change.more], change.head, change.rows)

    def _picture(self) -> str:
        return self.change._picture()


def ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return ranks from 1, float64; equal values share their average rank.

    >>> ranks([10.0, 30.0, 10.0]).tolist()
    [1.5, 3.0, 1.5]
    """
    import numpy as np

    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    averages: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return averages


def spearman(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation: Pearson's correlation of average ranks; NaN if one input is constant.

    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16])
    1.0
    """
    x, y = ranks(one), ranks(other)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale else math.nan


def mismatch(importance: Mapping[str, float], change: WeightChange) -> Mismatch:
    """Compare which layers matter with which layers changed.

        rho = Spearman(I^n, DeltaW^n) over layers n, with a 95% bootstrap interval over layers

    Args: `importance`, layer key (or plain index) -> I^n >= 0, for all layers of one stack; `change` of the same model.
    Third t of N layers is floor(t N / 3) to floor((t + 1) N / 3) - 1. The verdict is superficial if the whole interval
    lies below 0, not superficial if it lies above, else undecided, as with fewer than 6 layers. Raises MismatchError
    for several stacks, ArgumentError for other layers and importances out of range.

    The rank correlation, its interval and the rule are ours: the paper (arXiv 2503.02103, section 3.2, figures 3 and 4)
    compares two figures by eye. Layers are not independent draws, so the interval is only a guide.

    >>> change = WeightChange({f"h.{i}": float(i) for i in range(6)}, {f"h.{i}": 1.0 for i in range(6)}, {}, {})
    >>> mismatch({f"h.{i}": 6.0 - i for i in range(6)}, change).rho.value
    -1.0
    """
    importance_factors(importance)
    values = same_layers(importance, change)
    keys = sorted(values, key=layer_order)
    of_importance = [values[key] for key in keys]
    of_change = [change.layers[key] for key in keys]
    rho = _interval(of_importance, of_change)
    relative = _interval(of_importance, [_number(change.relative[key]) for key in keys])
    total = math.fsum(of_change)
    shares = {
        name: Third(
            tuple(third),
            math.fsum(values[key] for key in third) / math.fsum(of_importance),
            math.fsum(change.layers[key] for key in third) / total if total else None,
        )
        for name, third in zip(THIRDS, thirds(keys), strict=True)
    }
    return Mismatch(rho, relative, shares, _verdict(rho))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _interval(one: list[float], other: list[float]) -> Interval:
    import numpy as np

    x, y = np.array(one), np.array(other)
    if np.isnan(y).any():
        return Interval(math.nan, math.nan, math.nan, len(x))
    return bootstrap(lambda i: spearman(x[i], y[i]), len(x))


def same_layers(importance: Mapping[str, float], change: WeightChange) -> dict[str, float]:
    """Return importances by the layer keys of `change`.

    Raises ArgumentError unless they cover whole stacks of these layers, MismatchError for several stacks.
    """
    values = resolve_layers(importance, [f"{key}.weight" for key in change.layers])
    named = {key.rpartition(".")[0] for key in values}
    if len(named) != 1:
        raise MismatchError(
            f"importance covers {len(named)} stacks of layers ({', '.join(map(shown, sorted(named)))}), which cannot be"
            " ranked together; give the importance of one stack"
        )
    return values


def _verdict(rho: Interval) -> str:
    found = f"rho {rho.value:+.2f} [{rho.low:+.2f}, {rho.high:+.2f}] over {rho.n} layers"
    if rho.n < LEAST:
        return f"Undecided: {rho.n} layers are too few (at least {LEAST})."
    if math.isnan(rho.value) or math.isnan(rho.low):
        return f"Undecided: all {rho.n} layers have the same importance or change, so there is no order to compare."
    if rho.is_below:
        return f"Looks superficial: the change is where importance is low ({found})."
    if rho.is_above:
        return f"Does not look superficial: the change is where importance is high ({found})."
    return f"Undecided: the interval contains 0 ({found})."
