"""Merge LLM checkpoints for iterative self-improvement: exact, reproducible to the bit, streaming.

    merged = alpha * base + (1 - alpha) * (start + factor * DARE(sft - start))

Importing this package loads neither torch nor numba; each name below is imported when it is first used. IMMCallback
needs transformers, so that `import *` leaves it out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .analysis.change import weight_change
    from .analysis.gradients import layer_importance
    from .callback import IMMCallback as IMMCallback
    from .errors import (
        ArgumentError,
        ChangedError,
        CheckpointError,
        ExtraError,
        MergeError,
        MismatchError,
        NonFiniteError,
        OutputError,
        PartialMergeError,
        PlanError,
        RankError,
        VerifyError,
    )
    from .factors import group_factors, lines_factors
    from .importance import importance_factors
    from .live import merge_into
    from .merge import iter_merged, merge_checkpoints
    from .ops import dare, dare_merge, interpolate, keep_mask, task_vector
    from .ranks import Ranks
    from .recipe import MergeReport
    from .rounds import Rounds
    from .sparse import della, trim
    from .verification import VerifyReport, verify

_HOME = {
    "IMMCallback": "callback",
    "Rounds": "rounds",
    "ArgumentError": "errors",
    "ChangedError": "errors",
    "CheckpointError": "errors",
    "ExtraError": "errors",
    "MergeError": "errors",
    "MergeReport": "recipe",
    "MismatchError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PartialMergeError": "errors",
    "PlanError": "errors",
    "RankError": "errors",
    "Ranks": "ranks",
    "VerifyError": "errors",
    "VerifyReport": "verification",
    "dare": "ops",
    "dare_merge": "ops",
    "della": "sparse",
    "group_factors": "factors",
    "importance_factors": "importance",
    "interpolate": "ops",
    "iter_merged": "merge",
    "keep_mask": "ops",
    "layer_importance": "analysis.gradients",
    "lines_factors": "factors",
    "merge_checkpoints": "merge",
    "merge_into": "live",
    "task_vector": "ops",
    "trim": "sparse",
    "verify": "verification",
    "weight_change": "analysis.change",
}

__all__ = [
    "ArgumentError",
    "ChangedError",
    "CheckpointError",
    "ExtraError",
    "MergeError",
    "MergeReport",
    "MismatchError",
    "NonFiniteError",
    "OutputError",
    "PartialMergeError",
    "PlanError",
    "RankError",
    "Ranks",
    "Rounds",
    "VerifyError",
    "VerifyReport",
    "dare",
    "dare_merge",
    "della",
    "group_factors",
    "importance_factors",
    "interpolate",
    "iter_merged",
    "keep_mask",
    "layer_importance",
    "lines_factors",
    "merge_checkpoints",
    "merge_into",
    "task_vector",
    "trim",
    "verify",
    "weight_change",
]


if not TYPE_CHECKING:  # for whom names come from the imports above, and no others are there

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
