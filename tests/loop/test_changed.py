"""A loop that failed is resumed with other settings: only what no finished step depends on may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import files_of
from commands import subprocess_of
from loops import EVALUATE, TRAIN, asked
from mergekit_imm import ArgumentError, OutputError
from mergekit_imm.loop.commands import CommandError
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import load

GENERATE = "mkdir -p {output} && touch {output}/data.txt"
WITH_DATA = f"test -e {{data}}/data.txt && {TRAIN}"
CORRECT = "correct the command if it is wrong, and run the loop again to resume at this step"
SAME = "run the loop again, with the same command, to resume at this step"


def failed(base: str, cure: str, **changes: Any) -> None:
    with pytest.raises(CommandError) as error:
        run_loop(asked(base, rounds=2, **changes), "run")
    assert str(error.value).endswith(f"; {cure}")


def weights(folder: str) -> dict[str, bytes]:
    return {name: content for name, content in files_of(Path(folder)).items() if name.endswith(".safetensors")}


def test_a_corrected_command_resumes_where_it_failed(base: str) -> None:
    failed(base, CORRECT, train="exit 2 # {output}")
    said: list[str] = []
    run_loop(asked(base, rounds=2), "run", tell=said.append)
    run_loop(asked(base, rounds=2), "whole")
    assert weights("run") == weights("whole")
    assert said[0].startswith('note: run goes on with changed settings (train: "exit 2 # {output}", now "')
    assert said[0].endswith("); what the unfinished step has written there is kept")


def test_all_settings_may_change_while_nothing_is_done(base: str) -> None:
    failed(base, CORRECT, train="exit 2 # {output}")
    changes: dict[str, Any] = {"alpha": "0.3", "drop": "0.5", "seed": 3, "anchor": "previous", "rounds": 1}
    run_loop(asked(base, **changes), "run")
    run_loop(asked(base, **changes), "other")
    assert weights("run") == weights("other")
    assert json.loads(Path("run/loop.json").read_text())["settings"]["alpha"] == "0.3"


def test_another_base_is_the_base_while_nothing_is_done(base: str) -> None:
    failed(base, CORRECT, train="exit 2 # {output}")
    Path(base).rename("moved")
    assert run_loop(asked("moved", rounds=1), "run").settings.base == "moved"
    with pytest.raises(CommandError):
        run_loop(asked("moved", train="exit 2 # {output}"), "other")
    assert load(Path("other")).model == "moved"  # type: ignore[union-attr]


def test_a_command_may_change_until_a_finished_step_depends_on_it(base: str) -> None:
    commands = {"generate": GENERATE, "evaluate": EVALUATE}
    failed(base, CORRECT, **commands, train="exit 2 # {output} {data}")
    refused(base, generate=f"true; {GENERATE}", evaluate=EVALUATE, train=WITH_DATA, said="generate: ")
    refused(base, generate=GENERATE, evaluate=f"true; {EVALUATE}", train=WITH_DATA, said="evaluate: ")
    refused(base, generate=None, evaluate=EVALUATE, train=TRAIN, said="generate: ")
    refused(base, **commands, train=WITH_DATA, alpha="0.3", said='alpha: "0.5", now "0.3"')
    state = run_loop(asked(base, rounds=2, **commands, train=WITH_DATA), "run")
    assert state.model == "run/round-1/merged"
    refused(base, **commands, train=f"true; {WITH_DATA}", said="train: ")


def refused(base: str, *, said: str, **settings: Any) -> None:
    before = files_of(Path("run"))
    with pytest.raises(OutputError) as error:
        run_loop(asked(base, rounds=2, **settings), "run")
    message = str(error.value)
    assert message.startswith(f"run holds another loop ({said}")
    assert message.endswith("give the settings it was started with, or another folder, or delete run to start over")
    assert message.count(", now ") == 1
    assert files_of(Path("run")) == before


def test_a_command_that_has_trained_a_round_stays(base: str) -> None:
    """In the second round it fails."""
    once = f"test ! -e count && touch count && {TRAIN}"
    failed(base, SAME, train=once)
    refused(base, train=TRAIN, said="train: ")
    Path("count").unlink()
    assert run_loop(asked(base, rounds=2, train=once), "run").model == "run/round-1/merged"


def test_a_command_cannot_be_added_behind_its_place(base: str) -> None:
    failed(base, CORRECT, generate=GENERATE, train="exit 2 # {output}")
    refused(base, generate=GENERATE, evaluate=EVALUATE, said="evaluate: null, now ")


def test_the_base_s_evaluation_leaves_the_others_free(base: str) -> None:
    failed(base, CORRECT, evaluate=EVALUATE, train="exit 2 # {output}")
    added = asked(base, rounds=2, evaluate=EVALUATE, generate=GENERATE, train=WITH_DATA)
    assert run_loop(added, "run").model == "run/round-1/merged"


def test_a_changed_command_is_checked_as_at_the_beginning(base: str) -> None:
    failed(base, CORRECT, train="exit 2 # {output}")
    with pytest.raises(ArgumentError, match=r"did you mean \{model\}\?"):
        run_loop(asked(base, rounds=2, train=f"{TRAIN} {{modle}}"), "run")


def test_the_command_is_corrected_as_its_error_says(base: str) -> None:
    arguments = ["loop", "base", "--rounds", "1", "-q", "-o", "run", "--train"]
    ended = subprocess_of(*arguments, "python3 nosuch.py {model} {output}")
    assert ended.status == 2  # that of the command
    assert ended.error.endswith(f"its output is in run/round-0/train.log; {CORRECT}")
    assert subprocess_of(*arguments, TRAIN).status == 0
