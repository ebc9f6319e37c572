"""Select a model's samples to train on: those with the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..common.checks import as_items, as_text, check_callable, is_integer
from ..common.display import Displayed, Summary
from ..errors import ArgumentError
from ..evaluation.answers import is_correct


@dataclass(frozen=True)
class Sample:
    """A prompt, a response, and the right answer. From a line of JSON: `Sample(**json.loads(line))`."""

    prompt: str
    response: str
    answer: str


@dataclass(frozen=True, repr=False)
class Kept(Displayed):
    """The samples that `keep_correct` kept, in order, and what happened to the rest.

    wrong, duplicates, beyond: number of samples dropped because they are wrong, repeated, or beyond `per_prompt`.
    prompts: number of prompts. unsolved: prompts without a kept sample, which shows how far selection favours easy
    prompts.
    """

    samples: tuple[Sample, ...]
    wrong: int
    duplicates: int
    beyond: int
    prompts: int
    unsolved: tuple[str, ...]

    def _summary(self) -> Summary:
        dropped = f"{self.wrong} wrong, {self.duplicates} repeated, {self.beyond} beyond per_prompt"
        solved = f"{self.prompts - len(self.unsolved)} of {self.prompts} prompts solved"
        return Summary(f"{len(self.samples)} samples kept; {dropped}; {solved}")


def keep_correct(
    samples: Iterable[Sample],
    *,
    matcher: Callable[[str, str], bool] = is_correct,
    per_prompt: int | None = None,
    duplicates: bool = False,
) -> Kept:
    """Keep the samples with the right answer, as in STaR and the paper.

        D_S = {(q_i, r_ij) : the answer of r_ij is a_i}                                      (section 3)

    Args: `samples`, in any order; `matcher(response, answer)`, whether a response is right; `per_prompt`, the most
    samples to keep of a prompt, the first ones; `duplicates`, whether to keep repeated responses to a prompt. Returns
    the kept samples, in order, and counts. Raises ArgumentError, and ExtraError without math-verify unless `matcher` is
    given.

    Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), section 3; STaR
    (arXiv 2203.14465). The counts and dropping duplicates are ours.

    >>> kept = keep_correct([Sample("2 + 3 = ?", "That is 5.", "5"), Sample("2 + 2 = ?", "It is 5.", "4")])
    >>> [each.prompt for each in kept.samples], kept.wrong, kept.unsolved
    (['2 + 3 = ?'], 1, ('2 + 2 = ?',))
    """
    if per_prompt is not None and (not is_integer(per_prompt) or per_prompt < 1):
        raise ArgumentError(f"per_prompt is {per_prompt!r}; keep at least one of each prompt, or None for all")
    check_callable("matcher", matcher, "(response, answer) -> bool")
    found: dict[str, list[Sample]] = {}
    seen: set[tuple[str, str]] = set()
    kept: list[Sample] = []
    wrong = twice = beyond = 0
    for number, each in enumerate(as_items("samples", samples, "Sample(prompt, response, answer)")):
        if not isinstance(each, Sample):
            raise ArgumentError(
                f"samples: number {number} is a {type(each).__name__}; give Sample(prompt, response, answer), or"
                " Sample(**line) for a line of JSON"
            )
        for name in ("prompt", "response", "answer"):
            as_text(f"samples: {name} of number {number}", getattr(each, name))
        mine = found.setdefault(each.prompt, [])
        right = matcher(each.response, each.answer)
        if right is None:
            raise ArgumentError(f"matcher returned None for number {number} of samples; it must return True or False")
        if not right:
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
