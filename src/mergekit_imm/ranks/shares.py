"""Split the bytes of an output among ranks.

The files are laid end to end, each starting at a multiple of 1 MiB, and cut at multiples of 1 MiB, so no two ranks
write to the same filesystem block. Both ranks compute a segment that spans a cut; each writes its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..checkpoint.safetensors_file import DTYPE_BITS, TensorInfo
from ..plan.plan import Plan, Segment, segments

ALIGNED = 1 << 20


@dataclass(frozen=True)
class Share:
    """The bytes begin..end of all files of a plan, laid end to end."""

    plan: Plan
    starts: Mapping[str, int]  # where each file begins
    begin: int
    end: int

    def clip(self, tensor: TensorInfo, first: int, count: int) -> tuple[int, int]:
        """Return the range of bytes first..first+count of a tensor that is in the share, relative to `first`."""
        at = self.starts[tensor.file] + tensor.begin + first
        low, high = (min(max(edge - at, 0), count) for edge in (self.begin, self.end))
        return low, high

    def held(self, segment: Segment) -> int:
        """Return how many of a segment's output bytes are in the share."""
        total = 0
        for out, first, count in _pieces(self.plan, segment):
            low, high = self.clip(out, first, count)
            total += high - low
        return total


def shares(plan: Plan, lacking: npt.NDArray[np.integer], size: int) -> list[Share]:
    """Split an output into one share per rank, with equal amounts left to write.

    `lacking` counts, per segment, the outputs that still lack it (more than one in a sweep).
    """
    starts, end = {}, 0
    for file in plan.files:
        starts[file.name] = end
        end += -(-file.size // ALIGNED) * ALIGNED
    cuts = [0, *_cuts(plan, starts, lacking, size), end] if size > 1 else [0, end]
    return [Share(plan, starts, *pair) for pair in pairwise(cuts)]


def _cuts(plan: Plan, starts: Mapping[str, int], lacking: npt.NDArray[np.integer], size: int) -> list[int]:
    places, sizes = [], []
    for segment in segments(plan):
        out, first, count = next(_pieces(plan, segment))
        places.append(starts[out.file] + out.begin + first)
        sizes.append(count * len(plan.items[segment.item].outs) * int(lacking[segment.index]))
    if not places:
        return [0] * (size - 1)
    done = np.cumsum(sizes)
    goals = [int(done[-1]) * number // size for number in range(1, size)]
    return [places[at] // ALIGNED * ALIGNED for at in np.searchsorted(done, goals).tolist()]


def _pieces(plan: Plan, segment: Segment) -> Iterator[tuple[TensorInfo, int, int]]:
    """Yield where a segment is written: tensor, first byte in it, number of bytes."""
    item = plan.items[segment.item]
    for out in item.outs:
        width = 1 if item.raw else DTYPE_BITS[out.dtype] // 8
        yield out, segment.first * width, segment.count * width
