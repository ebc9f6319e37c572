"""If one rank refuses, all do; if one must stop, all stop."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import patch

import pytest
import torch

from checkpoints import files_of, random_state, write_model
from mergekit_imm import Ranks, merge_checkpoints
from mergekit_imm.engine import workers
from mergekit_imm.errors import ArgumentError, MismatchError, NonFiniteError, OutputError
from mergekit_imm.ranks.ledger import STOP
from merging_ranks import CONFIG, SHAPES, by_threads, merged_by, write_pair


def test_a_refusal_is_that_of_all(case: Path) -> None:
    failed = merged_by(3, keep=["nothing"])
    assert {str(each) for each in failed} == {str(failed[0])}
    assert all(isinstance(each, ArgumentError) for each in failed)
    (case / "out").mkdir()
    (case / "out" / "file").touch()
    failed = merged_by(3)
    assert {str(each) for each in failed} == {
        "output out exists and is not empty (file); give another, or overwrite=True, which deletes all of it"
    }
    assert all(isinstance(each, OutputError) for each in failed)
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]


def test_ranks_must_see_one_model(case: Path) -> None:
    (case / "other").mkdir()
    write_model(case / "other" / "sft", random_state(SHAPES, seed=3) | {"steps": torch.arange(3)}, config=CONFIG)

    def call(ranks: Ranks) -> Any:
        sft = case / "other" / "sft" if ranks.rank == 2 else case / "sft"
        return merge_checkpoints("base", sft, "out", ranks=ranks)

    failed = by_threads(3, call)
    assert all(isinstance(each, MismatchError) for each in failed)
    assert "rank 2 of 3 would make another merge than rank 0 (inputs.sft.files." in str(failed[0])
    assert {str(each) for each in failed} == {str(failed[0])}
    assert not (case / "out.partial").exists()


def test_ranks_may_spell_one_place_in_their_own_ways(case: Path) -> None:
    merge_checkpoints("base", "sft", "alone")

    def call(ranks: Ranks) -> Any:
        place = Path() if ranks.rank == 0 else case
        return merge_checkpoints(place / "base", place / "sft", "out", ranks=ranks)

    assert {report.status for report in by_threads(3, call)} == {"merged"}
    assert files_of(case / "out") == files_of(case / "alone")


def test_all_stop_when_one_meets_an_infinite_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_pair(tmp_path))
    state = random_state(SHAPES, seed=1) | {"steps": torch.arange(3)}
    state["lm_head.weight"][-1, -1] = torch.inf
    write_model(tmp_path / "sft", state, config=CONFIG)
    run, seen = workers.run_segments, []

    def slowed(*arguments: Any, **options: Any) -> Iterator[Any]:
        for result in run(*arguments, **options):
            if current_thread().name == "rank-0":
                while not (tmp_path / "out.partial" / STOP).exists():
                    time.sleep(0.01)
                time.sleep(1.1)  # longer than its polling interval of a second
                seen.append(result)
            yield result

    with patch("mergekit_imm.engine.stream.run_segments", slowed):
        failed = merged_by(3, workers=1)
    assert all(isinstance(each, NonFiniteError) for each in failed)
    # The piece spans a cut, so either of two ranks may report it.
    message = r"rank [12] of 3: tensor 'lm_head.weight' of sft sft has 1 NaN or infinite of 900000 elements"
    assert re.match(message, str(failed[0]))
    assert len(seen) == 1  # of at least five, had it continued
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOSYS])
def test_a_filesystem_without_locks(case: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    report, other = merged_by(2)
    assert report.notes == ["note: the filesystem of out has no locks: make sure that nothing else merges there"]
    assert not other.notes
