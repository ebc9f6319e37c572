"""Each round against its formula; more rounds; a loop resumes at the step that failed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import files_of, random_state, read_model, same_bits, write_model
from loops import CONFIG, EVALUATE, PYTHON, TRAIN, asked, expected
from mergekit_imm import CheckpointError, MergeError, OutputError, verify
from mergekit_imm.loop.commands import CommandError
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import State, load, save
from thorough import others


@pytest.mark.parametrize(
    ("changes", "alphas"),
    [
        ({}, [0.5, 0.5, 0.5]),
        ({"alpha": "linear:0.2,0.8", "drop": "0.5", "seed": 3}, [0.2, 0.5, 0.8]),
        ({"alpha": "0.3,0.6,0.1", "anchor": "previous"}, [0.3, 0.6, 0.1]),
        ({"anchor": "ema:0.75", "drop": "0.5"}, [0.5, 0.5, 0.5]),
    ],
)
def test_each_round_is_that_of_the_formula(base: str, changes: dict[str, Any], alphas: list[float]) -> None:
    state = run_loop(asked(base, **changes), "run")
    drop = float(changes.get("drop", 0.2))
    models = expected(read_model(Path("base")), alphas, drop, changes.get("anchor", "base"), changes.get("seed", 0))
    for number, model in enumerate(models):
        merged = read_model(Path(f"run/round-{number}/merged"))
        assert all(same_bits(merged[name], tensor) for name, tensor in model.items()), number
    assert state.model == "run/round-2/merged"
    assert state.alphas == {str(number): alpha for number, alpha in enumerate(alphas)}
    assert Path("run/round-1/train.log").read_text().splitlines()[1:] == ["trained round 1", "(status 0)"]
    recipe = json.loads(Path("run/round-2/imm_recipe.json").read_text())
    assert recipe["parameters"]["iteration"] == 2


def test_a_loop_that_is_done_does_nothing_and_may_get_more_rounds(base: str) -> None:
    run_loop(asked(base, rounds=2), "run")
    before = files_of(Path("run"))
    said: list[str] = []
    run_loop(asked(base, rounds=2), "run", tell=said.append)
    assert (said, files_of(Path("run"))) == ([], before)
    state = run_loop(asked(base, rounds=3), "run")
    assert (state.model, len(state.alphas)) == ("run/round-2/merged", 3)
    with pytest.raises(OutputError, match=r"run holds another loop \(rounds: 3, now 2\)"):
        run_loop(asked(base, rounds=2), "run")
    with pytest.raises(OutputError, match=r"run holds another loop \(alpha: \"0.5\", now \"0.6\"\)"):
        run_loop(asked(base, alpha="0.6"), "run")


def test_more_rounds_of_a_line_are_other_numbers(base: str) -> None:
    run_loop(asked(base, rounds=2, alpha="linear:0.2,0.8"), "run")
    with pytest.raises(OutputError, match="alpha of earlier rounds changes with more rounds"):
        run_loop(asked(base, rounds=3, alpha="linear:0.2,0.8"), "run")


def test_more_rounds_of_a_list_are_the_same_numbers_and_more(base: str) -> None:
    run_loop(asked(base, rounds=2, alpha="0.3,0.5"), "run")
    with pytest.raises(OutputError, match="alpha of earlier rounds changes with more rounds"):
        run_loop(asked(base, rounds=3, alpha="0.3,0.6,0.7"), "run")
    assert run_loop(asked(base, rounds=3, alpha="0.3,0.5,0.7"), "run").alphas == {"0": 0.3, "1": 0.5, "2": 0.7}


DRIFT = """
import json, shutil, sys
import numpy as np
# Multiplies each weight by 1.01, and keeps its dtype; bfloat16 is the upper half of float32, rounded to even.
source, target = sys.argv[1:]
shutil.copytree(source, target, dirs_exist_ok=True)
content = open(source + "/model.safetensors", "rb").read()
size = int.from_bytes(content[:8], "little")
header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
for name, about in header.items():
    if name != "__metadata__":
        first, end = about["data_offsets"]
        if about["dtype"] == "BF16":
            wide = (np.frombuffer(data[first:end], "<u2").astype("<u4") << 16).view("<f4") * np.float32(1.01)
            bits = wide.view("<u4")
            data[first:end] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
        else:
            data[first:end] = (np.frombuffer(data[first:end], "<f4") * np.float32(1.01)).tobytes()
open(target + "/model.safetensors", "wb").write(content[: 8 + size] + data)
"""


def test_an_anchor_that_moves_slowly_moves_in_every_round(base: str) -> None:
    """A drift of 1 % per round moves a mean with decay 0.9 by 0.1 %, less than half a bfloat16 step.

    The anchor follows the formula in float32; merged models have the base's dtypes, tensor by tensor.
    """
    state = random_state({"model.embed.weight": (64, 8), "model.layers.0.w": (16, 16), "model.norm": (64,)})
    state["model.norm"] = state["model.norm"].float()
    write_model(Path(base), state, config=CONFIG)
    Path("drift.py").write_text(DRIFT)
    run_loop(asked(base, train=f"{PYTHON} drift.py {{model}} {{output}}", anchor="ema:0.9", drop="0"), "run")
    anchor = {name: tensor.double() for name, tensor in state.items()}
    start = state
    for number in range(3):
        if number:
            anchor = {name: 0.9 * each + 0.1 * start[name].double() for name, each in anchor.items()}
            kept = read_model(Path(f"run/round-{number}/anchor"))
            for name, expected in anchor.items():
                assert kept[name].dtype == torch.float32
                torch.testing.assert_close(kept[name].double(), expected, rtol=3e-7, atol=0)
        sft, merged = (read_model(Path(f"run/round-{number}/{name}")) for name in ("sft", "merged"))
        for name, before in anchor.items():
            assert merged[name].dtype == state[name].dtype
            exact = 0.5 * before + 0.5 * sft[name].double()
            step = 2.0**-8 if state[name].dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(merged[name].double(), exact, rtol=step, atol=0)
        start = merged
    moved = (anchor["model.embed.weight"] / state["model.embed.weight"].double()).mean()
    assert 1.001 < moved < 1.003
    recipe = json.loads(Path("run/round-2/imm_recipe.json").read_text())
    assert recipe["parameters"]["dtype"] == "start"
    assert verify("run/round-2/merged").segments == 3
    run_loop(
        asked(base, train=f"{PYTHON} drift.py {{model}} {{output}}", anchor="ema:0.9", drop="0", dtype="float32"),
        "wide",
    )
    assert {tensor.dtype for tensor in read_model(Path("wide/round-2/merged")).values()} == {torch.float32}


def test_an_anchor_that_moves_has_the_vocabulary_that_was_asked_for(base: str) -> None:
    """The first round adds rows to the vocabulary."""
    more = (
        "import sys; from safetensors.numpy import load_file, save_file; f = sys.argv[1] + '/model.safetensors';"
        " s = load_file(f); n = 'model.embed_tokens.weight'; s[n] = s[n][[*range(len(s[n])), *[0] * (10 - len(s[n]))]];"
        " save_file(s, f)"
    )
    shapes = {"model.embed_tokens.weight": (8, 4), "model.layers.0.w": (16, 16)}
    write_model(Path(base), random_state(shapes, dtype=torch.float32), config=CONFIG, side={"tokenizer.json": "{}"})
    train = f"{TRAIN} && {PYTHON} -c {shlex.quote(more)} {{output}}"
    run_loop(asked(base, train=train, anchor="ema:0.5", vocab="sft"), "run")
    assert read_model(Path("run/round-2/anchor"))["model.embed_tokens.weight"].shape == (10, 4)


def failing(step: int) -> str:
    """A command that fails once, at its n-th run."""
    return f"n=$(cat count 2>/dev/null || echo 0); echo $((n+1)) > count; [ $n -eq {step} ] && exit 7; "


def without_logs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if not name.endswith((".log", "loop.json"))}


@pytest.mark.parametrize("rounds", [2, *others(3)])
def test_it_goes_on_with_the_step_that_failed(base: str, rounds: int) -> None:
    whole = run_loop(asked(base, rounds=rounds, evaluate=EVALUATE, baseline=True), "run")
    results = without_logs(Path("run"))
    commands = sum("/merge" not in step and "/accept" not in step for step in whole.done)
    for step in range(commands):
        Path("count").unlink(missing_ok=True)
        train, evaluate = failing(step) + TRAIN, failing(step) + EVALUATE
        wanted = asked(base, rounds=rounds, train=train, evaluate=evaluate, baseline=True)
        with pytest.raises(CommandError, match=r"(train|evaluate) command of .* ended with status 7") as failed:
            run_loop(wanted, f"run-{step}")
        assert failed.value.status == 7
        assert len(load(Path(f"run-{step}")).done) < len(whole.done)  # type: ignore[union-attr]
        state = run_loop(wanted, f"run-{step}")
        assert (state.done, state.metrics) == (whole.done, whole.metrics)
        found = without_logs(Path(f"run-{step}"))
        assert sorted(found) == sorted(results)
        weights = [name for name in results if name.endswith(".safetensors")]
        assert all(found[name] == results[name] for name in weights)
        assert int(Path("count").read_text()) == commands + 1


def test_the_error_has_the_last_line_of_the_command(base: str) -> None:
    with pytest.raises(CommandError, match=r"status 3; its last line: out of memory; its output is in run/round-0"):
        run_loop(asked(base, train="echo fine; echo 'out of memory' >&2; exit 3 # {output}"), "run")
    with pytest.raises(CommandError) as killed:
        run_loop(asked(base, train="kill -9 $$ # {output}"), "other")
    assert killed.value.status == 137


def test_a_command_that_makes_no_model_is_refused(base: str) -> None:
    with pytest.raises(CheckpointError, match="train command of round 0 ended with status 0, but sft run/round-0/sft"):
        run_loop(asked(base, train="true {output}"), "run")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object with numbers"),
        ('{"a": "b"}', "is not a JSON object with numbers"),
        ('{"a": NaN}', "'a' is nan"),
        ('{"a": 1' + "0" * 400 + "}", "'a' is inf"),
        ('{"other": 1}', "has no 'score', which the gate asks for, but other"),
    ],
)
def test_what_an_evaluation_writes_is_checked(base: str, content: str | None, match: str) -> None:
    write = "true {model} {json}" if content is None else f"printf %s {shlex.quote(content)} > {{json}} # {{model}}"
    with pytest.raises(MergeError, match=match):
        run_loop(asked(base, evaluate=write, gate="score"), "run")


def test_a_generate_command_makes_the_data(base: str) -> None:
    made = "mkdir -p {output} && echo {round} > {output}/data.txt && test -d {model}"
    run_loop(asked(base, generate=made, train=f"test -s {{data}}/data.txt && {TRAIN}"), "run")
    assert Path("run/round-2/data/data.txt").read_text() == "2\n"
    assert Path("run/round-2/generate.log").exists()


def test_alphas_that_differ_in_the_seventh_digit_are_two(base: str) -> None:
    """The gate refuses all: each is merged and measured."""
    wanted = asked(
        base, rounds=1, evaluate=EVALUATE, gate="nested.left", alpha="0.333333", retry=(0.3333333, 0.33333333, 0.9)
    )
    state = run_loop(wanted, "run")
    assert state.stopped != ""
    merges = [step for step in state.done if step.startswith("0/merge")]
    assert merges == ["0/merge 0.333333", "0/merge 0.3333333", "0/merge 0.33333333", "0/merge 0.9"]
    assert sum(step.startswith("0/evaluate merged") for step in state.done) == 4


def test_a_loop_of_the_first_version_resumes(base: str) -> None:
    """Its step names had six digits of alpha."""
    wanted = asked(base, alpha="linear:0.3,1", rounds=4, evaluate=EVALUATE)  # 0.5333333333333333, 0.7666666666666666
    run_loop(wanted, "run")
    before = files_of(Path("run"))
    content = json.loads(before["loop.json"])
    assert "1/merge 0.5333333333333333" in content["done"]
    assert "3/merge 1.0" in content["done"]
    six = {"0.5333333333333333": "0.533333", "0.7666666666666666": "0.766667", "1.0": "1"}
    words = [step.rpartition(" ") for step in content["done"]]
    old = [f"{before}{blank}{six.get(last, last)}" for before, blank, last in words]
    assert old != content["done"]
    Path("run/loop.json").write_text(json.dumps(content | {"done": old}))
    said: list[str] = []
    state = run_loop(wanted, "run", tell=said.append)
    assert (said, list(state.done)) == ([], content["done"])


def test_of_alphas_that_shared_a_name_the_first_was_merged(base: str) -> None:
    """The first version skipped the second; it is merged now."""
    wanted = asked(
        base, rounds=1, alpha="0.3333333", retry=(0.33333333, 0.9), evaluate=EVALUATE, gate="nested.left", tolerance=9.0
    )
    done = ["base/evaluate", "0/train", "0/evaluate sft", "0/merge 0.333333", "0/evaluate merged 0.333333"]
    state = State(wanted, base, tuple(done))
    Path("run").mkdir()
    save(state, Path("run"))
    found = load(Path("run"))
    assert found is not None
    assert found.done == (*done[:3], "0/merge 0.3333333", "0/evaluate merged 0.3333333")
    own = (*done[:3], "0/merge 0.33333333")  # this version: only the second
    save(replace(state, done=own), Path("run"))
    assert load(Path("run")).done == own  # type: ignore[union-attr]
