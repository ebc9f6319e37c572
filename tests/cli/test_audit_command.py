"""`imm-verify` of folders that other tools made, as users run it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from checkpoints import files_of, read_model, write_model
from commands import CONFIG, SIDE, Command, Ended


@pytest.fixture
def summed(here: Path) -> Path:
    """The mean of base and sft, as another tool writes it."""
    base, sft = read_model(here / "base"), read_model(here / "sft")
    mean = {name: ((base[name].float() + sft[name].float()) / 2).bfloat16() for name in base}
    side = {name: content for name, content in SIDE.items() if not name.endswith(".pt")}
    write_model(here / "merged", mean, config=CONFIG, side=side)
    return here / "merged"


def test_as_claimed_is_one_line_a_table_and_status_0(summed: Path, check: Command) -> None:
    before = files_of(summed)
    ended = check("merged", "--base", "base", "--sft", "sft", "--alpha", "0.5")
    assert (ended.status, ended.err) == (0, "")
    first, blank, head, *rows = ended.out.splitlines()
    assert first == "merged: merged as claimed: 5 tensors are 0.5 BASE + 0.5 SFT, within rounding of BF16"
    assert blank == ""
    assert head.split() == ["module", "tensors", "coefficient", "claimed", "explained", "off", "what", "it", "is"]
    assert [row.split()[0] for row in rows] == ["lm_head", "embed_tokens", "mlp", "norm"]
    assert files_of(summed) == before
    assert check("merged", "--base", "base", "--sft", "sft", "--quiet") == Ended(0, "", "")


def test_not_as_claimed_is_status_1_with_what_to_do(summed: Path, check: Command) -> None:
    ended = check("merged", "--base", "base", "--sft", "sft", "--alpha", "0.3")
    assert (ended.status, ended.err) == (1, "")
    line, cure, *_ = ended.out.splitlines()
    assert line.endswith("0.714 times what is claimed: as of alpha 0.5, not 0.3")
    assert cure.startswith("  merge BASE again")


def test_json_is_the_whole_report(summed: Path, check: Command) -> None:
    ended = check("merged", "--base", "base", "--sft", "sft", "--weights", "0.5,0.5", "--json")
    report = json.loads(ended.out, parse_constant=pytest.fail)
    assert (ended.status, report["as_claimed"], report["method"], report["weights"]) == (0, True, "linear", [0.5, 0.5])
    assert report["tensors"]["lm_head.weight"]["state"] == "as claimed"
    assert report["tensors"]["lm_head.weight"]["coefficient"] == pytest.approx(0.5, abs=0.01)
    ended = check("base", "--base", "base", "--sft", "sft", "--json")
    report = json.loads(ended.out, parse_constant=pytest.fail)
    assert (ended.status, report["kind"], report["findings"][0]["tensors"]) == (1, "not merged", 5)


def test_what_cannot_be_told_is_status_2_and_one_line(summed: Path, check: Command) -> None:
    ended = check("merged", "--base", "base", "--sft", "gone")
    assert (ended.status, ended.out) == (2, "")
    assert ended.error.startswith("sft gone does not exist")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "0.5"], "an audit needs --base and --sft"),
        (["--base", "base", "--sft", "sft", "--alpha", "0.5", "--start", "base"], "an audit has none of them"),
        (["--base", "base", "--sft", "sft", "--alpha", "0.5", "--method", "lora"], "alpha is of method imm"),
        (["--base", "base", "--sft", "sft", "--weights", "0.5"], "not two numbers such as 0.3,0.7"),
        (
            ["--base", "base", "--sft", "sft", "--alpha", "1"],
            "alpha is 1.0; it is the weight of the base, 0 <= alpha < 1",
        ),
    ],
)
def test_wrong_usage(summed: Path, check: Command, options: list[str], words: str) -> None:
    ended = check("merged", *options)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err


def test_our_own_merge_is_verified_byte_for_byte_unless_an_audit_is_asked_for(
    here: Path, merge: Command, check: Command
) -> None:
    merge("base", "sft", "-o", "out", "--drop", "0")
    assert "matches its recipe" in check("out", "--base", "base", "--sft", "sft").out
    ended = check("out", "--base", "base", "--sft", "sft", "--alpha", "0.5")
    assert ended.status == 0
    assert "as claimed" in ended.out
    shutil.rmtree(here / "out")
    merge("base", "sft", "-o", "out", "--drop", "0.8")
    ended = check("out", "--base", "base", "--sft", "sft", "--alpha", "0.5")
    assert ended.status == 1
    assert re.search(r"about (7[5-9]|8[0-5])% of the change is missing, element by element", ended.out)
