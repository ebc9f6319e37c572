"""Train the base of the loop from scratch on all eight skills, about a minute on one core."""

import argparse
import random

import torch
import transformers
from toy import build_model, build_tokenizer, encode, save, train, training_mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, layers=arguments.layers, seed=arguments.seed)
    examples = training_mix(arguments.steps * arguments.batch, random.Random(arguments.seed))
    ids, labels = encode(tokenizer, examples)
    train(model, ids, labels, steps=arguments.steps, batch=arguments.batch, lr=3e-3, seed=arguments.seed)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
