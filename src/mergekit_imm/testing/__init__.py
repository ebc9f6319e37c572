"""What proves a new dtype, a new device or a new form of input, and the naive reference that judges them.

The checks are plain functions that raise AssertionError; no test runner is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conformance import check_device as check_device
    from .conformance import check_input as check_input
    from .reference import naive_mask as naive_mask
    from .reference import naive_merge as naive_merge
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".conformance": "check_device check_input",
            ".reference": "naive_mask naive_merge",
        },
    )
