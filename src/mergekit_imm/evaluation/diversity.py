"""How different a model's answers to one problem are: in words, in meaning, in equations."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy.typing as npt

from ..common.checks import as_texts, check_count
from ..errors import ArgumentError
from .embeddings import unit_rows

Tokenizer = Callable[[str], Sequence[str]]
ORDERS = (1, 2, 3, 4, 5)  # of the n-grams whose shares are averaged
NAN = math.nan


def distinct_n(texts: Sequence[str], n: int, *, tokenizer: Tokenizer = str.split) -> float:
    """Return the share of distinct n-grams among all n-grams of texts.

        distinct-n = unique n-grams / all n-grams,  pooled over the texts; no n-gram reaches from one text into another

    Args: `texts`, the responses to one problem; `tokenizer`, from a text to its tokens, by default at white space.
    NaN where there is no n-gram. It falls with the length and the number of the texts: compare equally many, and see
    `expectation_adjusted_distinct`. Raises ArgumentError if n < 1.

    Source: Li et al., 2016 (arXiv 1510.03055); pooled as in Kirk et al., 2024 (arXiv 2310.06452).

    >>> distinct_n(["a b a", "a b"], 1), distinct_n(["a b a", "a b"], 2)
    (0.4, 0.6666666666666666)
    """
    unique, count = _grams(texts, n, tokenizer)
    return unique / count if count else NAN


def mean_distinct(texts: Sequence[str], *, tokenizer: Tokenizer = str.split) -> float:
    """Return the mean of distinct-n over n = 1 to 5.

        1/5 sum_{n=1..5} distinct-n

    NaN if it is not defined for one n: that is, if no text has five tokens. Raises what `distinct_n` does.

    Source: the orders are those of Kirk et al., 2024 (arXiv 2310.06452).

    >>> mean_distinct(["a b c d e", "a b c d f"])
    0.7283333333333333
    """
    return statistics.fmean(distinct_n(texts, n, tokenizer=tokenizer) for n in ORDERS)


def expectation_adjusted_distinct(
    texts: Sequence[str], *, vocabulary: int, n: int = 1, tokenizer: Tokenizer = str.split
) -> float:
    """Return the number of distinct n-grams, against the number expected of as many random ones (EAD).

        EAD = U / (V (1 - ((V-1)/V)^C)),  U distinct n-grams, C n-grams in all, pooled over the texts

    Args: `texts`, `n` and `tokenizer` as in `distinct_n`; `vocabulary`, V, from how many n-grams they could be drawn.
    V must be the same for all that is compared: take the number of distinct n-grams of all models. It falls with
    length, less than distinct-n if V is near what texts use, and nearly as much if V is large; above 1 it is where U
    exceeds the expectation. NaN where there is no n-gram. Raises ArgumentError if V < 1 or V < U, or n < 1.

    Source: Liu et al., "Rethinking and Refining the Distinct Metric", 2022 (arXiv 2202.13587). That V is counted, and
    not the size of a tokenizer's vocabulary, is ours: few of its entries ever occur in solutions.

    >>> expectation_adjusted_distinct(["a b", "a"], vocabulary=2)
    1.1428571428571428
    """
    unique, count = _grams(texts, n, tokenizer)
    if vocabulary < max(1, unique):
        raise ArgumentError(
            f"vocabulary is {vocabulary}, but {unique} distinct {n}-grams occur; give the number of distinct ones in "
            f"all that is compared"
        )
    if not count:
        return NAN
    expected = -vocabulary * math.expm1(count * math.log1p(-1 / vocabulary)) if vocabulary > 1 else 1.0
    return unique / expected


def _grams(texts: Sequence[str], n: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """How many n-grams are distinct, and how many there are."""
    check_count("n", n, 1)
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

    Args: `embeddings`, one row for each response to one problem, shape (responses, dimensions). 0 where all point the
    same way; NaN for fewer than two. Raises ArgumentError if it is no 2-D array of finite numbers, or has a row of
    zeros, which points nowhere.

    Source: Kirk et al., 2024 (arXiv 2310.06452); as a diversity, in "Progress or Regress? Self-Improvement Reversal in
    Post-training", 2024 (arXiv 2407.05013).

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
# Nothing is tried twice (`++`, `(?>`): time must not grow with the square of a text that a model lost itself in.
_NUMBER = r"\(*+[-+]?+\$?+(?>\d+)(?>(?:,\d{3})*)(?>(?:\.\d+)?)%?+\)*+"
_SIDE = rf"{_NUMBER}(?: ?[-+*/^x] ?{_NUMBER})*+"
_RUN = re.compile(rf"(?<![\w.,(]){_SIDE}(?: ?= ?{_SIDE})*+")
_OPERATION = re.compile(r"[\d%)][-+*/^]")


def equations(text: str) -> Iterator[str]:
    """Yield the equations of a text, as `distinct_equations` sees them.

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
    """Without the parentheses around the whole equation, of which one side has one each."""
    over = side.count("(") - side.count(")")
    opened = len(side) - len(side.lstrip("("))
    closed = len(side) - len(side.rstrip(")"))
    return side[min(max(over, 0), opened) : len(side) - min(max(-over, 0), closed)]


def distinct_equations(texts: Sequence[str]) -> float:
    """Return the share of distinct equations among all equations of texts.

        distinct equations / all equations,  pooled over the texts

    Args: `texts`, the responses to one problem. NaN where there is no equation. An equation is two expressions of
    numbers, `+ - * / ^` and parentheses with `=` between them, on one line, at least one of them with an operation; of
    a = b = c both equations count. Spaces, `$` and commas of thousands do not matter, nor which sign of multiplication
    or division is used, nor which side is which: `3+4=7` is `7 = 3 + 4`, but not `4 + 3 = 7`, which is another way.
    Whether an equation is true is not asked.

    Source: the measure, "Self-Improvement Reversal", 2024 (arXiv 2407.05013). How equations are found is ours, as that
    is not published.

    >>> distinct_equations(["3+4=7", "7 = 3 + 4", "so 4 + 3 = 7"])
    0.6666666666666666
    """
    found = [equation for text in as_texts("texts", texts, empty=True) for equation in equations(text)]
    return len(set(found)) / len(found) if found else NAN
