"""Diversity of a model's answers to one problem: in words, meaning and equations."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy.typing as npt

from ..common.checks import as_texts, check_callable, check_count
from ..errors import ArgumentError
from .embeddings import unit_rows

Tokenizer = Callable[[str], Sequence[str]]
NGRAM_SIZES = (1, 2, 3, 4, 5)  # n of distinct-n in `mean_distinct`
NAN = math.nan


def distinct_n(texts: Sequence[str], n: int, *, tokenizer: Tokenizer = str.split) -> float:
    """Return the share of distinct n-grams among all n-grams of some texts.

        distinct-n = unique n-grams / all n-grams,  pooled over the texts; no n-gram crosses from one text to the next

    Args: `texts`, the responses to one problem; `tokenizer`, from a text to its tokens, splits at white space by
    default. NaN if there are no n-grams. Raises ArgumentError if n < 1. The value falls with the length and number of
    texts: compare equal numbers, and see `expectation_adjusted_distinct`.

    Source: Li et al., 2016 (arXiv 1510.03055); pooled as in Kirk et al., 2024 (arXiv 2310.06452).

    >>> distinct_n(["a b a", "a b"], 1), distinct_n(["a b a", "a b"], 2)
    (0.4, 0.6666666666666666)
    """
    unique, count = _grams(texts, n, tokenizer)
    return unique / count if count else NAN


def mean_distinct(texts: Sequence[str], *, tokenizer: Tokenizer = str.split) -> float:
    """Return the mean of distinct-n over n = 1 to 5.

        1/5 sum_{n=1..5} distinct-n

    NaN if no text has five tokens. Raises what `distinct_n` raises.

    Source: the orders are those of Kirk et al., 2024 (arXiv 2310.06452).

    >>> mean_distinct(["a b c d e", "a b c d f"])
    0.7283333333333333
    """
    return statistics.fmean(distinct_n(texts, n, tokenizer=tokenizer) for n in NGRAM_SIZES)


def expectation_adjusted_distinct(
    texts: Sequence[str], *, vocabulary: int, n: int = 1, tokenizer: Tokenizer = str.split
) -> float:
    """Return expectation-adjusted distinct (EAD): distinct n-grams relative to the number expected by chance.

        EAD = U / (V (1 - ((V-1)/V)^C)),  U distinct n-grams, C n-grams in all, pooled over the texts

    Args: `texts`, `n` and `tokenizer` as in `distinct_n`; `vocabulary`, V, the number of possible n-grams. Use one V
    for all texts that are compared, such as the number of distinct n-grams of all models. EAD still falls with length:
    less than distinct-n if V is close to U, almost as much if V is large. It exceeds 1 if U exceeds the expectation.
    NaN if there are no n-grams. Raises ArgumentError if V < 1 or V < U, or n < 1.

    Source: Liu et al., "Rethinking and Refining the Distinct Metric", 2022 (arXiv 2202.13587). Counting V, rather than
    using the size of a tokenizer's vocabulary, is ours: few of its entries occur in solutions.

    >>> expectation_adjusted_distinct(["a b", "a"], vocabulary=2)
    1.1428571428571428
    """
    unique, count = _grams(texts, n, tokenizer)
    check_count("vocabulary", vocabulary, 0)
    if vocabulary < max(1, unique):
        raise ArgumentError(
            f"vocabulary is {vocabulary}, but {unique} distinct {n}-grams occur; give the number of distinct ones in"
            " all compared texts"
        )
    if not count:
        return NAN
    expected = -vocabulary * math.expm1(count * math.log1p(-1 / vocabulary)) if vocabulary > 1 else 1.0
    return unique / expected


def _grams(texts: Sequence[str], n: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """The number of distinct n-grams, and of all."""
    check_count("n", n, 1)
    check_callable("tokenizer", tokenizer, "from a text to its tokens")
    texts = as_texts("texts", texts, empty=True)
    unique: set[tuple[str, ...]] = set()
    count = 0
    for text in texts:
        tokens = list(tokenizer(text))
        unique.update(zip(*(tokens[i:] for i in range(n)), strict=False))
        count += max(0, len(tokens) - n + 1)
    return len(unique), count


def cosine_diversity(embeddings: npt.ArrayLike) -> float:
    """Return one minus the mean cosine of all pairs of embeddings.

        1 - mean_{i<j} cos(e_i, e_j)

    Args: `embeddings`, one row per response to one problem, shape (responses, dimensions). 0 if all have the same
    direction; NaN for fewer than two. Raises ArgumentError unless it is a 2-D array of finite numbers without rows of
    zeros.

    Source: Kirk et al., 2024 (arXiv 2310.06452); used as diversity in "Progress or Regress? Self-Improvement Reversal
    in Post-training", 2024 (arXiv 2407.05013).

    >>> cosine_diversity([[1, 0], [0, 2], [1, 0]])
    0.6666666666666667
    """
    units = unit_rows(embeddings, "the encoder")
    count = len(units)
    if count < 2:
        return NAN
    total = units.sum(axis=0)
    return float(1 - (total @ total - count) / (count * (count - 1)))


_WRITTEN = {r"\times": "*", r"\cdot": "*", "×": "*", "·": "*", "∗": "*", r"\div": "/", "÷": "/", "−": "-", "–": "-"}
# No backtracking (`++`, `(?>`): time must stay linear on a long repetitive text.
_NUMBER = r"\(*+[-+]?+\$?+(?>\d+)(?>(?:,\d{3})*)(?>(?:\.\d+)?)%?+\)*+"
_SIDE = rf"{_NUMBER}(?: ?[-+*/^x] ?{_NUMBER})*+"
_RUN = re.compile(rf"(?<![\w.,(]){_SIDE}(?: ?= ?{_SIDE})*+")
_OPERATION = re.compile(r"[\d%)][-+*/^]")


def equations(text: str) -> Iterator[str]:
    """Yield the equations of a text in normal form, for `distinct_equations`.

    >>> list(equations("She has $3 x 4 = 12, and so 12 = 10 + 2 = 12"))
    ['12=3*4', '10+2=12', '10+2=12']
    """
    for line in text.splitlines():
        if "=" not in line:
            continue
        for written, meant in _WRITTEN.items():
            line = line.replace(written, meant)
        for found in _RUN.finditer(" ".join(line.split())):
            bare = re.sub(r"[ $]|(?<=\d),(?=\d)", "", found[0]).replace("x", "*")
            sides = [_balanced(side) for side in bare.split("=")]
            for pair in pairwise(sides):
                if any(_OPERATION.search(side) for side in pair):
                    yield "=".join(sorted(pair))


def _balanced(side: str) -> str:
    """Drop unbalanced outer parentheses, which enclose the whole equation."""
    over = side.count("(") - side.count(")")
    opened = len(side) - len(side.lstrip("("))
    closed = len(side) - len(side.rstrip(")"))
    return side[min(max(over, 0), opened) : len(side) - min(max(-over, 0), closed)]


def distinct_equations(texts: Sequence[str]) -> float:
    """Return the share of distinct equations among all equations of some texts.

        distinct equations / all equations,  pooled over the texts

    Args: `texts`, the responses to one problem. NaN if there are no equations. An equation is two expressions of
    numbers, `+ - * / ^` and parentheses, joined by `=` on one line, at least one of them with an operation; a = b = c
    counts as two. Spaces, `$`, thousands separators, the sign used for multiplication or division, and the order of the
    sides do not matter: `3+4=7` equals `7 = 3 + 4`, but not `4 + 3 = 7`. Equations need not be true.

    Source: "Self-Improvement Reversal", 2024 (arXiv 2407.05013). The rule for finding equations, which is not
    published, is ours.

    >>> distinct_equations(["3+4=7", "7 = 3 + 4", "so 4 + 3 = 7"])
    0.6666666666666666
    """
    found = [equation for text in as_texts("texts", texts, empty=True) for equation in equations(text)]
    return len(set(found)) / len(found) if found else NAN
