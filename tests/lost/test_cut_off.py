"""A merge cut off anywhere loses nothing, and the same command finishes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thorough import others

from . import power, tracing
from .driver import SCENARIOS
from .tracing import Call

thorough = pytest.mark.thorough
# A scenario, and the stride between the calls that are cut: each takes minutes.
EACH = others(*((name, 9) for name in SCENARIOS))
pytestmark = pytest.mark.skipif(not tracing.CALLS, reason="calls are traced on Linux, x86-64 or ARM")


def run(module: str, *arguments: object) -> dict[str, Any]:
    """Run one of the programs in this folder, and return the JSON it prints."""
    ended = subprocess.run(
        [sys.executable, "-m", f"lost.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(("scenario", "every"), [("resume", 27), *EACH])
def test_a_merge_killed_before_any_call_that_changes_a_file(tmp_path: Path, scenario: str, every: int) -> None:
    """Before some calls here; before each with `make thorough`."""
    result = run("driver", tmp_path, scenario, "calls", "--every", every, "--first", list(SCENARIOS).index(scenario))
    assert result["failures"] == []
    assert result["tried"] >= 2 * (result["calls"] // every)


@pytest.mark.parametrize(("scenario", "every"), [("overwrite", 27), *EACH])
def test_a_merge_whose_disk_lost_any_part_of_what_was_not_synced(tmp_path: Path, scenario: str, every: int) -> None:
    result = run("driver", tmp_path, scenario, "power", "--every", every, "--first", list(SCENARIOS).index(scenario))
    assert result["failures"] == []
    assert result["most_unsynced"] > 5
    assert result["tried"] >= 6 * (result["calls"] // every)


@thorough
def test_a_merge_that_did_not_sync_would_be_found_out(tmp_path: Path) -> None:
    result = run("driver", tmp_path, "overwrite", "power", "--every", 9, "--without-sync")
    assert any("neither absent nor the old nor the new one" in each for each in result["failures"])


@thorough
@pytest.mark.parametrize("number", ["KILL", "TERM", "INT"])
def test_a_command_that_gets_a_signal_at_a_random_moment(tmp_path: Path, number: str) -> None:
    result = run("kills", tmp_path, "--signal", number, "--count", 4, "--seed", 1)
    assert result["failures"] == []
    assert result["tried"] == 4


def test_the_model_of_a_disk(tmp_path: Path) -> None:
    """Synced data stays, the rest may go, and a torn write is part old, part new."""
    (tmp_path / "a").write_bytes(b"old")
    nodes: power.Nodes = {}
    root = power.read(tmp_path, nodes)
    file = (tmp_path / "a").stat().st_ino
    calls = [
        Call("write", file, offset=0, data=b"x" * 2048),
        Call("sync", file),
        Call("write", file, data=b"y" * 2048),
        Call("create", -1, root, "b"),
        Call("write", -1, data=b"new"),
        Call("sync", -1),
        Call("rename", 0, root, "b", root, "c"),
        Call("sync", root),
        Call("remove", 0, root, "a"),
    ]
    certain = power.durable(calls, len(calls))
    assert certain == [True, False, False, True, True, False, True, False, False]
    assert power.durable(calls, 5) == [True, False, False, False, False]
    states = dict(power.choices(certain, 0))
    least = power.after(nodes, calls, states["none of it"])
    assert {n: bytes(least[i].content) for n, i in (least[root].entries or {}).items()} == {
        "a": b"x" * 2048,
        "c": b"new",
    }
    most = power.after(nodes, calls, states["all of it"])
    assert set(most[root].entries or {}) == {"c"}
    torn = power.after(nodes, calls, lambda number, _: 0.5 if number == 2 else float(certain[number]))
    sectors = [bytes(torn[file].content[first : first + 512]) for first in range(0, 2048, 512)]
    assert set(sectors) == {b"x" * 512, b"y" * 512}


def test_the_tracer_sees_what_is_done(tmp_path: Path) -> None:
    def work() -> None:
        path = tmp_path / "folder" / "file"
        path.parent.mkdir()
        with path.open("wb") as file:
            file.write(b"abc")
            file.flush()
            os.pwrite(file.fileno(), b"Z", 1)
            os.fsync(file.fileno())
        path.rename(tmp_path / "other")
        path.parent.rmdir()

    status, calls = _traced(work, tmp_path)
    assert status == 0
    assert [call.kind for call in calls] == ["mkdir", "create", "write", "write", "sync", "rename", "remove"]
    assert [(call.offset, call.data) for call in calls if call.kind == "write"] == [(0, b"abc"), (1, b"Z")]
    nodes: power.Nodes = {}
    (tmp_path / "other").unlink()
    root = power.read(tmp_path, nodes)
    after = power.after(nodes, calls, lambda *_: 1.0)
    assert {n: bytes(after[i].content) for n, i in (after[root].entries or {}).items()} == {"other": b"aZc"}
    (tmp_path / "again").mkdir()
    status, calls = _traced(lambda: (tmp_path / "again" / "x").write_text("x") and None, tmp_path, 1)
    assert status is None
    assert [str(call) for call in calls] == ["create x"]
    assert (tmp_path / "again" / "x").read_bytes() == b""


def _traced(work: Any, root: Path, stop_at: int | None = None) -> tuple[int | None, list[Call]]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child is small
        return tracing.traced(work, root, stop_at)
