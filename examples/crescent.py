"""Crescent on a tiny model: it writes its own additions, votes on its own answers, and is trained on them.

    python examples/crescent.py [--quick] [--seeds 0 1] [--json FILE]

1. A Qwen2 model of 109 thousand parameters is trained from scratch on eight skills, at first on the answers and then on
   the questions too: so it can be baited. Its bait is the letter of a skill: after `A` it writes an addition, as
   `82+18=`.
2. `mergekit_imm.synthesis.crescent` makes training pairs of nothing but this model: 1500 questions are asked for, those
   that are near to others are dropped, each of the rest is answered 8 times, and a majority decides.
3. The model is fine-tuned on the pairs and tested on addition (in domain) and on the other seven skills (out of
   domain). Controls, all with the same number of steps: without the vote (one answer each, taken as it is), without
   de-duplication, and the same questions with right answers, which Crescent could at best have found.

A question is embedded by how often it has each run of one to three characters, hashed to 1024 places. A question too
near to others is not rewritten, of which so small a model is incapable: another one is drawn instead. Questions of
the tenth that is kept for tests are thrown away when they are written. The scores are real, and the toy is the rest:
addition, a new model for each seed, and "out of domain" means other skills of the same pretraining. About a minute and
a half a seed on one core.
"""

import argparse
import copy
import json
import random
import re
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("self_improvement")))

import numpy as np
import numpy.typing as npt
import torch
import transformers
from evaluate import accuracy, questions, summary
from experiments import markdown
from toy import (
    IN_DOMAIN,
    NAMES,
    Example,
    build_model,
    build_tokenizer,
    columns,
    encode,
    respond,
    train,
    training_mix,
    usable,
)
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from mergekit_imm.synthesis import Consensus, consensus, crescent

TEMPERATURE = 0.7  # of answers; questions are drawn at 1
WIDTH = 1024  # of the embedding
ARMS = {
    "base": "base, before",
    "crescent": "Crescent",
    "no vote": "without the vote",
    "no deduplication": "without de-duplication",
    "oracle": "same questions, right answers",
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    answering: int = 900  # steps of pretraining on answers
    asking: int = 250  # and on questions and answers after that
    batch: int = 128
    asked: int = 1500  # questions
    samples: int = 8
    steps: int = 100  # of each fine-tuning
    tests: tuple[int, int] = (400, 100)  # questions in domain, and of each other skill


QUICK = Size(answering=60, asking=60, batch=48, asked=60, samples=4, steps=4, tests=(20, 5))


def embed(texts: list[str]) -> npt.NDArray[np.float64]:
    """Count runs of one to three characters of each text."""
    vectors = np.zeros((len(texts), WIDTH))
    for vector, text in zip(vectors, texts, strict=True):
        for size in (1, 2, 3):
            for at in range(len(text) - size + 1):
                vector[zlib.crc32(text[at : at + size].encode()) % WIDTH] += 1
    return vectors


def question(text: str) -> str:
    """Return a written text up to its first equals sign; nothing if there is none, or if it is kept for tests."""
    head, sign, _ = text.partition("=")
    return head + sign if sign and usable(head + sign, test=False) else ""


def right_answer(prompt: str) -> str | None:
    """Return the right answer to an addition as in pretraining; None for other questions."""
    terms = re.fullmatch(r"A([1-9]\d{1,2})\+([1-9]\d{1,2})=", prompt)
    if terms is None or len(terms[1]) != len(terms[2]):
        return None
    answer: str = columns(int(terms[1]), int(terms[2]), 1)
    return answer


def result(response: str) -> str | None:
    """Return what a response says the sum is, if it says so."""
    found = re.search(r">(-?\d+)\.$", response)
    return found[1] if found else None


def equal(one: str, other: str) -> bool:
    return one == other


def pretrain(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> Qwen2ForCausalLM:
    """Train a base on answers alone, then on questions and answers: digits of questions are noise, and slow it down."""
    model = build_model(tokenizer, layers=2, seed=seed)
    for phase, (steps, lr) in enumerate(((size.answering, 4e-3), (size.asking, 2e-3))):
        mix = training_mix(steps * size.batch, random.Random(f"{seed} {phase}"))
        ids, labels = encode(tokenizer, mix)
        if phase == 1:
            labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        train(model, ids, labels, steps=steps, batch=size.batch, lr=lr, seed=seed, tell=tell)
    return model


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def share(right: Sequence[bool]) -> dict[str, int]:
    return {"right": sum(right), "of": len(right)}


def run_seed(seed: int, size: Size) -> dict[str, Any]:
    """Pretrain, make the pairs in each way, fine-tune on them, and measure."""
    tokenizer = build_tokenizer()
    base = pretrain(tokenizer, size, seed)
    torch.manual_seed(seed)
    written: list[str] = []
    spare: Iterator[str] = iter(())

    def generate(prompts: list[str]) -> list[str]:
        texts = [a + b for a, b in zip(prompts, respond(base, tokenizer, prompts, 1.0), strict=True)]
        written.extend(texts)
        return texts

    def another(_question: str, _neighbour: str) -> str:
        """Draw another question instead; they are written by the hundred, which is faster."""
        nonlocal spare
        found = next(spare, None)
        if found is None:
            prompts = [IN_DOMAIN] * 100
            spare = iter([a + b for a, b in zip(prompts, respond(base, tokenizer, prompts, 1.0), strict=True)])
            found = next(spare)
        return found

    answers: list[str] = []

    def answer(prompts: list[str]) -> list[str]:
        texts = respond(base, tokenizer, prompts, TEMPERATURE)
        answers.extend(texts)
        return texts

    tell("bait, clean, deduplicate, answer, vote")
    made = crescent(
        generate,
        embed,
        answer,
        questions=size.asked,
        samples=size.samples,
        bait=[IN_DOMAIN],
        clean=question,
        rewrite=another,
        extract=result,
        same=equal,
    )
    kept = made.questions.accepted
    singles = [answers[at : at + size.samples] for at in range(0, len(answers), size.samples)]
    pairs = {"crescent": [Example(*pair) for pair in made.pairs]}
    pairs["no vote"] = [Example(q, each[0]) for q, each in zip(kept, singles, strict=True) if result(each[0])]
    everything = [text for text in map(question, written) if text]
    many = respond(base, tokenizer, [text for text in everything for _ in range(size.samples)], TEMPERATURE)
    votes = [
        consensus(many[at : at + size.samples], extract=result, same=equal) for at in range(0, len(many), size.samples)
    ]
    pairs["no deduplication"] = [
        Example(q, v.responses[0]) for q, v in zip(everything, votes, strict=True) if v.responses
    ]
    pairs["oracle"] = [Example(q, right) for q in kept if (right := right_answer(q)) is not None]
    asked = questions("test", *size.tests)
    arms = {"base": scores(base, tokenizer, asked, 0)}
    for arm, examples in pairs.items():
        tell(f"{arm}: {len(examples)} pairs")
        arms[arm] = scores(fine_tuned(base, tokenizer, examples, size.steps, seed), tokenizer, asked, len(examples))
        arms[arm]["pairs right"] = sum(is_right(prompt, response) for prompt, response in examples)
    counts = dict(made.counts)
    counts["for tests"] = sum("=" in text and not question(text) for text in written)
    counts["no question"] -= counts["for tests"]
    return {
        "counts": counts,
        "rewritten": made.questions.rewritten,
        "drawn again": made.questions.retries,
        "repeats": len(everything) - len(set(everything)),
        "ill-formed": sum(right_answer(q) is None for q in kept),
        "truth": truth(kept, singles, made.votes),
        "arms": arms,
    }


def is_right(prompt: str, response: str) -> bool:
    """Check the sum, of any two numbers."""
    terms = re.fullmatch(r"A(\d+)\+(\d+)=", prompt)
    return terms is not None and result(response) == str(int(terms[1]) + int(terms[2]))


def truth(kept: Sequence[str], singles: Sequence[Sequence[str]], votes: Sequence[Consensus]) -> dict[str, Any]:
    """Count right answers: all that were sampled, those to questions with a consensus, and the consensus itself."""
    by = list(zip(kept, singles, votes, strict=True))
    return {
        "single": share([is_right(q, text) for q, each, _ in by for text in each]),
        "single, where they agree": share([is_right(q, text) for q, each, v in by if v.responses for text in each]),
        "consensus": share([is_right(q, v.responses[0]) for q, _, v in by if v.responses]),
    }


def fine_tuned(
    base: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example], steps: int, seed: int
) -> Qwen2ForCausalLM:
    """Return a fine-tuned copy; the base itself if there is nothing to train on."""
    if not examples:
        return base
    model = copy.deepcopy(base)
    ids, labels = encode(tokenizer, examples)
    train(model, ids, labels, steps=steps, batch=48, lr=3e-4, seed=seed, tell=tell)
    return model


def scores(model: Any, tokenizer: Any, asked: dict[str, list[Example]], pairs: int) -> dict[str, Any]:
    percent = accuracy(model, tokenizer, asked)
    return {"pairs": pairs, **summary(percent), "skill": {NAMES[skill]: round(x, 3) for skill, x in percent.items()}}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return markdown(head, (map(str, row) for row in rows)) + "\n"


def steps_table(results: Mapping[str, Any]) -> str:
    """What each step kept and lost, by seed."""
    seeds = results["seeds"]
    names = {
        "asked": "questions asked for",
        "no question": "lost: no question",
        "for tests": "lost: kept for tests",
        "too near": "lost: too near to another, after 3 more draws",
        "no answer": "lost: no answer",
        "tie": "lost: a tie",
        "few votes": "lost: fewer than 2 votes",
        "low agreement": "lost: less than half agree",
        "pairs": "training pairs",
    }
    rows = [[label, *(found["counts"][name] for found in seeds.values())] for name, label in names.items()]
    rows.append(["drawn again, in place of another", *(found["rewritten"] for found in seeds.values())])
    rows.append(["of those asked for, exact repeats", *(found["repeats"] for found in seeds.values())])
    rows.append(["accepted, but not an addition as in pretraining", *(found["ill-formed"] for found in seeds.values())])
    return table(["step", *(f"seed {seed}" for seed in seeds)], rows)


def truth_table(results: Mapping[str, Any]) -> str:
    """Right answers with and without the vote, by seed: right / n."""
    seeds = results["seeds"]
    names = {
        "single": "single answers, all questions",
        "single, where they agree": "single answers, questions with a consensus",
        "consensus": "consensus answers",
    }

    def cell(found: Mapping[str, int]) -> str:
        return f"{100 * found['right'] / found['of']:.1f} % of {found['of']}" if found["of"] else "none"

    rows = [[label, *(cell(found["truth"][name]) for found in seeds.values())] for name, label in names.items()]
    return table(["right answers among", *(f"seed {seed}" for seed in seeds)], rows)


def arms_table(results: Mapping[str, Any]) -> str:
    """Accuracy by arm: each seed, and the mean of the paired differences from the base."""
    seeds = results["seeds"].values()
    rows: list[list[str]] = []
    for arm, label in ARMS.items():
        found = [seed["arms"][arm] for seed in seeds]
        row = [label, ", ".join("–" if arm == "base" else f"{x['pairs right']}/{x['pairs']}" for x in found)]
        for domain in ("in", "out"):
            row.append(", ".join(f"{x[domain]:.1f}" for x in found))
            change = [x[domain] - seed["arms"]["base"][domain] for x, seed in zip(found, seeds, strict=True)]
            row.append("–" if arm == "base" else f"{statistics.mean(change):+.1f}")
        rows.append(row)
    inside, outside = results["tests"]
    head = [
        "trained on",
        "right pairs / pairs",
        f"in domain, % of {inside}",
        "change",
        f"out of domain, % of 7 × {outside}",
        "change",
    ]
    return table(head, rows)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "crescent steps": steps_table,
    "crescent truth": truth_table,
    "crescent arms": arms_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="almost nothing of everything: whether it runs, no more")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 and 1, or with --quick 0")
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that numbers do not depend on the machine's cores
    transformers.utils.logging.set_verbosity_error()
    size = QUICK if arguments.quick else Size()
    results: dict[str, Any] = {"tests": list(size.tests), "seeds": {}}
    for seed in arguments.seeds or ([0] if arguments.quick else [0, 1]):
        tell(f"seed {seed}")
        results["seeds"][str(seed)] = run_seed(seed, size)
    for make in TABLES.values():
        print(make(results))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
