"""Answer questions at temperatures .2, .4 and .6, and keep the right answers (or, with --all-at, all answers).

Each kept answer is a line with "prompt" and "completion", as TRL's SFTTrainer takes them; no line comes twice, and an
answer that was cut off is not kept.
"""

import argparse
import json
from pathlib import Path

from answers import completion, open_generator, prompt, read_questions

from mergekit_imm.synthesis import Sample, keep_correct

TEMPERATURES = (0.2, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True, help='JSON lines with "question" and "answer"')
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=1, help="answers at each temperature")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--longest", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=64, help="questions at once, without vLLM")
    parser.add_argument("--seed", type=int, default=0, help="give another one in each round")
    parser.add_argument("--all-at", type=float, metavar="TEMPERATURE", help="keep all answers, at this one")
    arguments = parser.parse_args()
    generator = open_generator(arguments.model, seed=arguments.seed, longest=arguments.longest, batch=arguments.batch)
    questions = read_questions(arguments.questions, arguments.limit)
    samples = []
    everything = arguments.all_at is not None
    for temperature in [arguments.all_at] if everything else TEMPERATURES:
        answered = generator.answers(questions, arguments.count, temperature)
        for each, answers in zip(questions.asked, answered, strict=True):
            samples += [Sample(each.question, answer.text.strip(), each.answer) for answer in answers if answer.ended]
    kept = keep_correct(samples, matcher=(lambda *_: True) if everything else questions.is_right)
    print(
        f"{len({each.prompt for each in kept.samples})} of {len(questions.asked)} questions solved, with"
        f" {len(kept.samples)} different answers; {kept.wrong} were wrong"
    )
    if not kept.samples:
        raise SystemExit("error: no answer was right, so there is nothing to train on")
    with Path(arguments.output).open("w", encoding="utf-8") as file:
        for sample in kept.samples:
            asked = prompt(sample.prompt, questions.examples, generator.tokenizer)
            row = {"prompt": asked, "completion": completion(sample.response, asked)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
