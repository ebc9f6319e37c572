"""Data of several rounds: a share of what was there before, or all of it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from ..common.checks import is_integer, is_number
from ..common.messages import shown
from ..errors import ArgumentError

T = TypeVar("T", bound=Hashable)


def mix(current: Sequence[T], previous: Sequence[T], *, share: float, seed: int = 0) -> list[T]:
    """Mix examples of earlier rounds, or of the original data, into those of this round.

        mix = current + m of previous,  m = round(share / (1 - share) * len(current))

    So a share of the result is of earlier data. They are drawn without putting back, by `seed`; where there are fewer
    than m, all of them are taken, in another order, and the share is smaller: `len` of the result tells. Nothing is
    dropped as a duplicate.

    Args: 0 <= share < 1. Returns this round's examples in their order, then the others. Raises ArgumentError.

    Source: mixing in earlier data against collapse is from Shumailov et al. (arXiv 2305.17493); "Data Mixture" is a
    baseline of arXiv 2503.02103, which gives no share and no rule: this one is ours.

    >>> mix(["a", "b", "c"], ["x", "y", "z"], share=0.25)
    ['a', 'b', 'c', 'z']
    """
    if not is_number(share) or not 0 <= share < 1:
        raise ArgumentError(
            f"share is {shown(repr(share), 60)}; it is the part of the mixture that is of earlier data, 0 <= share < 1"
        )
    if not is_integer(seed):
        raise ArgumentError(f"seed is {shown(repr(seed), 60)}; it must be an integer")
    wanted = round(share / (1 - share) * len(current))
    # Not random.sample, whose draws may differ from one version of Python to the next.
    generator = random.Random(int(seed))
    pool = sorted(range(len(previous)), key=lambda _: generator.random())
    return [*current, *(previous[at] for at in pool[:wanted])]


def accumulate(rounds: Iterable[Iterable[T]]) -> list[T]:
    """Put the examples of all rounds together, each once: what is trained on grows instead of being replaced.

        D_0 + D_1 + ... + D_t, in order, without what was there before

    Give the real data as the first round if they are to stay in. Examples are compared with `==` and must be hashable.

    Source: "Data Accumulation" of arXiv 2503.02103 after Gerstgrasser et al. (arXiv 2404.01413), who train on real data
    and all synthetic sets so far; that duplicates are dropped is ours.

    >>> accumulate([["a", "b"], ["b", "c"]])
    ['a', 'b', 'c']
    """
    return list(dict.fromkeys(example for each in rounds for example in each))
