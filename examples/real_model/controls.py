"""What one can do in training, instead of merging: pull the weights, mix in old data, stop at the best moment."""

import math
import random
import textwrap
from pathlib import Path
from typing import Any

import torch
from answers import Generator, read_questions
from datasets import Dataset, concatenate_datasets
from score import accuracy, summary
from transformers import TrainerCallback


class PullToStart(TrainerCallback):  # type: ignore[misc]
    """Pull the weights to those that training began with, in every step (L2, decoupled from Adam's step sizes).

    After each of n steps w becomes w - k (w - start), with k n = 1.59. Of a drift at a constant rate half is left, as
    (1 - exp(-1.59)) / 1.59 = 0.5, which is what a merge with alpha .5 leaves; with a cosine, a third. A merge pulls to
    the base, and this to where the round began.
    """

    strength = 1.59

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start = [each.detach().clone() for each in model.parameters()]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for each, start in zip(model.parameters(), self.start, strict=True):
            each.lerp_(start, self.strength / state.max_steps)


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Score the model after each quarter of the training, and end with the weights that scored best.

    The score is `both` of score.py: accuracy in domain (the first file) plus the mean of that of the other files.
    """

    def __init__(self, tokenizer: Any, files: list[str], longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self.questions = {name: read_questions(path) for name, path in (each.split("=", 1) for each in files)}
        self.scores: dict[int, float] = {}
        self.best: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step not in {math.ceil(state.max_steps * quarter / 4) for quarter in (1, 2, 3, 4)}:
            return
        training = model.training
        with torch.autocast(model.device.type, torch.bfloat16):
            generator = Generator(model.eval(), self.tokenizer, self.longest)
            found = {name: accuracy(generator, questions) for name, questions in self.questions.items()}
        model.train(training)
        score = summary(found, next(iter(found)))["both"]
        if score > max(self.scores.values(), default=-math.inf):
            self.best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.scores[state.global_step] = score

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.load_state_dict(self.best)
        print("scores by step: " + ", ".join(f"{step}: {score:.2f}" for step, score in self.scores.items()))


def with_text(rows: Dataset, file: str, share: float, seed: int) -> Dataset:
    """Mix a text into rows of prompts and completions, in lines of 200 characters, to be such a share of all rows."""
    lines = textwrap.wrap(Path(file).read_text(encoding="utf-8"), 200)
    count = round(len(rows) * share / (1 - share))
    chosen = random.Random(seed).sample(lines, count)
    return concatenate_datasets([rows, Dataset.from_list([{"prompt": "", "completion": line} for line in chosen])])
