"""Models in memory.

`merge_into` is in `mergekit_imm`; here it would have the name of its module.
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
