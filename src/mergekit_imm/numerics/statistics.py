"""Statistics of a merge, from the same pass: sums of squares, largest change, number of kept elements.

Every implementation adds in one order, so reports are equal to the last bit. For each block of 1024 elements x (the
last one padded with zeros), in the precision of the merge (float32; float64 if an input is):

    s[i]         = (x[2i]^2 + x[2i+1]^2) + (x[512+2i]^2 + x[513+2i]^2)        i = 0..255
    s[0:n/2]    += s[n/2:n]                                                    n = 256, 128, 64, 32
    lanes[0:16] += s[0:16]                                                     in float64, block after block

The largest change is the root of the largest square, which is exact. Norms are accurate to about seven digits. In
float32, squares of values below 1e-22 or above 1e19 become zero or infinite.

A tally accumulates: 16 lanes for each of three sums, the largest change, the count. A record is the result: five
numbers for every 2^20 elements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LANES = 16

# Layout of a tally: 16 lanes each for delta, base and change (merged - base), then largest change and count.
LARGEST, KEPT = 3 * LANES, 3 * LANES + 1
TALLY = 3 * LANES + 2

# Layout of a record: sums of squares of delta, base and change; largest change; number of kept elements.
RECORD = 5

Tally = npt.NDArray[np.float64]
Record = npt.NDArray[np.float64]


def new_tally() -> Tally:
    """Return an empty tally, float64 of shape (TALLY,)."""
    return np.zeros(TALLY)


def is_finite(tally: Tally) -> bool:
    """Whether all sums are finite; if so, no element was NaN or infinite."""
    return bool(np.isfinite(tally[:LARGEST]).all())


def to_record(tally: Tally) -> Record:
    """Reduce a tally to a record, float64 of shape (RECORD,). The largest change is NaN if any change is.

    >>> tally = new_tally()
    >>> tally[0:LANES], tally[KEPT] = 0.25, 7
    >>> to_record(tally).tolist()
    [4.0, 0.0, 0.0, 0.0, 7.0]
    """
    lanes = tally[:LARGEST].reshape(3, LANES)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    largest = np.nan if np.isnan(lanes[2, 0]) else tally[LARGEST]
    return np.array([*lanes[:, 0], largest, tally[KEPT]])
