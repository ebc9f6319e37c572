"""examples/crescent.py runs on a tiny input, with consistent numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "crescent.py"


@pytest.mark.thorough
def test_it_runs_from_the_bait_to_the_tables(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(EXAMPLE), "--quick", "--json", str(numbers)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.iterdir()) == [numbers]
    for line in ("| questions asked for | 60 |", "| consensus answers |", "| Crescent |", "| same questions, right"):
        assert line in ran.stdout
    found = json.loads(numbers.read_text(encoding="utf-8"))["seeds"]["0"]
    counts = found["counts"]
    assert counts["asked"] == 60 == sum(counts.values()) - counts["asked"]
    assert counts["pairs"] == found["truth"]["consensus"]["of"] == found["arms"]["crescent"]["pairs"]
    assert found["truth"]["single"]["of"] == 4 * (60 - counts["no question"] - counts["for tests"] - counts["too near"])
    assert found["arms"]["oracle"]["pairs right"] == found["arms"]["oracle"]["pairs"]
