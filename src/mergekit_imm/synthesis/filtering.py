"""Which of a model's samples to train on: those that give the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..common.checks import is_integer
from ..errors import ArgumentError
from ..evaluation.answers import is_correct


@dataclass(frozen=True)
class Sample:
    """A response to a prompt, and the right answer. Of a line of JSON: `Sample(**json.loads(line))`."""

    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Kept:
    """What `keep_correct` kept, in order, and what became of the rest.

    wrong, duplicates, beyond: how many samples were dropped, for which reason. prompts: how many there are; unsolved:
    those of which no sample is kept. Easy prompts are kept more often than hard ones: unsolved says how far that goes.
    """

    samples: tuple[Sample, ...]
    wrong: int
    duplicates: int
    beyond: int
    prompts: int
    unsolved: tuple[str, ...]


def keep_correct(
    samples: Iterable[Sample],
    *,
    matcher: Callable[[str, str], bool] = is_correct,
    per_prompt: int | None = None,
    duplicates: bool = False,
) -> Kept:
    """Keep the samples whose answer is the right one, as STaR and the paper do.

        D_S = {(q_i, r_ij) : the answer of r_ij is a_i}                                      (section 3)

    Args: `samples`, in any order; `matcher(response, answer)`, whether a response is right; `per_prompt`, keep at most
    the first so many of a prompt; `duplicates`, keep a response that a prompt has already as well. Returns what was
    kept, in order, and counts. Raises ArgumentError.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), section 3; STaR
    (arXiv 2203.14465). What is counted, and that duplicates are dropped, is ours.

    >>> kept = keep_correct([Sample("2 + 3 = ?", "That is 5.", "5"), Sample("2 + 2 = ?", "It is 5.", "4")])
    >>> [each.prompt for each in kept.samples], kept.wrong, kept.unsolved
    (['2 + 3 = ?'], 1, ('2 + 2 = ?',))
    """
    if per_prompt is not None and (not is_integer(per_prompt) or per_prompt < 1):
        raise ArgumentError(f"per_prompt is {per_prompt!r}; keep at least one of each prompt, or None for all")
    found: dict[str, list[Sample]] = {}
    seen: set[tuple[str, str]] = set()
    kept: list[Sample] = []
    wrong = twice = beyond = 0
    for number, each in enumerate(samples):
        if not isinstance(each, Sample):
            raise ArgumentError(
                f"samples: number {number} is a {type(each).__name__}; give Sample(prompt, response, answer), of a"
                " line of JSON Sample(**line)"
            )
        mine = found.setdefault(each.prompt, [])
        if not matcher(each.response, each.answer):
            wrong += 1
        elif not duplicates and (each.prompt, each.response) in seen:
            twice += 1
        elif per_prompt is not None and len(mine) >= per_prompt:
            beyond += 1
        else:
            seen.add((each.prompt, each.response))
            mine.append(each)
            kept.append(each)
    unsolved = tuple(prompt for prompt, mine in found.items() if not mine)
    return Kept(tuple(kept), wrong, twice, beyond, len(found), unsolved)
