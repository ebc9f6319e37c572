"""Fine-tune a model on right answers, each line of the data once or more, for a number of steps."""

import argparse
import random

from toy import encode, load, read_examples, save, train, training_mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="JSON lines; those of several rounds accumulate")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--mixture", type=float, default=0.0, help="share of questions as in pretraining, with answers")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    examples = list(dict.fromkeys(example for path in arguments.data for example in read_examples(path)))
    seed = 1000 * arguments.round + arguments.seed
    old = round(len(examples) * arguments.mixture / (1 - arguments.mixture))
    examples += training_mix(old, random.Random(seed))
    print(f"{len(examples)} rows, {old} of them as in pretraining")
    ids, labels = encode(tokenizer, examples)
    train(model, ids, labels, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, seed=seed)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
