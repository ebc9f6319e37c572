"""Test a model on questions it was not trained on: in domain (addition) and out of domain (the other seven skills).

The questions are the same for all models and seeds. Half of them are held out: scores of those may choose a model or a
setting (`--part held-out`); the other half is for what is reported (`--part test`).
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector
from toy import IN_DOMAIN, NAMES, OUT_OF_DOMAIN, SKILLS, Example, distinct, encode, load, respond, same_result

from mergekit_imm.analysis import mean_kl
from mergekit_imm.evaluation import mean_pass_at_k

TEMPERATURE = 0.6  # of the answers that are sampled for pass@k
KL_QUESTIONS = 100  # that the base answers, to compare what both models predict there
FEWER = 4  # each of these is answered several times, so a quarter of the questions


def questions(part: str, inside: int, outside: int) -> dict[str, list[Example]]:
    """Draw the questions of a part, by skill; parts share none, but for the remainders' few."""
    found = {}
    for skill in SKILLS:
        count = inside if skill == IN_DOMAIN else outside
        drawn = distinct(skill, 2 * count, random.Random(f"test {skill}"), test=True)
        found[skill] = drawn[part == "held-out" :: 2]
    return found


def summary(percent: dict[str, float]) -> dict[str, float]:
    """Summarise percentages by skill: in domain, and the plain mean of the others."""
    outside = sum(percent[skill] for skill in OUT_OF_DOMAIN) / len(OUT_OF_DOMAIN)
    return {"in": round(percent[IN_DOMAIN], 3), "out": round(outside, 3)}


def accuracy(model: Any, tokenizer: Any, asked: dict[str, list[Example]]) -> dict[str, float]:
    """Measure greedy answers: percentages by skill."""
    percent = {}
    for skill, examples in asked.items():
        answers = respond(model, tokenizer, [example.prompt for example in examples])
        right = map(same_result, answers, (example.answer for example in examples))
        percent[skill] = 100 * sum(right) / len(examples)
    return percent


def sampled(model: Any, tokenizer: Any, asked: dict[str, list[Example]], samples: int) -> dict[str, Any]:
    """Measure pass@1 and pass@samples by the same sampled answers."""
    torch.manual_seed(0)
    chances: dict[int, dict[str, float]] = {1: {}, samples: {}}
    for skill, each in asked.items():
        examples = [example for example in each[::FEWER] for _ in range(samples)]
        answers = respond(model, tokenizer, [example.prompt for example in examples], TEMPERATURE)
        right = [same_result(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
        counts = [sum(right[at : at + samples]) for at in range(0, len(right), samples)]
        for k, percent in chances.items():
            percent[skill] = 100 * mean_pass_at_k([(samples, count) for count in counts], k)
    return {f"pass@{k}": summary(percent) for k, percent in chances.items()}


def divergence(base: Any, model: Any, tokenizer: Any) -> float:
    """Measure KL(base || model) per token in domain, on answers of the base at temperature 1, right or wrong."""
    prompts = [example.prompt for example in questions("test", KL_QUESTIONS, 1)[IN_DOMAIN]]
    torch.manual_seed(0)
    answers = respond(base, tokenizer, prompts, temperature=1.0)
    ids, labels = encode(tokenizer, list(map(Example, prompts, answers)))
    return mean_kl(base, model, [{"input_ids": ids, "labels": labels}]).kl.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True, help="to measure the distance from it, of weights and of predictions")
    parser.add_argument("--json", required=True, help="where the numbers go")
    parser.add_argument("--part", choices=["test", "held-out"], nargs="+", default=["test"])
    parser.add_argument("--questions", type=int, nargs=2, default=[400, 100], help="in domain, and of each other skill")
    parser.add_argument("--samples", type=int, default=0, help="also sample answers, for pass@1 and pass@SAMPLES")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    found: dict[str, Any] = {}
    if "test" in arguments.part:
        asked = questions("test", *arguments.questions)
        percent = accuracy(model, tokenizer, asked)
        found |= summary(percent)
        if arguments.samples:
            found |= sampled(model, tokenizer, asked, arguments.samples)
            found["skill"] = {NAMES[skill]: value for skill, value in percent.items()}
    if "held-out" in arguments.part:
        held = summary(accuracy(model, tokenizer, questions("held-out", *arguments.questions)))
        found["held-out"] = held["in"] + held["out"]
    base = load(arguments.base)[0]
    found["kl"] = round(divergence(base, model, tokenizer), 6)
    theta = parameters_to_vector(base.parameters()).detach()
    moved = parameters_to_vector(model.parameters()).detach() - theta
    found["moved"] = round(float(moved.norm() / theta.norm()), 5)
    Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
