"""Measure a model on files of questions: greedy accuracy, and pass@k from sampled answers.

    python score.py --model MODEL --json scores.json --questions gsm8k=gsm8k-test.jsonl svamp=svamp.jsonl

Give files in domain and out of it. A gate of `imm-loop` needs questions of its own: `heldout=...`, in no other file.
"""

import argparse
import json
import math
from pathlib import Path

from answers import Generator, read_questions

from mergekit_imm.evaluation import is_correct, mean_pass_at_k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--questions", required=True, nargs="+", metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each file")
    parser.add_argument("--samples", type=int, default=0, help="answers to each question, for pass@k; 0: greedy alone")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--longest", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=32, help="questions at once, without vLLM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = Generator(arguments.model, seed=arguments.seed, longest=arguments.longest, batch=arguments.batch)
    scores: dict[str, dict[str, float]] = {}
    for pair in arguments.questions:
        name, _, path = pair.partition("=")
        questions = read_questions(path, arguments.limit)
        greedy = generator.answers(questions, 1, 0.0)
        share = sum(is_correct(each[0].text, q.answer) for each, q in zip(greedy, questions, strict=True)) / len(
            questions
        )
        found = {
            "accuracy": 100 * share,
            "standard error": 100 * math.sqrt(share * (1 - share) / len(questions)),
        }
        if arguments.samples:
            sampled = generator.answers(questions, arguments.samples, arguments.temperature)
            counts = [
                sum(is_correct(answer.text, question.answer) for answer in each)
                for each, question in zip(sampled, questions, strict=True)
            ]
            for k in (1, arguments.samples):
                found[f"pass@{k}"] = 100 * mean_pass_at_k([(arguments.samples, count) for count in counts], k)
        scores[name] = found
    Path(arguments.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
