"""Loops over a small model, and the expected result of each round by the formulas."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from checkpoints import State
from mergekit_imm import dare_merge
from mergekit_imm.loop.state import Settings, from_dict

PYTHON = shlex.quote(sys.executable)
TRAINER = shlex.quote(str(Path(__file__).parent / "trainer.py"))
TRAIN = f"{PYTHON} {TRAINER} train {{model}} {{output}} {{round}}"
EVALUATE = f"{PYTHON} {TRAINER} evaluate {{model}} {{base}} {{json}}"
CONFIG = {"model_type": "tiny", "architectures": ["Tiny"], "vocab_size": 8, "tie_word_embeddings": False}


def asked(base: str, **changes: Any) -> Settings:
    return from_dict({"base": base, "train": TRAIN, "rounds": 3, **changes})


def tuned(state: State, number: int) -> State:
    added = torch.tensor(0.01 * (number + 1), dtype=torch.float32)
    return {name: tensor + added for name, tensor in state.items()}


def expected(base: State, alphas: list[float], drop: float, anchor: str = "base", seed: int = 0) -> list[State]:
    """Compute every round's merged model by the formulas."""
    start, pulled, found = base, base, []
    for number, alpha in enumerate(alphas):
        if number and anchor == "previous":
            pulled = start
        elif number and anchor != "base":
            kept = float(anchor.removeprefix("ema:"))
            pulled = dare_merge(pulled, start, alpha=kept, drop=0.0)  # in float32, the dtype of these models
        sft = tuned(start, number)
        start = dare_merge(pulled, sft, start=start, alpha=alpha, drop=drop, iteration=number, seed=seed)
        found.append(start)
    return found
