"""Let a model answer additions at temperatures .2, .4 and .6, and keep the answers whose result is right (STaR)."""

import argparse
import random

import torch
from toy import IN_DOMAIN, Example, distinct, load, respond, same_result, write_examples

TEMPERATURES = (0.2, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, help="JSON lines of prompts and answers")
    parser.add_argument("--questions", type=int, default=600, help="the same ones in each round")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    questions = distinct(IN_DOMAIN, arguments.questions, random.Random(arguments.seed), test=False)
    prompts = [question.prompt for question in questions]
    torch.manual_seed(1000 * arguments.round + arguments.seed)
    right: dict[Example, None] = {}  # each answer once
    for temperature in TEMPERATURES:
        answers = respond(model, tokenizer, prompts, temperature)
        for question, answer in zip(questions, answers, strict=True):
            if same_result(answer, question.answer):
                right[Example(question.prompt, answer)] = None
    solved = len({prompt for prompt, _ in right})
    print(f"{solved} of {len(prompts)} questions solved, with {len(right)} different answers")
    if not right:
        raise SystemExit("error: no answer was right, so there is nothing to train on; pretrain for longer")
    write_examples(right, arguments.output)


if __name__ == "__main__":
    main()
