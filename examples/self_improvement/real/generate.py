"""Answer questions at temperatures .2, .4 and .6, and keep the right answers.

Each kept answer is a line with "prompt" and "completion", as TRL's SFTTrainer takes them; no line comes twice, and an
answer that was cut off is not kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from answers import Generator, Question, prompt, read_questions

from mergekit_imm.evaluation import is_correct

TEMPERATURES = (0.2, 0.4, 0.6)


def row(question: Question, text: str, tokenizer: Any) -> str:
    """Make a line of the data: both parts as messages of a chat, or both as text."""
    asked = prompt(question.question, tokenizer)
    answer = text if isinstance(asked, str) else [{"role": "assistant", "content": text}]
    return json.dumps({"prompt": asked, "completion": answer}, ensure_ascii=False)


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
    generator = Generator(arguments.model, seed=arguments.seed, longest=arguments.longest, batch=arguments.batch)
    questions = read_questions(arguments.questions, arguments.limit)
    kept: dict[tuple[str, str], str] = {}
    solved = set()
    for temperature in TEMPERATURES:
        answered = generator.answers(questions, arguments.count, temperature)
        for question, answers in zip(questions, answered, strict=True):
            for answer in answers:
                if answer.ended and is_correct(answer.text, question.answer):
                    solved.add(question)
                    kept[question.question, answer.text] = row(question, answer.text, generator.tokenizer)
    print(f"{len(solved)} of {len(questions)} questions solved, with {len(kept)} different answers")
    if not kept:
        raise SystemExit("error: no answer was right, so there is nothing to train on")
    Path(arguments.output).write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
