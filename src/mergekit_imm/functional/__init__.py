"""The merge as pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .merge import dare as dare
    from .merge import dare_merge as dare_merge
    from .merge import interpolate as interpolate
    from .merge import keep_mask as keep_mask
    from .merge import task_vector as task_vector
    from .sparsify import della as della
    from .sparsify import trim as trim
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".merge": "dare dare_merge interpolate keep_mask task_vector",
            ".sparsify": "della trim",
        },
    )
