"""Which bytes of an output are this rank's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..checkpoint.safetensors_file import TensorInfo
from ..numerics.dtypes import DTYPE_BITS
from ..plan.plan import Plan, Segment, segments
from .ranks import Ranks

ALIGNED = 1 << 20


@dataclass(frozen=True)
class Share:
    """The bytes of an output that one rank writes: begin..end of all its files, laid end to end.

    Each file starts at a multiple of 1 MiB, and shares end at such, so no two ranks write to one block of the
    filesystem. Both ranks compute a segment that spans an end; each writes its own part.
    """

    plan: Plan
    starts: Mapping[str, int]  # where each file begins
    begin: int
    end: int

    def clip(self, tensor: TensorInfo, first: int, count: int) -> tuple[int, int]:
        """Return the range of bytes first..first+count of a tensor that is in the share, relative to `first`."""
        at = self.starts[tensor.file] + tensor.begin + first
        return min(max(self.begin - at, 0), count), min(max(self.end - at, 0), count)

    def held(self, segment: Segment) -> int:
        """Return how many of a segment's output bytes are in the share."""
        total = 0
        for out, first, count in _pieces(self.plan, segment):
            low, high = self.clip(out, first, count)
            total += high - low
        return total


def share_of(plan: Plan, finished: Sequence[npt.NDArray[np.bool_]], ranks: Ranks) -> Share:
    """Return this rank's share of outputs with one layout (a sweep), so that every rank has as much left to write.

    `finished` has a flag for each segment, for each output.
    """
    starts, end = {}, 0
    for file in plan.files:
        starts[file.name] = end
        end += -(-file.size // ALIGNED) * ALIGNED
    cuts = [0, end]
    if ranks.size > 1:
        lacking = np.sum([~each for each in finished], axis=0)
        cuts = [0, *_cuts(plan, starts, lacking, ranks.size), end]
    return Share(plan, starts, *list(pairwise(cuts))[ranks.rank])


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
