"""What a merge measures on the way: sums of squares, the largest change, how many elements were kept.

Every implementation of the merge adds in one order, so that reports are equal to the last bit. Of each block of 1024
elements x (the last one filled up with zeros), in the precision of the merge (float32; float64 if an input is):

    s[i]         = (x[2i]^2 + x[2i+1]^2) + (x[512+2i]^2 + x[513+2i]^2)        i = 0..255
    s[0:n/2]    += s[n/2:n]                                                    n = 256, 128, 64, 32
    lanes[0:16] += s[0:16]                                                     in float64, block after block

The largest change is the root of the largest square, which is exact. So a norm is right to some seven digits, and an
element costs few instructions. Squares beyond the range of float32 (of values below 1e-22 or above 1e19) are zero or
infinite.

A tally is what is under way: 16 lanes for each of three sums, the largest change, the count. A record is what becomes
of it: five numbers for every 2^20 elements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LANES = 16

# Where they stand in a tally: the lanes of delta, base and change (merged - base), then two numbers.
LARGEST, KEPT = 3 * LANES, 3 * LANES + 1
TALLY = 3 * LANES + 2

# A record: delta, base and change squared and summed; the largest change; how many elements were kept.
RECORD = 5

Tally = npt.NDArray[np.float64]
Record = npt.NDArray[np.float64]


def new_tally() -> Tally:
    """Return a tally of nothing."""
    return np.zeros(TALLY)


def is_finite(tally: Tally) -> bool:
    """Whether all that was added so far is finite: true only if no element was NaN or infinite."""
    return bool(np.isfinite(tally[:LARGEST]).all())


def to_record(tally: Tally) -> Record:
    """Return the record of a tally: lanes added by halves. The largest change is NaN where a change is.

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
