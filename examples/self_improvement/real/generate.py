"""Answer questions at temperatures .2, .4 and .6, and keep the answers whose number is right.

Each kept answer is a line with "prompt" and "completion", as TRL's SFTTrainer takes them; no line comes twice, and an
answer that was cut off is not kept.
"""

import argparse
import json
from pathlib import Path

from answers import Generator, prompt, read_questions, right

TEMPERATURES = (0.2, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True, help='JSON lines with "question" and "answer"')
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=1, help="answers at each temperature")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--longest", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=32, help="questions at once, without vLLM")
    parser.add_argument("--seed", type=int, default=0, help="give another one in each round")
    arguments = parser.parse_args()
    generator = Generator(
        arguments.model, seed=arguments.seed, longest=arguments.longest, batch=arguments.batch
    )  # fmt: skip
    questions = read_questions(arguments.questions, arguments.limit)
    kept: dict[tuple[str, str], str] = {}
    solved = set()
    for temperature in TEMPERATURES:
        for question, answers in zip(
            questions, generator.answers(questions, arguments.count, temperature), strict=True
        ):
            for answer in answers:
                if answer.ended and right(answer.text, question):
                    solved.add(question)
                    row = {
                        "prompt": prompt(question.question, generator.tokenizer),
                        "completion": answer.text,
                    }
                    if not isinstance(row["prompt"], str):
                        row["completion"] = [{"role": "assistant", "content": answer.text}]
                    kept[question.question, answer.text] = json.dumps(row, ensure_ascii=False)
    print(f"{len(solved)} of {len(questions)} questions solved, with {len(kept)} different answers")
    if not kept:
        raise SystemExit("error: no answer was right, so there is nothing to train on")
    Path(arguments.output).write_text("".join(f"{row}\n" for row in kept.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
