"""What a plan costs for each tensor, counted: models with millions of tensors are planned as well."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import plans
from mergekit_imm import merge_checkpoints

FEW, MANY = 2_000, 6_000  # tensors


def calls_of_dry_run(folder: Path, tensors: int) -> Counter[str]:
    """How often a dry run enters each Python function, and resumes each generator."""
    plans.make_both(folder, tensors)
    calls = Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        report = merge_checkpoints(folder / "base", folder / "sft", folder / "out", dry_run=True)
    finally:
        sys.setprofile(before)
    assert report.tensors["merged"] == tensors
    return calls


def test_a_dry_run_makes_few_calls_for_each_tensor(tmp_path: Path) -> None:
    few = calls_of_dry_run(tmp_path / "few", FEW)
    more = calls_of_dry_run(tmp_path / "many", MANY)
    more.subtract(few)
    per_tensor = {name: round(count / (MANY - FEW), 2) for name, count in more.most_common(60)}
    assert sum(per_tensor.values()) < 60, per_tensor
