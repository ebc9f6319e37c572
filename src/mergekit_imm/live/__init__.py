"""Models in memory.

Import `merge_into` from `mergekit_imm`; here the name is its module's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .merge_into import LiveReport as LiveReport
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".merge_into": "LiveReport",
        },
    )
