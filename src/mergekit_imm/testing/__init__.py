"""Conformance checks for a new dtype, device or input form, and the naive reference they compare with.

The checks are functions that raise AssertionError; they need no test runner.
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
