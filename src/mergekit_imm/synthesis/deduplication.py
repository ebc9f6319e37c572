"""Remove questions that are too similar to others: rejection sampling by cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.checks import as_texts, check_callable, check_count, is_number
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError
from ..evaluation.embeddings import unit_rows

if TYPE_CHECKING:  # import numpy only where it is used: commands import this package for their --help
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float64]

Encode = Callable[[list[str]], Any]  # texts -> array of shape (texts, width)
Rewrite = Callable[[str, str], str]  # question, its nearest neighbour -> another wording

TEXTS_AT_ONCE = 1024  # texts per encoding and multiplication: the cosines of two blocks take 8 MiB
ROUNDING = 1e-9  # tolerance for the cosine of equal vectors


@dataclass(frozen=True)
class Discarded:
    """A question too similar to another, in its original wording, with its nearest neighbour and their cosine."""

    question: str
    neighbour: str
    cosine: float


@dataclass(frozen=True, repr=False)
class Deduplicated(Displayed):
    """The result of `deduplicate`.

    accepted: questions in order, some rewritten. discarded: all others. rewritten: number of rewritten questions among
    the accepted. retries: number of calls of `rewrite`.
    """

    accepted: tuple[str, ...]
    discarded: tuple[Discarded, ...]
    rewritten: int
    retries: int

    def _summary(self) -> Summary:
        changed = f"{self.rewritten} of them rewritten in {self.retries} calls"
        rows = [[shown(each.question), shown(each.neighbour), f"{each.cosine:.3f}"] for each in self.discarded]
        line = f"{len(self.accepted)} questions accepted, {changed}; {len(self.discarded)} discarded"
        return Summary(line, (), ("discarded", "nearest", "cosine"), rows)


def deduplicate(
    questions: Sequence[str],
    encode: Encode,
    *,
    history: Sequence[str] = (),
    threshold: float = 0.85,
    rewrite: Rewrite | None = None,
    retries: int = 3,
) -> Deduplicated:
    """Drop questions that are too similar to an earlier one: rejection sampling with one threshold.

        q_i is accepted if cos(e(q_i), e(a)) < threshold for all a in history and all accepted before

    The first question of a cluster stays. A question that is too similar goes to `rewrite(question, neighbour)`, with
    its latest wording and the nearest neighbour of that, up to `retries` times; each new wording is tested in the same
    way, and if none passes, the question is discarded. An empty wording uses up a try.

    Args: `encode(texts)` returns an array of shape (texts, width), each row independent of the other texts; it gets at
    most 1024 texts per call. `history`: questions of earlier rounds, not compared with each other. `threshold` in
    (0, 1]; at 1 only equal directions are too similar. Cosines are computed in float64, with a tolerance of 1e-9.
    Memory: the vectors, and blocks of 1024 x 1024. Raises ArgumentError for an empty question, a value out of range, or
    invalid vectors (shape, NaN, zero).

    Source: self-deduplication of arXiv 2502.13441. Testing rewritten questions, retries and a single threshold are
    ours: the released code accepts any rewritten question, and has one threshold within a batch (0.85) and another for
    the history.

    >>> found = deduplicate(["2+2?", "2 + 2?", "7-5?"], lambda texts: [[t.count("2"), t.count("7")] for t in texts])
    >>> found.accepted, found.discarded
    (('2+2?', '7-5?'), (Discarded(question='2 + 2?', neighbour='2+2?', cosine=1.0),))
    """
    import numpy as np

    check_nearness(threshold, retries)
    check_callable("encode", encode, "from a list of texts to an array of vectors")
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
        fresh, first = np.empty_like(vectors), len(texts)  # vectors that this block adds
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
                    raise ArgumentError(
                        f"rewrite returned {shown(repr(answer), 60)} for '{shown(wording)}'; return a string"
                    )
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
    """The largest cosine of each vector with the pool (-inf for an empty one), and its index there."""
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
    for at in range(0, len(texts), TEXTS_AT_ONCE):
        yield texts[at : at + TEXTS_AT_ONCE]


def check_nearness(threshold: float, retries: int) -> None:
    """Raise ArgumentError unless 0 < threshold <= 1 and retries is an integer >= 0."""
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise ArgumentError(f"threshold is {shown(repr(threshold), 60)}; it must be a cosine in 0 < threshold <= 1")
    check_count("retries", retries, 0)
