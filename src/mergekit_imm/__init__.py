"""Merge LLM checkpoints for iterative self-improvement: exact, reproducible to the bit, streaming.

    merged = alpha * base + (1 - alpha) * (start + factor * DARE(sft - start))

Importing this package loads neither torch nor numba; each name below is imported when it is first used. IMMCallback
needs transformers, so that `import *` leaves it out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .common.version import __version__ as __version__

if TYPE_CHECKING:
    from .analysis.change import weight_change
    from .analysis.gradients import layer_importance
    from .engine.merge import iter_merged, merge_checkpoints
    from .engine.report import MergeReport
    from .engine.verify import VerifyReport, verify
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
    from .functional.merge import dare, dare_merge, interpolate, keep_mask, task_vector
    from .functional.sparsify import della, trim
    from .live.merge_into import merge_into
    from .loop.rounds import Rounds
    from .loop.trainer_callback import IMMCallback as IMMCallback
    from .options.layer_factors import group_factors, importance_factors, lines_factors
    from .ranks.ranks import Ranks

_HOME = {
    "IMMCallback": "loop.trainer_callback",
    "Rounds": "loop.rounds",
    "ArgumentError": "errors",
    "ChangedError": "errors",
    "CheckpointError": "errors",
    "ExtraError": "errors",
    "MergeError": "errors",
    "MergeReport": "engine.report",
    "MismatchError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PartialMergeError": "errors",
    "PlanError": "errors",
    "RankError": "errors",
    "Ranks": "ranks.ranks",
    "VerifyError": "errors",
    "VerifyReport": "engine.verify",
    "dare": "functional.merge",
    "dare_merge": "functional.merge",
    "della": "functional.sparsify",
    "group_factors": "options.layer_factors",
    "importance_factors": "options.layer_factors",
    "interpolate": "functional.merge",
    "iter_merged": "engine.merge",
    "keep_mask": "functional.merge",
    "layer_importance": "analysis.gradients",
    "lines_factors": "options.layer_factors",
    "merge_checkpoints": "engine.merge",
    "merge_into": "live.merge_into",
    "task_vector": "functional.merge",
    "trim": "functional.sparsify",
    "verify": "engine.verify",
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
