"""Merge LLM checkpoints for iterative self-improvement: exact, reproducible to the bit, streaming.

    merged = alpha * base + (1 - alpha) * (start + factor * DARE(sft - start))

Importing this package loads neither torch nor numba; each name below is imported when it is first used. IMMCallback
needs transformers, so `import *` leaves it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common.version import __version__ as __version__

if TYPE_CHECKING:
    from .analysis.auditing import AuditReport as AuditReport
    from .analysis.auditing import audit as audit
    from .analysis.change import weight_change as weight_change
    from .analysis.gradients import layer_importance as layer_importance
    from .engine.merge import iter_merged as iter_merged
    from .engine.merge import merge_checkpoints as merge_checkpoints
    from .engine.report import MergeReport as MergeReport
    from .engine.verify import VerifyReport as VerifyReport
    from .engine.verify import verify as verify
    from .errors import ArgumentError as ArgumentError
    from .errors import ChangedError as ChangedError
    from .errors import CheckpointError as CheckpointError
    from .errors import ExtraError as ExtraError
    from .errors import MergeError as MergeError
    from .errors import MismatchError as MismatchError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import OutputError as OutputError
    from .errors import PartialMergeError as PartialMergeError
    from .errors import PlanError as PlanError
    from .errors import RankError as RankError
    from .errors import VerifyError as VerifyError
    from .functional.merge import dare as dare
    from .functional.merge import dare_merge as dare_merge
    from .functional.merge import interpolate as interpolate
    from .functional.merge import keep_mask as keep_mask
    from .functional.merge import task_vector as task_vector
    from .functional.sparsify import della as della
    from .functional.sparsify import trim as trim
    from .live.merge_into import merge_into as merge_into
    from .live.merged_stream import merged_stream as merged_stream
    from .loop.rounds import Rounds as Rounds
    from .loop.trainer_callback import IMMCallback as IMMCallback
    from .options.layer_factors import group_factors as group_factors
    from .options.layer_factors import importance_factors as importance_factors
    from .options.layer_factors import lines_factors as lines_factors
    from .ranks.ranks import Ranks as Ranks
else:
    from .common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".analysis.auditing": "AuditReport audit",
            ".analysis.change": "weight_change",
            ".analysis.gradients": "layer_importance",
            ".engine.merge": "iter_merged merge_checkpoints",
            ".engine.report": "MergeReport",
            ".engine.verify": "VerifyReport verify",
            ".errors": (
                "ArgumentError ChangedError CheckpointError ExtraError MergeError MismatchError NonFiniteError "
                "OutputError PartialMergeError PlanError RankError VerifyError"
            ),
            ".functional.merge": "dare dare_merge interpolate keep_mask task_vector",
            ".functional.sparsify": "della trim",
            ".live.merge_into": "merge_into",
            ".live.merged_stream": "merged_stream",
            ".loop.rounds": "Rounds",
            ".options.layer_factors": "group_factors importance_factors lines_factors",
            ".ranks.ranks": "Ranks",
        },
        {
            ".loop.trainer_callback": "IMMCallback",
        },
    )
