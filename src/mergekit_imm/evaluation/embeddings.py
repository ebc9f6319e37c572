"""What encoders of users make of texts, as vectors of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.messages import shown
from ..errors import ArgumentError

if TYPE_CHECKING:  # numpy is imported where it is needed: commands import packages for their --help
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float64]


def unit_rows(given: Any, maker: str, texts: Sequence[str] | None = None, width: int | None = None) -> Vectors:
    """Return an array of vectors, each divided by its length, in float64.

    Args: `given`, what `maker` (its name, for messages) made: (texts, width). Raises ArgumentError for another shape,
    or a vector of zeros, NaN or infinity, which points nowhere, naming its text, or its row.

    >>> unit_rows([[3.0, 4.0], [0.0, 2.0]], "encode").tolist()
    [[0.6, 0.8], [0.0, 1.0]]
    """
    import numpy as np

    try:
        vectors = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: tensors that have a gradient
        raise ArgumentError(
            f"{maker} gave no array of numbers: {shown(error)}; give a vector for each text, all of one width"
        ) from error
    count = len(texts) if texts is not None else len(vectors) if vectors.ndim else 0
    if vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] != (width or vectors.shape[1]):
        raise ArgumentError(
            f"{maker} gave shape {vectors.shape}; it must be ({'texts' if texts is None else count},"
            f" {width or 'width'}): a vector for each text"
        )
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    for bad, what in ((~np.isfinite(largest), "a vector with NaN or infinity"), (largest == 0, "a zero vector")):
        if bad.any():
            at = int(bad.argmax())
            whose = f"row {at}" if texts is None else f"'{shown(texts[at])}'"
            raise ArgumentError(f"{maker} gave {what} for {whose}, which has no direction; leave it out")
    vectors = vectors / largest[:, None]  # so that no square is too large or too small
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
