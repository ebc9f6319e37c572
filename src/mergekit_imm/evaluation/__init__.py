"""Was the improvement real? Measures on samples of models before and after self-improvement.

Importing this package loads nothing; each name below is imported at its first use. The functions `bootstrap` and
`compare` are in the modules of the same names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bootstrap import Interval
    from .compare import Comparison, Measure, Report
    from .diversity import (
        cosine_diversity,
        distinct_equations,
        distinct_n,
        expectation_adjusted_distinct,
        mean_distinct,
    )
    from .passk import mean_pass_at_k, pass_at_k
    from .reversal import Reversal, group_disparity, improvement_set, judge
    from .samples import Model, Problem, Response, read_samples

_HOME = {
    "Comparison": "compare",
    "Interval": "bootstrap",
    "Measure": "compare",
    "Model": "samples",
    "Problem": "samples",
    "Report": "compare",
    "Response": "samples",
    "Reversal": "reversal",
    "cosine_diversity": "diversity",
    "distinct_equations": "diversity",
    "distinct_n": "diversity",
    "expectation_adjusted_distinct": "diversity",
    "group_disparity": "reversal",
    "improvement_set": "reversal",
    "judge": "reversal",
    "mean_distinct": "diversity",
    "mean_pass_at_k": "passk",
    "pass_at_k": "passk",
    "read_samples": "samples",
}

__all__ = [
    "Comparison",
    "Interval",
    "Measure",
    "Model",
    "Problem",
    "Report",
    "Response",
    "Reversal",
    "cosine_diversity",
    "distinct_equations",
    "distinct_n",
    "expectation_adjusted_distinct",
    "group_disparity",
    "improvement_set",
    "judge",
    "mean_distinct",
    "mean_pass_at_k",
    "pass_at_k",
    "read_samples",
]


if not TYPE_CHECKING:  # type checkers use the imports above, and refuse other names

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
