"""Questions that are too near to others: rejection sampling by cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.checks import as_texts, check_count, is_number
from ..common.messages import shown
from ..errors import ArgumentError
from ..evaluation.embeddings import unit_rows

if TYPE_CHECKING:  # numpy is imported where it is needed: commands import this package for their --help
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float64]

Encode = Callable[[list[str]], Any]  # texts -> an array of (texts, width)
Rewrite = Callable[[str, str], str]  # question, the one it is too near -> other wording

BLOCK = 1024  # texts that are encoded and multiplied at a time: 8 MiB for the cosines of a block with a block
ROUNDING = 1e-9  # equal vectors have a cosine of 1 but for this much


@dataclass(frozen=True)
class Discarded:
    """A question that was too near to another: as it was asked, its nearest neighbour, and their cosine."""

    question: str
    neighbour: str
    cosine: float


@dataclass(frozen=True)
class Deduplicated:
    """What `deduplicate` made of some questions.

    accepted: in their order, some in other words. discarded: all others. rewritten: how many of the accepted are in
    other words. retries: how often `rewrite` was called.
    """

    accepted: tuple[str, ...]
    discarded: tuple[Discarded, ...]
    rewritten: int
    retries: int


def deduplicate(
    questions: Sequence[str],
    encode: Encode,
    *,
    history: Sequence[str] = (),
    threshold: float = 0.85,
    rewrite: Rewrite | None = None,
    retries: int = 3,
) -> Deduplicated:
    """Keep the questions that are near to none before them: rejection sampling with one threshold.

        q_i is accepted when cos(e(q_i), e(a)) < threshold for all a in history and among those accepted before it

    In order: the first of a cluster stays. A question that is too near is given to `rewrite(question, neighbour)`, at
    most `retries` times, each time in its latest wording and with the nearest neighbour of that wording; each answer is
    tested against all that is accepted, and in the end the question is discarded. An empty answer is no question, and
    uses up a try.

    Args: `encode(texts)` gives a vector for each text, (texts, width), which must not depend on the other texts; it is
    called with at most 1024 at a time. `history`: questions of earlier rounds; they are not compared with each other.
    `threshold` in (0, 1]; at 1 only equal directions are too near. Cosines are computed in doubles; what is short of
    the threshold by no more than 1e-9 counts as on it. Memory: the vectors, and blocks of 1024 x 1024.
    Raises ArgumentError for an empty question, a value out of range, or vectors that are no use (shape, NaN, zero).

    Source: arXiv 2502.13441, self-deduplication. Testing rewritten questions, the retries and the single threshold are
    ours: the released code accepts any rewritten question, and has one threshold within a batch (0.85) and another for
    the history.

    >>> found = deduplicate(["2+2?", "2 + 2?", "7-5?"], lambda texts: [[t.count("2"), t.count("7")] for t in texts])
    >>> found.accepted, found.discarded
    (('2+2?', '7-5?'), (Discarded(question='2 + 2?', neighbour='2+2?', cosine=1.0),))
    """
    import numpy as np

    check_nearness(threshold, retries)
    questions, texts = as_texts("questions", questions), as_texts("history", history)
    limit = threshold - ROUNDING
    pool: list[Vectors] = []  # vectors of `texts`, in blocks
    width = None
    for block in _blocks(texts):
        pool.append(unit_rows(encode(block), "encode", block, width))
        width = pool[0].shape[1]
    accepted: list[str] = []
    discarded = []
    rewritten = calls = 0
    for block in _blocks(questions):
        vectors = unit_rows(encode(block), "encode", block, width)
        width = vectors.shape[1]
        cosines, neighbours = _nearest(vectors, pool)
        fresh, first = np.empty_like(vectors), len(texts)  # what this block adds
        for question, original, old, at in zip(block, vectors, cosines, neighbours, strict=True):
            new, position = _nearest(original[None], [fresh[: len(texts) - first]])
            cosine, near = (old, at) if old >= new[0] else (new[0], first + position[0])
            wording, vector = question, original
            reason = Discarded(question, texts[near], min(float(cosine), 1.0)) if cosine >= limit else None
            tries = retries if rewrite is not None else 0
            while cosine >= limit and tries:
                tries, calls = tries - 1, calls + 1
                answer = rewrite(wording, texts[near])  # type: ignore[misc]
                if not isinstance(answer, str):
                    raise ArgumentError(f"rewrite gave {shown(repr(answer), 60)} for '{shown(wording)}'; give a text")
                if answer.strip():
                    wording, vector = answer, unit_rows(encode([answer]), "encode", [answer], width)[0]
                    (cosine,), (near,) = _nearest(vector[None], [*pool, fresh[: len(texts) - first]])
            if cosine >= limit:
                assert reason is not None
                discarded.append(reason)
                continue
            fresh[len(texts) - first] = vector
            texts.append(wording)
            accepted.append(wording)
            rewritten += reason is not None
        pool.append(fresh[: len(texts) - first].copy())
    return Deduplicated(tuple(accepted), tuple(discarded), rewritten, calls)


def _nearest(vectors: Vectors, pool: list[Vectors]) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """For each vector the largest cosine with the pool, -inf if that is empty, and its place there."""
    import numpy as np

    best, places = np.full(len(vectors), -math.inf), np.zeros(len(vectors), np.int64)
    before = 0
    for block in pool:
        if len(block):
            cosines = vectors @ block.T
            at = cosines.argmax(axis=1)
            values = cosines[np.arange(len(vectors)), at]
            nearer = values > best
            best[nearer], places[nearer] = values[nearer], before + at[nearer]
        before += len(block)
    return best, places


def _blocks(texts: list[str]) -> Iterator[list[str]]:
    for at in range(0, len(texts), BLOCK):
        yield texts[at : at + BLOCK]


def check_nearness(threshold: float, retries: int) -> None:
    """Refuse a threshold that is no cosine above 0, or retries below 0."""
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise ArgumentError(f"threshold is {shown(repr(threshold), 60)}; it must be a cosine above 0 and at most 1")
    check_count("retries", retries, 0)
