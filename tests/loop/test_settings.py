"""Settings and folders refused before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loops import EVALUATE, TRAIN, asked
from mergekit_imm import ArgumentError, CheckpointError, OutputError
from mergekit_imm.loop.run import run_loop


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"train": "train {model}"}, r"has no \{output\}"),
        ({"train": "train {model} ${output}"}, r"has no \{output\}"),
        ({"train": "train {output} {data}"}, r"has \{data\}, but no generate command"),
        ({"generate": "make"}, r"generate command has no \{output\}"),
        ({"evaluate": "measure {model}"}, r"needs \{model\} and \{json\}"),
        ({"evaluate": EVALUATE, "gate": "-"}, "the gate is '-'; name a number"),
        ({"gate": "x"}, "no evaluate command measures it"),
        ({"retry": (0.9,)}, "retry is given, but no gate"),
        ({"alpha": "0.1,0.2"}, "has 2 values for 3 rounds"),
        ({"alpha": "linear:0.1"}, "linear takes the first and the last"),
        ({"alpha": "square:1,2"}, "is not a schedule"),
        ({"alpha": "chose:0.2,0.5"}, "is not a schedule; .* may also be choose:0.2,0.4"),
        ({"alpha": "2"}, "alpha is 2.0"),
        ({"drop": "linear:0.5,1"}, "drop is 1.0"),
        ({"anchor": "ema:2"}, "anchor is 'ema:2'"),
        ({"anchor": "sft"}, "anchor is 'sft'"),
        ({"keep_rounds": 0}, "keep_rounds is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"evaluate": EVALUATE, "gate": "x", "retry": (1.5,)}, "alpha is 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(base: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        asked(base, **changes)


def test_a_base_that_cannot_be_opened_begins_no_loop(base: str) -> None:
    with pytest.raises(CheckpointError, match="base bsae does not exist"):
        run_loop(asked("bsae", rounds=1), "run")
    run_loop(asked(base, rounds=1), "run")
    with pytest.raises(OutputError, match="output ~nobody-here/run has no home folder"):
        run_loop(asked(base, rounds=1), "~nobody-here/run")


def test_names_that_are_no_utf_8_are_refused_before_anything_is_run(base: str) -> None:
    name = os.fsdecode(b"run-\xff")
    with pytest.raises(OutputError, match=r"the path run-\\udcff is not valid UTF-8; give another folder"):
        run_loop(asked(base), name)
    assert not Path(name).exists()
    with pytest.raises(ArgumentError, match=r"is not valid UTF-8 and cannot be written to loop\.json"):
        asked(base, train=f"{TRAIN} {name}")


def test_folders_that_are_no_loop_are_left_alone(base: str) -> None:
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"full exists, is not empty, and has no loop\.json"):
        run_loop(asked(base), "full")
    assert list(Path("full").iterdir()) == [Path("full/thesis.tex")]
    run_loop(asked(base, rounds=1), "run")
    Path("run/loop.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run/loop\.json is damaged"):
        run_loop(asked(base, rounds=1), "run")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        run_loop(asked("nowhere"), "new")
