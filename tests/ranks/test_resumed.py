"""Interrupted merges resume with another number of ranks; which journals are trusted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import patch

import pytest

from checkpoints import files_of
from mergekit_imm import MergeReport, merge_checkpoints
from mergekit_imm.engine import workers
from mergekit_imm.errors import OutputError
from mergekit_imm.ranks import ledger
from merging_ranks import Run, merged_by


def stopped_after(count: int) -> Run:
    """A `run_segments` that is interrupted after `count` segments."""
    run = workers.run_segments

    def stopped(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, result in enumerate(each for each in run(*arguments, **options) if each is not None):
            if number == count:
                raise KeyboardInterrupt
            yield result

    return stopped


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (3, 2), (2, 5)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_number_of_ranks_goes_on(pair: Path, case: Path, sizes: tuple[int, int]) -> None:
    with (
        patch("mergekit_imm.engine.stream.SYNC_BYTES", 1),
        patch("mergekit_imm.engine.stream.run_segments", stopped_after(2)),
    ):
        stopped = merged_by(sizes[0], workers=1)
    assert all(isinstance(each, KeyboardInterrupt) for each in stopped)
    journals = {ledger.journal_of(case / "out.partial", rank) for rank in range(sizes[0])}
    left = {*(case / "out.partial").glob(".imm_journal*")}
    assert left == (journals | {case / "out.partial" / ledger.STOP} if sizes[0] > 1 else journals)
    report, *_ = merged_by(sizes[1])
    assert isinstance(report, MergeReport)
    whole = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    # Each recorded at least one of its two segments; one that spans a cut is not recorded.
    assert report.bytes_written <= whole - sizes[0] * (1 << 20)
    assert files_of(case / "out") == files_of(pair / "one")
    assert not report.notes


def test_a_piece_is_recorded_only_when_all_ranks_have_written_their_part(pair: Path, case: Path) -> None:
    """Rank 1 starts in the middle of a piece; rank 0 ends before it writes anything."""
    stopped = stopped_after(2)

    def run(*arguments: Any, **options: Any) -> Iterator[Any]:
        if current_thread().name == "rank-0":
            raise KeyboardInterrupt
        yield from stopped(*arguments, **options)

    with patch("mergekit_imm.engine.stream.SYNC_BYTES", 1), patch("mergekit_imm.engine.stream.run_segments", run):
        merged_by(2, workers=1)
    merge_checkpoints("base", "sft", "out", drop=0.9)
    assert files_of(case / "out") == files_of(pair / "one")


def test_journals_of_other_merges_are_not_believed(pair: Path, case: Path) -> None:
    with (
        patch("mergekit_imm.engine.stream.SYNC_BYTES", 1),
        patch("mergekit_imm.engine.stream.run_segments", stopped_after(2)),
    ):
        merged_by(2, workers=1, alpha=0.25)
        strange = (case / "out.partial" / ".imm_journal-1").read_bytes()
        merged_by(2, workers=1, restart=True)
    partial = case / "out.partial"
    (partial / ".imm_journal-1").write_bytes(strange)
    (partial / ".imm_journal-2").write_bytes((partial / ".imm_journal").read_bytes()[:-3])
    (partial / ".imm_journal-3").symlink_to(case / "base" / "config.json")
    (partial / ".imm_journal-x").write_text("x")
    os.mkfifo(partial / ".imm_journal-4")
    (partial / ".imm_journal-5").mkdir()
    merge_checkpoints("base", "sft", "out", drop=0.9)
    assert files_of(case / "out") == files_of(pair / "one")
    assert (case / "base" / "config.json").stat().st_size > 0


def test_a_lost_journal_is_found(case: Path) -> None:
    end = ledger.Ledger.settle

    def lost(self: Any, *arguments: Any) -> None:
        (case / "out.partial" / ".imm_journal-1").unlink()
        end(self, *arguments)

    with patch.object(ledger.Ledger, "settle", lost):
        failed = merged_by(2)
    assert all(isinstance(each, OutputError) for each in failed)
    assert re.search(r"\d+ of the \d+ pieces of out.partial are in no rank's journal; run the same", str(failed[0]))
    assert not (case / "out").exists()
    assert [report.status for report in merged_by(2)] == ["merged"] * 2
