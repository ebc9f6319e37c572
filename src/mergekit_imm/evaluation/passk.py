"""pass@k: the probability that at least one of k answers is right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ..common.checks import as_items, check_count, is_integer
from ..common.messages import shown
from ..errors import ArgumentError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n samples of one problem, c of them right.

        pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k/i);  1 if n - c < k

    Args: integers, 0 <= c <= n and 1 <= k <= n. The simpler 1 - (1 - c/n)^k is biased low. The variance is high for k
    near n; have n >= 2k. Raises ArgumentError for values out of range: for k > n the formula would give 1 even if no
    sample is right.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021 (arXiv 2107.03374), Eq. 1.

    >>> pass_at_k(5, 2, 3), pass_at_k(10, 0, 3)
    (0.9, 0.0)
    """
    if not all(map(is_integer, (n, c, k))):
        raise ArgumentError(f"n, c and k are {n!r}, {c!r} and {k!r}; they must be integers, numbers of samples")
    if n < 1 or not 0 <= c <= n:
        raise ArgumentError(f"{c} correct of {n} samples; give at least one sample, of which 0 to all are correct")
    if not 1 <= k <= n:
        raise ArgumentError(f"pass@{k} of {n} samples; k must be between 1 and the number of samples")
    if n - c < k:
        return 1.0
    if k == 1:
        return c / n  # the product may differ in the last bit
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]] | Mapping[str, tuple[int, int]], k: int) -> float:
    """Return the mean of pass@k over problems, which may differ in their numbers of samples.

        mean_j pass@k(n_j, c_j)

    Args: `counts`, (n, c) of each problem, in a list or by problem name. Raises ArgumentError if it is empty, or if a
    problem has fewer than k samples: a mean over the others would describe another set of problems.

    Source: as `pass_at_k`.

    >>> mean_pass_at_k([(5, 2), (4, 1)], 2)
    0.6
    """
    pairs = counts if isinstance(counts, Mapping) else dict(enumerate(as_items("counts", counts, "(n, c)")))
    named = list(pairs.items())
    for name, pair in named:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(is_integer, pair)):
            raise ArgumentError(
                f"counts of problem {shown(name)} are {shown(repr(pair), 60)}; give (n, c), samples and right ones"
            )
    if not named:
        raise ArgumentError("counts is empty; give at least one problem")
    check_count("k", k, 1)
    few = [(name, n) for name, (n, _) in named if n < k]
    if few:
        more = f" ({len(few)} problems have too few)" if len(few) > 1 else ""
        raise ArgumentError(
            f"pass@{k} needs {k} samples of each problem; problem {shown(few[0][0])} has {few[0][1]}{more};"
            " use a smaller k, or sample more"
        )
    return statistics.fmean(pass_at_k(n, c, k) for _, (n, c) in named)


def powers_of_two(n: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to n: the values of k in a pass@k curve.

    >>> powers_of_two(12)
    (1, 2, 4, 8)
    """
    return tuple(2**i for i in range(n.bit_length())) if n > 0 else ()
