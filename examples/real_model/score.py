"""Measure a model on files of questions and texts, in domain and out of it.

    python score.py --model MODEL --json scores.json --questions gsm8k=gsm8k-test.jsonl svamp=svamp.jsonl

Of questions: greedy accuracy in percent; with --samples of those named, pass@k too, and how far the model's
confidence (the share of samples that agree) is from being right, ECE. Of questions with choices: which has the
greatest log-likelihood for each of its bytes, and ECE of its share of the likelihood of all. Of a text (*.txt):
perplexity. With --base: the distance of the weights.

A gate of `imm-loop` needs questions of its own: `heldout=...`, in no other file.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from answers import Generator, Questions, line, load, open_generator, read_questions, shown_before, token_ids

from mergekit_imm.evaluation import expected_calibration_error, mean_pass_at_k

WINDOW = 256  # tokens of a text that are seen at once


def accuracy(generator: Generator, questions: Questions) -> dict[str, float]:
    """Measure greedy answers."""
    answered = generator.answers(questions, 1, 0.0)
    right = [questions.is_right(each[0].text, one.answer) for each, one in zip(answered, questions.asked, strict=True)]
    return percent(right)


def percent(right: list[bool]) -> dict[str, float]:
    """Sum up what was right: the accuracy, and which it was, to compare models by question."""
    marks: Any = "".join("01"[each] for each in right)
    return {"accuracy": 100 * sum(right) / len(right), "right": marks}


def sampled(generator: Generator, questions: Questions, samples: int, temperature: float) -> dict[str, float]:
    """Measure sampled answers: pass@1, pass@samples, and ECE of the share of samples that agree."""
    answered = generator.answers(questions, samples, temperature)
    counts, confidences, right = [], [], []
    for answers, one in zip(answered, questions.asked, strict=True):
        counts.append((samples, sum(questions.is_right(each.text, one.answer) for each in answers)))
        most, times = Counter(each.text.strip() for each in answers).most_common(1)[0]
        confidences.append(times / samples)
        right.append(questions.is_right(most, one.answer))
    found = {f"pass@{k}": 100 * mean_pass_at_k(counts, k) for k in (1, samples)}
    return found | {"ece": expected_calibration_error(confidences, right)}


@torch.inference_mode()
def choose(model: Any, tokenizer: Any, questions: Questions, batch: int) -> dict[str, float]:
    """Measure multiple choice: the likelihood of each choice after the question, for each byte of it."""
    before = shown_before(questions.examples, tokenizer)
    rows = []
    for number, one in enumerate(questions.asked):
        start = before + token_ids(line(one.question), tokenizer)
        rows += [
            (number, each, start, tokenizer(f" {each}", add_special_tokens=False).input_ids) for each in one.choices
        ]
    scores: dict[int, dict[str, float]] = {}
    rows.sort(key=lambda row: len(row[2]) + len(row[3]))
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        padded = tokenizer.pad(
            {"input_ids": [start + ids for _, _, start, ids in part]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        logits = model(**padded).logits
        for row, (number, choice, start, ids) in zip(logits, part, strict=True):
            chances = row[len(start) - 1 : len(start) - 1 + len(ids)].float().log_softmax(-1)
            scores.setdefault(number, {})[choice] = float(chances[range(len(ids)), ids].sum())
    right, confidences = [], []
    for number, one in enumerate(questions.asked):
        of = scores[number]
        best = max(of, key=lambda choice: of[choice] / len(choice.encode()))
        right.append(best == one.answer)
        confidences.append(1 / sum(math.exp(value - of[best]) for value in of.values()))
    return percent(right) | {"ece": expected_calibration_error(confidences, right)}


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, text: str, batch: int = 4) -> dict[str, float]:
    """Measure the perplexity of a text, in windows that do not overlap."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(model.device)
    total = 0.0
    for part in windows.split(batch):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return {"perplexity": math.exp(total / (len(windows) * (WINDOW - 1))), "tokens": windows.numel()}


@torch.inference_mode()
def distance(base: Any, model: Any) -> float:
    """Measure how far a model's weights are from its base's, ||w - base|| / ||base||."""
    theirs = dict(base.named_parameters())
    moved = norm = 0.0
    for name, tensor in model.named_parameters():
        moved += float((tensor.double() - theirs[name].double()).square().sum())
        norm += float(theirs[name].double().square().sum())
    return math.sqrt(moved / norm)


def summary(scores: dict[str, dict[str, float]], inside: str) -> dict[str, float]:
    """Sum up accuracies: of the file in domain, the plain mean of the others, and the mean of these two."""
    outside = [found["accuracy"] for name, found in scores.items() if name != inside and "accuracy" in found]
    found = {"in": scores[inside]["accuracy"], "out": sum(outside) / len(outside)}
    return found | {"both": (found["in"] + found["out"]) / 2}


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure a model on all files."""
    generator = open_generator(arguments.model, seed=arguments.seed, longest=arguments.longest, batch=arguments.batch)
    model, tokenizer = load(arguments.model) if generator.by_vllm else (generator.model, generator.tokenizer)
    scores: dict[str, dict[str, float]] = {}
    for pair in arguments.questions:
        name, _, path = pair.partition("=")
        if path.endswith(".txt"):
            scores[name] = perplexity(model, tokenizer, Path(path).read_text(encoding="utf-8"))
            continue
        questions = read_questions(path, arguments.limit)
        if questions.asked[0].choices:
            scores[name] = choose(model, tokenizer, questions, arguments.batch)
            continue
        scores[name] = accuracy(generator, questions)
        if arguments.samples and (not arguments.sampled or name in arguments.sampled):
            fewer = Questions(questions.asked[: arguments.sampled_limit], questions.examples)
            scores[name] |= sampled(generator, fewer, arguments.samples, arguments.temperature)
    if arguments.inside:
        scores["mean"] = summary(scores, arguments.inside)
    if arguments.base:
        scores["to base"] = {"moved": distance(load(arguments.base)[0], model)}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--questions", required=True, nargs="+", metavar="NAME=FILE")
    parser.add_argument("--inside", metavar="NAME", help="the file in domain: also sum up, in, out and both")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each file")
    parser.add_argument("--samples", type=int, default=0, help="answers to each question, for pass@k; 0: greedy alone")
    parser.add_argument("--sampled", nargs="+", metavar="NAME", help="of these files alone")
    parser.add_argument("--sampled-limit", type=int, help="and of their first so many questions")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--base", help="also measure how far the model is from this one")
    parser.add_argument("--longest", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=64, help="questions at once, without vLLM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scores = measure(arguments)
    Path(arguments.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
