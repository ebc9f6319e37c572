"""Find the other ranks of a command started by torchrun or srun.

A command run from inside a training job inherits the job's environment and must not wait for ranks that never come. So
environment variables alone do not count: ranks are used if --ranks asks for them, or if the parent process is a
torchrun that launched exactly this command.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.messages import shown
from ..errors import ArgumentError, RankError
from .ranks import Ranks, reason_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

COME = timedelta(minutes=15)  # for all ranks to arrive
WAIT = timedelta(days=7)  # for the slowest rank; one that has ended is noticed at once

_TORCHRUN = {"rank": "RANK", "size": "WORLD_SIZE", "address": "MASTER_ADDR", "port": "MASTER_PORT"}
_SLURM = {"rank": "SLURM_PROCID", "size": "SLURM_NTASKS", "job": "SLURM_JOB_ID"}


@dataclass(frozen=True)
class Place:
    """A rank, and the address where all ranks meet."""

    rank: int
    size: int
    address: str
    port: int


def place_of(kind: str | None, environment: Mapping[str, str], started: bool) -> Place | None:
    """Return the place that torchrun or srun gave this process; None for a single process.

    `kind` is "torchrun", "slurm" or None; `started`: torchrun started this command. Raises ArgumentError if the
    environment of the given kind is missing or invalid.
    """
    if kind == "slurm":
        rank, size, job = (_number(environment, name, "--ranks slurm", "srun") for name in _SLURM.values())
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = environment.get("MASTER_ADDR") or first_host(nodes)
        if not address:
            raise ArgumentError(
                "--ranks slurm finds no SLURM_JOB_NODELIST to take the first host from; start this command with srun,"
                " or set MASTER_ADDR"
            )
        port = _number(environment, "MASTER_PORT", "", "") if "MASTER_PORT" in environment else 20000 + job % 12000
        return Place(rank, size, address, port)
    if kind == "torchrun" or started:
        rank, size, port = (
            _number(environment, _TORCHRUN[key], "--ranks torchrun", "torchrun") for key in ("rank", "size", "port")
        )
        return Place(rank, size, environment.get("MASTER_ADDR", "localhost"), port)
    return None


def _number(environment: Mapping[str, str], name: str, option: str, starter: str) -> int:
    found = environment.get(name)
    if found is None:
        raise ArgumentError(f"{option} is given, but {name} is not set; start this command with {starter}")
    if not re.fullmatch(r"[0-9]{1,18}", found):
        raise ArgumentError(
            f"{name} is '{shown(found)}', which is not a number; start this command with torchrun or srun"
        )
    return int(found)


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list.

    >>> first_host("gpu[003-010,12],login"), first_host("rack[1-2]n[04,7]"), first_host("alpha,beta")
    ('gpu003', 'rack1n04', 'alpha')
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def is_started_by_torchrun() -> bool:
    """Whether the parent process is a torchrun that launched exactly this command."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return False
    own = [os.fsencode(each) for each in (sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:])]
    before, launched = parent[: -len(own)], parent[-len(own) :]
    if before[-1:] == [b"--"]:  # ends torchrun's own options; not passed on
        before.pop()
    agents = (os.path.basename(each) in _AGENTS for each in before)  # noqa: PTH119 - bytes
    return bool(own) and launched == own and before[-1:] == [b"mergekit_imm"] and any(agents)


_AGENTS = (b"torchrun", b"torch.distributed.run", b"torch.distributed.launch")


@contextmanager
def connected(kind: str | None) -> Iterator[Ranks | None]:
    """Connect to the other ranks, if any (see `place_of`). Raises ArgumentError; RankError if one is missing."""
    place = place_of(kind, os.environ, kind is None and is_started_by_torchrun())
    if place is None or place.size == 1:
        yield None
        return
    import torch.distributed as dist

    with _default_signals():
        try:
            store = _new_namespace(place)
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=COME)
            group = dist.new_group(timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"rank {place.rank} of {place.size} does not meet the others at {shown(place.address)}:{place.port}"
                f" ({reason_of(error)}); make sure that all are started and can reach that address"
            ) from error
    try:
        yield Ranks.of_group(group)
    finally:
        dist.destroy_process_group()


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the process at once: Python handlers do not run while torch blocks."""
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _new_namespace(place: Place) -> Store:
    """Return an empty namespace of the store at a place, the same one for all ranks.

    torchrun's store outlives the ranks it restarts and keeps their keys. So each rank sends a random word, and rank 0
    answers it with the namespace until all ranks have acknowledged.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    url = f"tcp://{place.address}:{place.port}"
    store, _, _ = next(rendezvous(url, place.rank, place.size, timeout=COME))
    store = PrefixStore("mergekit_imm", store)
    word = secrets.token_hex(8)
    if place.rank:
        store.set(f"word {place.rank}", word)
        name = store.get(f"answer {word}").decode()
        store.set(f"{name} heard {place.rank}", "")
        return PrefixStore(name, store)
    until = time.monotonic() + COME.total_seconds()
    missing = list(range(1, place.size))
    while missing:
        for rank in missing:
            if store.check([f"word {rank}"]):
                store.set(f"answer {store.get(f'word {rank}').decode()}", word)
        missing = [rank for rank in missing if not store.check([f"{word} heard {rank}"])]
        if missing and time.monotonic() > until:
            raise RuntimeError(f"rank {missing[0]} has not come")
        time.sleep(0.01)
    return PrefixStore(word, store)
