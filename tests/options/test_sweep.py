"""Sweeps: several merges from one reading, each with the bytes of a merge made alone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from checkpoints import files_of, random_state, write_model
from commands import held_until, subprocess_of
from mergekit_imm import ArgumentError, NonFiniteError, OutputError, merge_checkpoints
from mergekit_imm.engine import workers
from mergekit_imm.options.sweep import points
from mergekit_imm.output import direct_io

SHAPES = {"model.embed_tokens.weight": (301, 33), "model.layers.0.w": (1500, 1001), "model.norm.weight": (5,)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write_model(tmp_path / "base", random_state(SHAPES, seed=0)),
        write_model(tmp_path / "sft", random_state(SHAPES, seed=1)),
    )


# --- from lists to merges


@pytest.mark.parametrize(
    ("out", "values", "expected"),
    [
        ("o", {}, ["o"]),
        ("o-{alpha}", {"alpha": 0.3}, ["o-0.3"]),
        ("o-{alpha}", {"alpha": ["0.30", "1"]}, ["o-0.30", "o-1"]),
        ("{alpha}/{seed}", {"alpha": [0.3, 0.5], "seed": [1, 2]}, ["0.3/1", "0.3/2", "0.5/1", "0.5/2"]),
        ("{x}-{}-{seed}", {"seed": [3]}, ["{x}-{}-3"]),
        ("{drop}{drop}", {"drop": [0.1, 0.2]}, ["0.10.1", "0.20.2"]),
    ],
)
def test_outputs_are_named_by_the_values_as_given(out: str, values: dict[str, Any], expected: list[str]) -> None:
    found = points(out, {"alpha": 0.5, "drop": 0.9, "seed": 0, **values})
    assert [point.out for point in found] == expected


def test_any_list_of_numbers_will_do() -> None:
    assert [p.values["alpha"] for p in points("o-{alpha}", {"alpha": np.array([0.25, 0.5]), "drop": 0, "seed": 0})] == [
        0.25,
        0.5,
    ]
    assert (
        points("o", {"alpha": 0.5, "drop": 0, "seed": b"ab"})[0].values["seed"] == b"ab"
    )  # bytes are one value, refused later


def test_values_given_as_text_are_numbers() -> None:
    (point,) = points("o", {"alpha": ["0.30"], "drop": [".5"], "seed": ["007"]})
    assert point.values == {"alpha": 0.3, "drop": 0.5, "seed": 7}
    assert [type(value) for value in point.values.values()] == [float, float, int]


@pytest.mark.parametrize(
    ("out", "values", "message"),
    [
        (
            "o",
            {"alpha": [0.3, 0.5]},
            r"alpha is a list of 2 values \(0.3, 0.5\), but the output o does not contain.*'o-\{alpha\}'",
        ),
        ("o-{alpha}", {"alpha": [0.3, 0.5], "seed": [0, 1]}, "seed is a list of 2"),
        ("o-{alpha}", {"alpha": [0.3, 0.3]}, "two merges would go to the output o-0.3"),
        ("o-{alpha}", {"alpha": []}, "alpha is an empty list"),
        ("o-{alpha}", {"alpha": ["0.3", "x"]}, "alpha x is not a number"),
    ],
)
def test_lists_that_do_not_name_outputs_are_refused(out: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        points(out, {"alpha": 0.5, "drop": 0.9, "seed": 0, **values})


# --- merging them


def test_each_is_what_it_would_have_been_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    reports = merge_checkpoints(
        *pair, tmp_path / "s-{alpha}-{drop}-{seed}", alpha=[0.3, 1], drop=[0, 0.9], seed=[7, 8], workers=3
    )
    assert [report.status for report in reports] == ["merged"] * 8
    seen = set()
    for alpha in (0.3, 1):
        for drop in (0, 0.9):
            for seed in (7, 8):
                alone = tmp_path / "alone" / f"{alpha}-{drop}-{seed}"
                merge_checkpoints(*pair, alone, alpha=alpha, drop=drop, seed=seed, workers=1)
                assert files_of(tmp_path / f"s-{alpha}-{drop}-{seed}") == files_of(alone)
                seen.add((alone / "model.safetensors").read_bytes())
    assert len(seen) == 4  # alpha 0.3 with drop 0 has no mask; alpha 1 is the base
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by the kernel need Linux")
def test_the_inputs_are_read_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_checkpoints(pair[0], pair[0], tmp_path / "warm", drop=0.9)  # load libraries and the kernel
    sizes = [(folder / "model.safetensors").stat().st_size for folder in pair]

    def io() -> dict[str, int]:
        return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}

    before = io()
    reports = merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.1, 0.2, 0.3, 0.4], drop=0.9)
    after = io()
    assert after["rchar"] - before["rchar"] <= 1.02 * sum(sizes)
    assert 4 * sizes[0] <= after["wchar"] - before["wchar"] <= 1.02 * 4 * sizes[0]
    assert all(report.bytes_read <= sum(sizes) and report.bytes_written == sizes[0] for report in reports)


def test_memory_is_that_of_one_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one = merge_checkpoints(*pair, tmp_path / "o", dry_run=True)
    several = merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.1, 0.2, 0.3], dry_run=True)
    assert {report.memory for report in several} == {one.memory}


def test_what_is_there_stays_and_what_is_missing_is_made(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_checkpoints(*pair, tmp_path / "o-0.5", alpha=0.5)
    before = (tmp_path / "o-0.5" / "model.safetensors").stat()
    reports = merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5])
    assert [report.status for report in reports] == ["merged", "already merged"]
    assert (tmp_path / "o-0.5" / "model.safetensors").stat() == before


def test_nothing_is_written_if_one_output_is_taken(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "o-0.5").mkdir()
    (tmp_path / "o-0.5" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"o-0\.5 exists and is not empty"):
        merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "o-0.5", "sft"]
    merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5], overwrite=True)
    assert not (tmp_path / "o-0.5" / "mine").exists()


def test_the_disk_must_hold_all_of_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    needed = merge_checkpoints(*pair, tmp_path / "o", dry_run=True).disk_needed
    with patch("mergekit_imm.output.write_errors.disk_of", lambda _: (1, 2 * needed)):
        merge_checkpoints(*pair, tmp_path / "fits-{alpha}", alpha=[0.3, 0.5])
        with pytest.raises(OutputError, match=r"outputs up to \S+ need .* and the disk has"):
            merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5, 0.7])


@pytest.mark.parametrize("full", ["o-0.3", "o-0.5"])
def test_a_failed_write_names_its_output(
    pair: tuple[Path, Path], tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = direct_io.write_file

    def fail(path: Path, content: bytes) -> None:
        if path == tmp_path / f"{full}.partial" / "README.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, content)

    monkeypatch.setattr(direct_io, "write_file", fail)
    with pytest.raises(OutputError, match=rf"^\S+/{full} cannot be written: .* is kept in \S+/{full}\.partial;"):
        merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5])


def test_a_refused_input_leaves_nothing_of_any(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = random_state(SHAPES, seed=1)
    state["model.norm.weight"][2] = torch.nan
    write_model(pair[1], state)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge_checkpoints(*pair, tmp_path / "deep" / "{alpha}" / "x", alpha=[0.3, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


def test_an_overflow_names_its_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, value in zip(pair, (0.0, 20_000.0), strict=True):
        write_model(folder, {"w": torch.full((3000,), value, dtype=torch.float16)})
    with pytest.raises(
        NonFiniteError, match=r"\(alpha 0\.1, drop 0\.8, seed 0\) is too large for the output dtype F16"
    ):
        merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.9, 0.1], drop=0.8)


def test_an_error_names_the_output_it_came_from(pair: tuple[Path, Path], tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("mergekit_imm.output.direct_io.sync", side_effect=full),
        pytest.raises(OutputError, match=r"o-0\.3 cannot be written: No space left"),
    ):
        merge_checkpoints(*pair, tmp_path / "o-{alpha}", alpha=[0.3, 0.5, 0.7])


def test_one_folder_by_two_names_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in ("0.3", "0.5"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ArgumentError, match="two merges would go to one folder"):
        merge_checkpoints(*pair, f"{tmp_path}/{{alpha}}/../x", alpha=[0.3, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.3", "0.5", "base", "sft"]


def test_a_sweep_goes_on_where_each_output_stopped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One merge has some segments on the disk, the other fewer: only what is missing is made."""
    out, done = tmp_path / "o-{alpha}", workers.run_segments

    def stopped_after(count: int) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            for number, result in enumerate(each for each in done(*arguments, **options) if each is not None):
                if number == count:
                    raise KeyboardInterrupt
                yield result

        return run

    with patch("mergekit_imm.engine.stream.SYNC_BYTES", 1):
        for alphas, count in (([0.3], 2), ([0.3, 0.5], 1)):
            with (
                patch("mergekit_imm.engine.stream.run_segments", stopped_after(count)),
                pytest.raises(KeyboardInterrupt),
            ):
                merge_checkpoints(*pair, out, alpha=alphas, drop=0.9, workers=1)
    reports = merge_checkpoints(*pair, out, alpha=[0.3, 0.5], drop=0.9, workers=1)
    size = (pair[0] / "model.safetensors").stat().st_size
    assert reports[0].bytes_written < reports[1].bytes_written < size
    for alpha in (0.3, 0.5):
        merge_checkpoints(*pair, tmp_path / "alone", alpha=alpha, drop=0.9, overwrite=True)
        assert files_of(tmp_path / f"o-{alpha}") == files_of(tmp_path / "alone")


# --- the command


def test_the_command_sweeps(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ended = subprocess_of(
        "merge", *pair, "--alpha", "0.30, 0.5", "--drop", ".9", "--json", "-o", "o-{alpha}-{drop}", cwd=tmp_path
    )
    assert ended.status == 0
    reports = json.loads(ended.out)
    assert [report["out"] for report in reports] == ["o-0.30-.9", "o-0.5-.9"]
    assert [report["parameters"]["alpha"] for report in reports] == [0.3, 0.5]
    one = subprocess_of("merge", *pair, "--alpha", "0.3", "--drop", "0.9", "--json", "-o", "one", cwd=tmp_path)
    assert json.loads(one.out)["status"] == "merged"
    assert files_of(tmp_path / "one") == files_of(tmp_path / "o-0.30-.9")
    again = subprocess_of("merge", *pair, "--alpha", "0.30,0.5", "--drop", ".9", "-o", "o-{alpha}-{drop}", cwd=tmp_path)
    assert again.out.count("already merged") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "0.3,0.5", "-o", "out"], "does not contain"),
        (["--alpha", "0.3,2", "-o", "o-{alpha}"], "alpha is 2; it is the weight of the base"),
        (["--alpha", "0.3,", "-o", "o-{alpha}"], "'' is not a number; commas separate the values of a sweep"),
        (["--seed", "1,x", "-o", "o-{seed}"], "'x' is not a whole number"),
        (["--drop", "0.5,0.5", "-o", "o-{drop}"], "two merges would go to"),
        (["--alpha", "nan,0.5", "-o", "o-{alpha}"], "'nan' is not a number"),
    ],
)
def test_wrong_sweeps_are_wrong_usage(
    pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    ended = subprocess_of("merge", *pair, *arguments, cwd=tmp_path)
    assert ended.status == 2
    assert message in ended.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


def test_a_killed_sweep_is_finished_by_the_same_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["merge", *map(str, pair), "--alpha", "0.3,0.5", "--drop", "0.9", "--workers", "1", "-o", "o-{alpha}"]
    command = [sys.executable, "-c", held_until("closed.is_set()"), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as process:
        while not (tmp_path / "o-0.5.partial" / ".imm_journal").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "o-0.3").exists()
    assert subprocess_of(*arguments, cwd=tmp_path).status == 0
    for alpha in ("0.3", "0.5"):
        alone = merge_checkpoints(*pair, tmp_path / "alone" / alpha, alpha=float(alpha), drop=0.9)
        assert files_of(tmp_path / f"o-{alpha}") == files_of(Path(alone.out))
