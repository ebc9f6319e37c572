"""Importance against change: did a fine-tuning move the layers that matter? The rule is ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError, shown
from ..evaluation.bootstrap import Interval, bootstrap
from .change import WeightChange, by_stack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = Sequence[float] | npt.NDArray[np.float64]

FEWEST = 6  # layers of which anything is said
THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Third:
    """A third of the layers: how many, and their share of the importance and of the change of all."""

    layers: int
    importance: float
    change: float


@dataclass(frozen=True)
class Mismatch:
    """What `mismatch` found of one stack of layers.

    rho: Spearman's rank correlation of importance and change (Eq. 3 and 4) over the layers, with its bootstrap
    interval. relative: the same with the change relative to the weights. thirds: "early", "middle", "late".
    superficial: True, False, or None where it cannot be told. verdict: that in one sentence, with its numbers.
    """

    stack: str
    rho: Interval
    relative: Interval
    thirds: dict[str, Third]
    superficial: bool | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"rho": self.rho.to_dict(), "relative": self.relative.to_dict()}


def spearman(one: Values, other: Values) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs.

    NaN if one of them is constant, or has fewer than two values. Source: Spearman, "The proof and measurement of
    association between two things", 1904.

    >>> spearman([1, 2, 3, 4], [10, 9, 9, 1])
    -0.9486832980505138
    """
    import numpy as np

    ranks = [_ranks(np.asarray(values, np.float64)) for values in (one, other)]
    a, b = (each - each.mean() for each in ranks)
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def _ranks(values: Any) -> Any:
    """Ranks from 0, equal values with the mean of theirs."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]


def mismatch(importance: Mapping[str, float], change: WeightChange) -> list[Mismatch]:
    """Compare where weights matter with where they changed, for each stack of layers that importances name.

        rho = Spearman(I_n, DeltaW_n) over layers n
        superficial:   all of the 95 % interval of rho lies below 0: the change is where importance is not
        not so:        all of it lies above 0
        else, or with fewer than 6 layers: it cannot be told

    The interval is a bootstrap over layers. Layers of a model are few and no random sample, so that it is a measure of
    how firm the order is, not a test. The rule is ours: the paper (section 3.2, figures 3, 4 and 10) compares plots.

    Args: `importance`, layer key -> I_n (Eq. 3), of whole stacks; `change`, by `weight_change`. Raises MismatchError if
    layers have an importance and no change, or the other way round.

    >>> from mergekit_imm.analysis.change import Norms, summed
    >>> sizes = [1.0, 2.0, 4.0, 7.0, 5.0, 6.0]
    >>> change = summed({f"h.{n}.q.weight": Norms(size, 10.0, (2, 2)) for n, size in enumerate(sizes)})
    >>> (found,) = mismatch({f"h.{n}": 10 - size for n, size in enumerate(sizes)}, change)
    >>> found.rho.value, found.superficial
    (-1.0, True)
    """
    found = []
    changed = dict(by_stack(change.layers))
    for stack, keys in by_stack(importance):
        there = changed.get(stack, [])
        lacking = sorted(set(keys) ^ set(there))
        if lacking:
            where = "an importance, but no change" if lacking[0] in keys else "changed, but has no importance"
            known = ", ".join(map(shown, changed)) or "none"
            raise MismatchError(
                f"layer '{shown(lacking[0])}' has {where}; {len(lacking)} of {max(len(keys), len(there))} layers are"
                f" not in both (stacks that changed: {known}); give the importance of this very model"
            )
        found.append(_of_stack(stack, [importance[key] for key in keys], [change.layers[key] for key in keys]))
    return found


def _of_stack(stack: str, importance: list[float], amounts: list[Any]) -> Mismatch:
    import numpy as np

    size = np.array(importance, np.float64)
    change = np.array([each.change for each in amounts])
    relative = np.array([math.nan if each.relative is None else each.relative for each in amounts])
    n = len(size)
    rho = bootstrap(lambda i: spearman(size[i], change[i]), n)
    of_relative = (
        bootstrap(lambda i: spearman(size[i], relative[i]), n)
        if np.isfinite(relative).all()
        else Interval(math.nan, math.nan, math.nan, n)
    )
    thirds = {
        name: Third(
            sum(3 * k // n == number for k in range(n)),
            *(
                sum(float(v) for k, v in enumerate(values) if 3 * k // n == number) / (float(values.sum()) or math.nan)
                for values in (size, change)
            ),
        )
        for number, name in enumerate(THIRDS)
    }
    superficial = None if n < FEWEST else True if rho.is_below else False if rho.is_above else None
    return Mismatch(stack, rho, of_relative, thirds, superficial, _verdict(rho, thirds, superficial, n))


def _verdict(rho: Interval, thirds: Mapping[str, Third], superficial: bool | None, n: int) -> str:
    most = max(thirds, key=lambda name: thirds[name].change)
    numbers = f"rho {rho.value:+.2f}, 95 % interval {rho.low:+.2f} to {rho.high:+.2f}, {n} layers"
    third = (
        f"the {most} third has {thirds[most].change:.0%} of the change and {thirds[most].importance:.0%} of the"
        " importance"
    )
    if n < FEWEST:
        return f"Too few layers to tell whether this fine-tuning is superficial ({n}, fewer than {FEWEST}); {third}."
    if math.isnan(rho.value):
        return f"It cannot be told whether this fine-tuning is superficial: all layers changed alike; {third}."
    if superficial:
        return f"This fine-tuning looks superficial: it changed the layers that matter less ({numbers}); {third}."
    if superficial is False:
        return f"This fine-tuning does not look superficial: it changed the layers that matter ({numbers}); {third}."
    return f"It cannot be told whether this fine-tuning is superficial ({numbers}); {third}."
