"""A pair of models, merged by ranks that run as threads."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Condition, Event, current_thread
from typing import Any

import torch

from checkpoints import random_state, write_model
from commands import HUNG
from mergekit_imm import Ranks, merge_checkpoints
from mergekit_imm.errors import RankError

SHAPES = {
    "model.embed_tokens.weight": (1000, 900),
    **{f"model.layers.{i}.w": (700, 1500 + 100 * i) for i in range(7)},
    "model.norm": (17,),
    "empty": (0, 3),
    "lm_head.weight": (1000, 900),
}
SHARDS = [list(SHAPES)[:3], list(SHAPES)[3:]]
CONFIG = {"architectures": ["Tiny"], "model_type": "tiny"}

Run = Callable[..., Any]


def write_pair(folder: Path, *, tied: bool = False) -> Path:
    """Write base (two files) and sft (one file), 21 MB each."""
    for seed, role in enumerate(("base", "sft")):
        state = random_state(SHAPES, seed=seed)
        state["steps"] = torch.arange(3)
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        shards = [SHARDS[0], [*SHARDS[1], "steps"]] if role == "base" else None
        config = CONFIG | {"tie_word_embeddings": tied}
        write_model(folder / role, state, shards=shards, config=config, side={"tokenizer.json": "{}"})
    return folder


def by_threads(size: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """Call a function on several ranks; return each result or exception."""
    rounds: defaultdict[int, dict[int, Any]] = defaultdict(dict)
    changed, ended = Condition(), Event()

    def ranks(rank: int) -> Ranks:
        numbers = count()

        def gather(value: Any) -> list[Any]:
            given = rounds[next(numbers)]
            with changed:
                given[rank] = value
                changed.notify_all()
                assert changed.wait_for(lambda: len(given) == size or ended.is_set(), timeout=HUNG)
            if len(given) < size:
                raise RankError("one has ended")
            return [given[each] for each in range(size)]

        return Ranks(rank, size, gather)

    def caught(rank: int) -> Any:
        current_thread().name = f"rank-{rank}"
        try:
            return call(ranks(rank))
        except BaseException as error:
            ended.set()
            with changed:
                changed.notify_all()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(caught, range(size)))


def merged_by(size: int, out: str = "out", **options: Any) -> list[Any]:
    return by_threads(size, lambda ranks: merge_checkpoints("base", "sft", out, drop=0.9, ranks=ranks, **options))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
