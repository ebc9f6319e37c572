"""Crescent: a model writes new questions, drops those that are too similar, and votes on the answers.

The steps follow "The Self-Improvement Paradox" (arXiv 2502.13441, Crescent). Where its released code is unsound, this
differs: rewritten questions are tested like any other, there is one threshold on one cosine, an answer needs a
majority, and cleaning leaves mathematics alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from ..common.checks import as_text, as_texts, check_callable, check_count, is_number
from ..common.display import Displayed, Summary
from ..common.messages import shown
from ..errors import ArgumentError
from ..evaluation.answers import same_answer
from ..evaluation.by_value import check_installed
from ..evaluation.extraction import final_answer
from .deduplication import Deduplicated, Encode, Rewrite, check_nearness, deduplicate

Generate = Callable[[list[str]], Sequence[str]]  # prompts -> one response per prompt

_END = re.compile(r"[?？؟]")  # also full-width and Arabic question marks


@dataclass(frozen=True, repr=False)
class Consensus(Displayed):
    """The result of a vote.

    answer: the winning answer, in the form that most responses gave; None without a majority. votes: the most votes of
    an answer, even if it did not win. n: number of responses, with or without an answer. responses: those that gave the
    winning answer, in order. reason: None, or the first reason that applies: "no answer" (in any response), "tie", "few
    votes" (fewer than min_votes), "low agreement" (votes / n below min_agreement).
    """

    answer: str | None
    votes: int
    n: int
    responses: tuple[str, ...]
    reason: str | None = None

    def _summary(self) -> Summary:
        answer = "no answer" if self.answer is None else shown(self.answer, 60)
        why = "" if self.reason is None else f" ({self.reason})"
        return Summary(f"{answer}{why}, {self.votes} votes of {self.n} responses")


class Pair(NamedTuple):
    """A question, and a response to train on."""

    prompt: str
    response: str


@dataclass(frozen=True, repr=False)
class Crescent(Displayed):
    """The result of `crescent`.

    pairs: each question with a majority, and the first response that gives its answer. questions: the result of
    `deduplicate`. votes: the `consensus` on each accepted question, in order. counts: step -> number of questions;
    "asked" = "no question" + "too near" + "no answer" + "tie" + "few votes" + "low agreement" + "pairs".
    """

    pairs: tuple[Pair, ...]
    questions: Deduplicated
    votes: tuple[Consensus, ...]
    counts: dict[str, int]

    def _summary(self) -> Summary:
        rows = [[step, str(count)] for step, count in self.counts.items()]
        return Summary(
            f"{len(self.pairs)} pairs from {self.counts.get('asked', 0)} questions", (), ("step", "questions"), rows
        )


def bait_prompts() -> tuple[str, ...]:
    """Return prompts that make a chat model write a mathematical question of its own.

    They contain nothing from a data set, which is the point of Crescent. The wording is ours; there are several prompts
    to vary the output of a model that repeats itself. Each asks for a question mark, which `clean_question` needs.

    Source: bait prompting, arXiv 2502.13441.

    >>> len(bait_prompts()), "question mark" in bait_prompts()[0]
    (6, True)
    """
    kinds = (
        "about buying and selling",
        "about time, speed and distance",
        "about fractions or percentages",
        "about counting or arranging things",
        "about lengths, areas or volumes",
        "that takes several steps of arithmetic",
    )
    return tuple(
        f"Invent a word problem in mathematics {kind} that nobody has asked before. Write the problem alone, without"
        " its solution, and end it with a question mark."
        for kind in kinds
    )


def clean_question(text: str) -> str:
    """Return a generated text up to and including its first question mark, or "" if there is none.

    White space becomes single spaces. Everything else stays, notably - / % $ ( ) = and decimal points, which Crescent's
    released code deletes ("3/4" becomes "34"); unlike it, this has no list of phrases to remove.

    Source: the cleaning step of arXiv 2502.13441, with these changes.

    >>> clean_question("Tom has $3.50 and\\nspends 3/4 of it (75%).  What is left?  Answer: $0.875")
    'Tom has $3.50 and spends 3/4 of it (75%). What is left?'
    >>> clean_question("Let x - 1 = -5.")
    ''
    """
    end = _END.search(as_text("text", text))
    if end is None or not text[: end.start()].strip():
        return ""
    return " ".join(text[: end.end()].split())


def consensus(
    responses: Sequence[str],
    *,
    min_votes: int = 2,
    min_agreement: float = 0.5,
    extract: Callable[[str], str | None] = final_answer,
    same: Callable[[str, str], bool] = same_answer,
) -> Consensus:
    """Let the responses to one question vote on its answer.

        votes(a) = |{j : same(a, extract(r_j))}|
        answer = the a with most votes,   if no other has as many, votes >= min_votes and votes / n >= min_agreement

    Args: `extract(response)` returns its answer, or None, which counts in n but never wins. `same(one, other)` tells
    whether two answers are equal; answers with as many votes that are equal are one, and the form that most responses
    gave stands for it, of several the shortest, then the first in the alphabet. The order of the responses does not
    matter, not even if `same` is not transitive: 75% is 75 and 0.75, which differ. Raises ArgumentError for no
    responses or values out of range, ExtraError without math-verify unless `same` is given.

    Source: the consensus step of arXiv 2502.13441. The minima, and that a tie is no majority, are ours: the released
    code takes the most frequent answer whatever its share, the first one in a tie, and lets "no answer" win.

    >>> consensus(["3 + 4 = 7", "It is 7.", "It is 8."])
    Consensus: 7, 2 votes of 3 responses
    >>> consensus(["It is 7.", "It is 8.", "I do not know."]).reason
    'tie'
    """
    _check_vote(min_votes, min_agreement)
    given = as_texts("responses", responses, empty=True)
    if not given:
        raise ArgumentError("responses is empty; give at least one")
    check_callable("extract", extract, "from a response to its answer, or None")
    check_callable("same", same, "(one, other) -> bool")
    if same is same_answer:
        check_installed()
    answers = [extract(response) for response in given]
    for answer, response in zip(answers, given, strict=True):
        if not isinstance(answer, str | None):
            raise ArgumentError(
                f"extract returned {shown(repr(answer), 60)} for '{shown(response)}'; return a text or None"
            )
    forms = Counter(answer for answer in answers if answer is not None)
    n = len(given)
    if not forms:
        return Consensus(None, 0, n, (), "no answer")
    equal = {form: {form} for form in forms}
    for one, other in combinations(sorted(forms), 2):
        if same(one, other):
            equal[one].add(other)
            equal[other].add(one)
    votes = {form: sum(forms[other] for other in others) for form, others in equal.items()}
    most = max(votes.values())
    best = [form for form in forms if votes[form] == most]
    winner = min(best, key=lambda form: (-forms[form], len(form), form))
    reason = None
    if any(form not in equal[winner] for form in best):
        reason = "tie"
    elif most < min_votes:
        reason = "few votes"
    elif most / n < min_agreement:
        reason = "low agreement"
    if reason:
        return Consensus(None, most, n, (), reason)
    chosen = tuple(r for r, mine in zip(given, answers, strict=True) if mine in equal[winner])
    return Consensus(winner, most, n, chosen)


def crescent(
    generate: Generate,
    encode: Encode,
    answer: Generate,
    *,
    questions: int,
    samples: int,
    bait: Sequence[str] | None = None,
    clean: Callable[[str], str] = clean_question,
    history: Sequence[str] = (),
    threshold: float = 0.85,
    rewrite: Rewrite | None = None,
    retries: int = 3,
    min_votes: int = 2,
    min_agreement: float = 0.5,
    extract: Callable[[str], str | None] = final_answer,
    same: Callable[[str, str], bool] = same_answer,
) -> Crescent:
    """Make training pairs with nothing but a model: bait, clean, deduplicate, answer, vote.

        raw_i = generate(bait_i mod b), i < questions;   q = deduplicate(clean(raw));   r_j = answer(q), j < samples
        pairs = (q, the first r_j that gives the answer of consensus(r)), if there is one

    Args: `generate(prompts)` and `answer(questions)` return one text per input, sampled rather than greedy. `answer`
    gets each question `samples` times in a row, and adds its own instructions. `bait`: prompts, used in turn, by
    default `bait_prompts()`. `clean`: raw text -> question, or ""; also applied to the results of `rewrite`. The others
    are those of `deduplicate` and `consensus`. Raises ArgumentError as these do, and if a callable returns another
    number of texts than it was given.

    Source: arXiv 2502.13441; each step documents its differences.

    >>> made = crescent(
    ...     lambda prompts: [f"What is {i % 3} + 4?" for i, _ in enumerate(prompts)],
    ...     lambda texts: [[text.count(digit) for digit in "01234"] for text in texts],
    ...     lambda texts: [f"It is {int(text[8]) + 4}." for text in texts],
    ...     questions=5,
    ...     samples=3,
    ...     threshold=0.99,
    ... )
    >>> made.pairs[2]
    Pair(prompt='What is 2 + 4?', response='It is 6.')
    >>> {step: count for step, count in made.counts.items() if count}
    {'asked': 5, 'too near': 2, 'pairs': 3}
    """
    check_count("questions", questions, 1)
    check_count("samples", samples, 1)
    for name, function in (("generate", generate), ("answer", answer)):
        check_callable(name, function, "from a list of prompts to a list of as many texts")
    check_callable("encode", encode, "from a list of texts to an array of vectors")
    check_callable("clean", clean, "from a text to a question")
    check_nearness(threshold, retries)  # check everything before the first call of the model
    _check_vote(min_votes, min_agreement)
    if same is same_answer:
        check_installed()
    history = as_texts("history", history)
    if min_votes > samples:
        raise ArgumentError(f"min_votes is {min_votes} but samples is {samples}: no answer could win; sample more")
    baits = as_texts("bait", bait_prompts() if bait is None else bait)
    if not baits:
        raise ArgumentError("bait is empty; give at least one prompt, or None for bait_prompts()")
    raw = _called("generate", generate, [baits[i % len(baits)] for i in range(questions)])

    def cleaning(text: str) -> str:
        question = clean(text)
        if not isinstance(question, str):
            raise ArgumentError(f"clean returned {shown(repr(question), 60)} for '{shown(text)}'; return a string")
        return question.strip()

    cleaned = [question for question in map(cleaning, raw) if question]

    def again(question: str, neighbour: str) -> str:
        answer = rewrite(question, neighbour)  # type: ignore[misc]
        return cleaning(answer) if isinstance(answer, str) else answer  # deduplicate refuses anything but a string

    kept = deduplicate(
        cleaned, encode, history=history, threshold=threshold, rewrite=again if rewrite else None, retries=retries
    )
    responses = _called("answer", answer, [question for question in kept.accepted for _ in range(samples)])
    votes = tuple(
        consensus(
            responses[at : at + samples],
            min_votes=min_votes,
            min_agreement=min_agreement,
            extract=extract,
            same=same,
        )
        for at in range(0, len(responses), samples)
    )
    pairs = tuple(Pair(q, vote.responses[0]) for q, vote in zip(kept.accepted, votes, strict=True) if vote.responses)
    counts = {"asked": questions, "no question": questions - len(cleaned), "too near": len(kept.discarded)}
    for reason in ("no answer", "tie", "few votes", "low agreement"):
        counts[reason] = sum(vote.reason == reason for vote in votes)
    return Crescent(pairs, kept, votes, counts | {"pairs": len(pairs)})


def _called(name: str, function: Generate, texts: list[str]) -> list[str]:
    """Call a user's function on texts, and check its result."""
    returned = as_texts(f"what {name} returned", function(texts), empty=True) if texts else []
    if len(returned) != len(texts):
        raise ArgumentError(
            f"{name} was given {len(texts)} texts and returned {len(returned)}; it must return one each"
        )
    return returned


def _check_vote(min_votes: int, min_agreement: float) -> None:
    check_count("min_votes", min_votes, 1)
    if not is_number(min_agreement) or not 0 <= min_agreement <= 1:
        raise ArgumentError(f"min_agreement is {shown(repr(min_agreement), 60)}; it must be a share from 0 to 1")
