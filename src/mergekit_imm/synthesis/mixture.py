"""Combine the data of several rounds: mix in a share of earlier data, or accumulate all of it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from ..common.checks import as_items, is_integer, is_number
from ..common.messages import shown
from ..errors import ArgumentError

T = TypeVar("T", bound=Hashable)


def mix(current: Sequence[T], previous: Sequence[T], *, share: float, seed: int = 0) -> list[T]:
    """Mix examples of earlier rounds, or of the original data, into those of this round.

        mix = current + m of previous,  m = round(share / (1 - share) * len(current))

    Args: `share` of earlier data in the result, 0 <= share < 1; `seed` of the draw without replacement. If there are
    fewer than m earlier examples, all are used, shuffled, and the share is smaller. Duplicates are kept. Returns this
    round's examples in order, then the others. Raises ArgumentError.

    Source: mixing in earlier data against collapse, Shumailov et al. (arXiv 2305.17493); "Data Mixture" is a baseline
    of arXiv 2503.02103, which gives no share and no rule: this one is ours.

    >>> mix(["a", "b", "c"], ["x", "y", "z"], share=0.25)
    ['a', 'b', 'c', 'z']
    """
    if not is_number(share) or not 0 <= share < 1:
        raise ArgumentError(
            f"share is {shown(repr(share), 60)}; it must be the share of earlier data in the mixture, 0 <= share < 1"
        )
    if not is_integer(seed):
        raise ArgumentError(f"seed is {shown(repr(seed), 60)}; it must be an integer")
    ours, others = as_items("current", current, "examples"), as_items("previous", previous, "examples")
    wanted = round(share / (1 - share) * len(ours))
    # Not random.sample: its draws may change between versions of Python.
    generator = random.Random(int(seed))
    pool = sorted(range(len(others)), key=lambda _: generator.random())
    return [*ours, *(others[at] for at in pool[:wanted])]


def accumulate(rounds: Iterable[Iterable[T]]) -> list[T]:
    """Join the examples of all rounds, each once: training data grows instead of being replaced.

        D_0 + D_1 + ... + D_t, in order, without duplicates

    Give the real data as the first round to keep them. Examples must be hashable.

    Source: "Data Accumulation" of arXiv 2503.02103 after Gerstgrasser et al. (arXiv 2404.01413), who train on real data
    and all synthetic sets so far; dropping duplicates is ours.

    >>> accumulate([["a", "b"], ["b", "c"]])
    ['a', 'b', 'c']
    """
    joined = [as_items(f"round {number}", each, "examples") for number, each in enumerate(as_items("rounds", rounds))]
    try:
        return list(dict.fromkeys(example for each in joined for example in each))
    except TypeError as error:
        raise ArgumentError(f"examples must be hashable to be joined without duplicates: {shown(error)}") from error
