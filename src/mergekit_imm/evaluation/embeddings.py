"""Embeddings from a user's encoder, checked and scaled to unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.messages import shown
from ..errors import ArgumentError

if TYPE_CHECKING:  # import numpy only where it is used: commands import this for their --help
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float64]


def unit_rows(given: Any, maker: str, texts: Sequence[str] | None = None, width: int | None = None) -> Vectors:
    """Return vectors scaled to unit length, float64 of shape (texts, width).

    Args: `given`, the array that `maker` (a name for messages) returned. Raises ArgumentError for another shape, and
    for a vector of zeros or with NaN or infinity, naming its text or row.

    >>> unit_rows([[3.0, 4.0], [0.0, 2.0]], "encode").tolist()
    [[0.6, 0.8], [0.0, 1.0]]
    """
    import numpy as np

    try:
        vectors = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: tensors that require a gradient
        raise ArgumentError(
            f"{maker} did not return an array of numbers: {shown(error)}; return one vector per text, all of one width"
        ) from error
    count = len(texts) if texts is not None else len(vectors) if vectors.ndim else 0
    if vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] != (width or vectors.shape[1]):
        raise ArgumentError(
            f"{maker} returned shape {vectors.shape}; it must be ({'texts' if texts is None else count},"
            f" {width or 'width'}): one vector per text"
        )
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    for bad, what in ((~np.isfinite(largest), "a vector with NaN or infinity"), (largest == 0, "a zero vector")):
        if bad.any():
            at = int(bad.argmax())
            where = f"row {at}" if texts is None else f"'{shown(texts[at])}'"
            raise ArgumentError(f"{maker} returned {what} for {where}, which has no direction; leave it out")
    vectors = vectors / largest[:, None]  # so that squares neither overflow nor underflow
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
