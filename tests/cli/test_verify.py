"""`imm-verify` as users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mergekit_imm
from checkpoints import files_of, random_state, write_model
from commands import (
    SHAPES,
    SHARD,
    Command,
    Ended,
    flipped,
)
from mergekit_imm.errors import CheckpointError


def test_a_merge_is_what_its_recipe_says(rounds: Path, check: Command) -> None:
    ended = check(rounds / "second")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"{rounds}/second matches its recipe: 2.6 kB of tensors and 9 files compared")
    assert check(rounds / "second", "--quiet") == Ended(0, "", "")
    ended = check(rounds / "second", "--json")
    report = json.loads(ended.out, parse_constant=pytest.fail)
    assert set(report) == {"out", "segments", "of_segments", "bytes_compared", "files_compared", "not_of_the_merge"}
    assert sorted(report["files_compared"]) == sorted(files_of(rounds / "second"))
    assert (report["segments"], report["not_of_the_merge"]) == (report["of_segments"], [])


@pytest.mark.parametrize(
    ("file", "position", "words"),
    [
        (SHARD, -1, ["model.layers.0.mlp.weight", "element 63"]),
        ("model-00002-of-00002.safetensors", -1, ["model.norm.weight", "element 7"]),
        (SHARD, 0, []),
        (SHARD, 12, ["header"]),
        (SHARD, 60, ["header"]),
        ("model.safetensors.index.json", 30, []),
        ("config.json", 5, []),
        ("config.json", -1, []),
        ("imm_report.json", 20, []),
        ("imm_report.json", -2, []),
        ("README.md", 0, []),
        ("README.md", -1, []),
        ("tokenizer.json", 3, []),
        ("templates/chat.jinja", -1, []),
        ("imm_recipe.json", 1, []),
        ("imm_recipe.json", -1, []),
    ],
)
@pytest.mark.parametrize("bit", [0, 6])
def test_a_flipped_bit_is_found_and_its_place_named(
    rounds: Path, check: Command, file: str, position: int, words: list[str], bit: int
) -> None:
    with flipped(rounds / "second" / file, position, bit):
        ended = check(rounds / "second")
    assert (ended.status, ended.out) == (1, "")
    assert [word for word in [f"second/{file}", *words] if word not in ended.error] == []
    assert check(rounds / "second").status == 0


@pytest.mark.parametrize(
    "keys",
    [
        ["formula"],
        ["version"],
        ["format"],
        ["parameters"],
        ["inputs"],
        ["history"],
        ["history", "formula"],
        ["config_changes"],
    ],
    ids=str,
)
def test_a_flipped_bit_in_any_part_of_the_recipe_is_found(rounds: Path, check: Command, keys: list[str]) -> None:
    path = rounds / "second" / "imm_recipe.json"
    content = path.read_bytes()
    first = 0
    for key in keys:
        first = content.index(f'"{key}"'.encode(), first)
    for position in range(first, min(first + 60, len(content)), 3):
        with flipped(path, position):
            assert check(rounds / "second").status == 1, content[first : position + 1]


def test_every_byte_of_the_tensors_is_compared(rounds: Path, check: Command) -> None:
    path = rounds / "first" / SHARD
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for position in range(begin, path.stat().st_size, 37):
        with flipped(path, position, position % 8):
            assert f"byte {position} of the file" in check(rounds / "first").error


def test_a_sample_compares_a_share(rounds: Path, check: Command) -> None:
    ended = check(rounds / "second", "--sample", "0.01")
    assert (ended.status, ended.err) == (0, "")
    assert "(1 of 5 pieces)" in ended.out
    with flipped(rounds / "second" / "config.json", 5):
        assert check(rounds / "second", "--sample", "0.01").status == 1


@pytest.mark.parametrize("file", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer.json", "README.md"])
def test_a_missing_or_shorter_file_is_found(rounds: Path, check: Command, file: str) -> None:
    path = rounds / "second" / file
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1])
        shorter = check(rounds / "second")
        path.unlink()
        missing = check(rounds / "second")
    finally:
        path.write_bytes(content)
    for ended in (shorter, missing):
        assert (ended.status, ended.out) == (1, "")
        assert f"second/{file}" in ended.error


def test_other_files_in_the_folder_are_named_and_no_error(rounds: Path, check: Command) -> None:
    path = rounds / "second" / "model-q4.gguf"
    path.write_text("x")
    ended = check(rounds / "second")
    path.unlink()
    assert ended.status == 0
    assert "not part of the merge: model-q4.gguf" in ended.out


def test_a_folder_that_is_no_merge_is_refused(rounds: Path, check: Command) -> None:
    ended = check(rounds / "base")
    assert (ended.status, ended.out) == (1, "")
    assert f"{rounds / 'base'} has no imm_recipe.json" in ended.error
    assert ended.error.endswith(f"`imm-verify {rounds / 'base'} --base BASE --sft SFT`")


def test_a_device_that_is_none_is_refused(rounds: Path, check: Command) -> None:
    ended = check(rounds / "second", "--device", "tpu")
    assert ended.status == 2
    assert (
        ended.error
        == "device is 'tpu'; it must be 'cpu' or 'cuda', or 'cuda:1' for the second GPU; see imm-verify --help"
    )


def test_inputs_that_moved_are_found_with_an_option(here: Path, merge: Command, check: Command) -> None:
    merge("base", "sft", "-o", "out")
    Path("base").rename("base2")
    Path("sft").rename("sft2")
    Path("out").rename("out2")
    ended = check("out2")
    assert ended.status == 1
    assert "base base does not exist" in ended.error
    assert "--base" in ended.error
    ended = check("out2", "--base", "base2")
    assert ended.status == 1
    assert "sft sft does not exist" in ended.error
    assert "--sft" in ended.error
    assert check("out2", "--base", "base2", "--sft", "sft2").status == 0
    ended = check("out2", "--base", "base2", "--sft", "base2")
    assert ended.status == 1
    assert "sft base2 is not what was merged" in ended.error
    ended = check("out2", "--base", "base2", "--sft", "sft2", "--start", "base2")
    assert ended.status == 1
    assert "--start" in ended.error


def test_an_input_that_changed_is_refused(here: Path, merge: Command, check: Command) -> None:
    merge("base", "sft", "-o", "out")
    state = random_state(SHAPES, seed=1)
    state["model.norm.weight"] += torch.ones(8, dtype=torch.bfloat16)
    write_model(here / "sft", state)
    ended = check("out")
    assert (ended.status, ended.out) == (1, "")
    assert "sft sft is not what was merged: its model.safetensors has changed" in ended.error
    assert "--sft" in ended.error


def test_a_side_file_of_an_input_that_changed_is_named(here: Path, merge: Command, check: Command) -> None:
    merge("base", "sft", "-o", "out")
    (here / "sft" / "tokenizer.json").write_text("{}")
    ended = check("out")
    assert ended.status == 1
    assert (
        "out/tokenizer.json differs from the sft's, sft/tokenizer.json; remove the folder and merge again"
        in ended.error
    )


def test_verify_as_a_function_returns_what_it_compared(rounds: Path) -> None:
    for _ in range(2):
        report = mergekit_imm.verify(rounds / "first", workers=2)
        assert report.bytes_compared == sum(torch.Size(shape).numel() * 2 for shape in SHAPES.values())
    with pytest.raises(CheckpointError, match=r"has no imm_recipe\.json"):
        mergekit_imm.verify(rounds / "base")
