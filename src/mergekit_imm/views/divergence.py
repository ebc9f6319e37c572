"""KL(base || model) of models: a table."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..analysis.divergence import Divergence
from ..common.messages import shown
from ..evaluation.reversal import FEWEST
from .tables import aligned


def kl_table(models: Mapping[str, Divergence]) -> str:
    """Return a line for each model: its KL from the base in nats per token, and the interval.

    >>> from mergekit_imm.evaluation import Interval
    >>> print(kl_table({"sft": Divergence(Interval(0.1, 0.05, 0.2, 9), (1.0,) * 9, (10,) * 9)}))
    KL(base || model), nats per token, on 90 tokens of 9 texts
    model     KL    95 % interval
    sft    0.100  [0.0500, 0.200]
    """
    rows = [["model", "KL", "95 % interval"]]
    for name, found in models.items():
        low, high = found.kl.low, found.kl.high
        interval = "-" if math.isnan(low) else f"[{_number(low)}, {_number(high)}]"
        rows.append([shown(name, 40), _number(found.kl.value), interval])
    any_model = next(iter(models.values()))
    texts = len(any_model.sums)
    head = f"KL(base || model), nats per token, on {sum(any_model.tokens)} tokens of {texts} texts"
    few = [f"no interval: fewer than {FEWEST} texts"] if texts < FEWEST else []
    return "\n".join([head, *aligned(rows), *few])


def _number(value: float) -> str:
    """Three digits, as KLs differ by powers of ten."""
    return f"{value:#.3g}"
