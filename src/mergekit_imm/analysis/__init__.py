"""Diagnosis: which weights changed, which matter, how far predictions moved, whether a merge is what it claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options.layer_factors import Importance as Importance
    from .auditing import AuditReport as AuditReport
    from .auditing import audit as audit
    from .change import WeightChange as WeightChange
    from .change import weight_change as weight_change
    from .divergence import Divergence as Divergence
    from .divergence import mean_kl as mean_kl
    from .gradients import layer_importance as layer_importance
    from .verdict import Mismatch as Mismatch
    from .verdict import mismatch as mismatch
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "..options.layer_factors": "Importance",
            ".auditing": "AuditReport audit",
            ".change": "WeightChange weight_change",
            ".divergence": "Divergence mean_kl",
            ".gradients": "layer_importance",
            ".verdict": "Mismatch mismatch",
        },
    )
