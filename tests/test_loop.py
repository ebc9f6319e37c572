"""The loop: each round against its formula, resumed after every failure, gates, anchors, what is kept."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import State, files_of, random_state, read_model, same_bits, write_model
from mergekit_imm import ArgumentError, CheckpointError, MergeError, OutputError, dare_merge
from mergekit_imm.loop import run_loop
from mergekit_imm.loopstate import Settings, load
from mergekit_imm.loopsummary import plot, table
from mergekit_imm.schedules import cosine, linear, parse_schedule
from mergekit_imm.shell import CommandError, filled

PYTHON = shlex.quote(sys.executable)
TRAINER = shlex.quote(str(Path(__file__).parent / "trainer.py"))
TRAIN = f"{PYTHON} {TRAINER} train {{model}} {{output}} {{round}}"
EVALUATE = f"{PYTHON} {TRAINER} evaluate {{model}} {{base}} {{json}}"
CONFIG = {"model_type": "tiny", "architectures": ["Tiny"], "vocab_size": 8, "tie_word_embeddings": False}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shapes = {"model.embed.weight": (8, 4), "model.layers.0.w": (16, 16), "model.layers.1.w": (16, 16)}
    state = random_state(shapes, dtype=torch.float32)
    write_model(tmp_path / "base", state, config=CONFIG, side={"tokenizer.json": "{}"})
    return "base"


def asked(base: str, **changes: Any) -> Settings:
    return replace(Settings(base=base, train=TRAIN, rounds=3), **changes)


def tuned(state: State, number: int) -> State:
    added = torch.tensor(0.01 * (number + 1), dtype=torch.float32)
    return {name: tensor + added for name, tensor in state.items()}


def expected(base: State, alphas: list[float], drop: float, anchor: str = "base", seed: int = 0) -> list[State]:
    """Every round's merged model, as the formulas say."""
    start, pulled, found = base, base, []
    for number, alpha in enumerate(alphas):
        if number and anchor == "previous":
            pulled = start
        elif number and anchor != "base":
            kept = float(anchor.removeprefix("ema:"))
            pulled = dare_merge(pulled, start, alpha=kept, drop=0.0)
        sft = tuned(start, number)
        start = dare_merge(pulled, sft, start=start, alpha=alpha, drop=drop, iteration=number, seed=seed)
        found.append(start)
    return found


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
    with pytest.raises(OutputError, match="alpha of the rounds before, as there are more rounds now"):
        run_loop(asked(base, rounds=3, alpha="linear:0.2,0.8"), "run")


def test_more_rounds_of_a_list_are_the_same_numbers_and_more(base: str) -> None:
    run_loop(asked(base, rounds=2, alpha="0.3,0.5"), "run")
    with pytest.raises(OutputError, match="alpha of the rounds before, as there are more rounds now"):
        run_loop(asked(base, rounds=3, alpha="0.3,0.6,0.7"), "run")
    assert run_loop(asked(base, rounds=3, alpha="0.3,0.5,0.7"), "run").alphas == {"0": 0.3, "1": 0.5, "2": 0.7}


def test_an_anchor_that_moves_has_the_vocabulary_that_was_asked_for(base: str) -> None:
    """The first round adds a row, which then is the sft's."""
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
    """A command that fails the n-th time, once."""
    return f"n=$(cat count 2>/dev/null || echo 0); echo $((n+1)) > count; [ $n -eq {step} ] && exit 7; "


def without_logs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if not name.endswith((".log", "loop.json"))}


def test_it_goes_on_with_the_step_that_failed(base: str) -> None:
    whole = run_loop(asked(base, evaluate=EVALUATE, baseline=True), "run")
    results = without_logs(Path("run"))
    commands = sum("/merge" not in step and "/accept" not in step for step in whole.done)
    for step in range(commands):
        Path("count").unlink(missing_ok=True)
        wanted = asked(base, train=failing(step) + TRAIN, evaluate=failing(step) + EVALUATE, baseline=True)
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


def test_the_last_words_of_a_command_are_told(base: str) -> None:
    with pytest.raises(CommandError, match=r"status 3; its last line: out of memory; its output is in run/round-0"):
        run_loop(asked(base, train="echo fine; echo 'out of memory' >&2; exit 3 # {output}"), "run")
    with pytest.raises(CommandError) as killed:
        run_loop(asked(base, train="kill -9 $$ # {output}"), "other")
    assert killed.value.status == 137


def test_a_command_that_makes_no_model_is_told(base: str) -> None:
    with pytest.raises(CheckpointError, match="train command of round 0 ended with status 0, but sft run/round-0/sft"):
        run_loop(asked(base, train="true {output}"), "run")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read: No such file"), ("{", "is not JSON"), ("[1]", "is no JSON object with numbers"),
        ('{"a": "b"}', "is no JSON object with numbers"), ('{"a": NaN}', "'a' is nan"),
        ('{"a": 1' + "0" * 400 + "}", "'a' is inf"),
        ('{"other": 1}', "has no 'score', which the gate asks for, but other"),
    ],
)  # fmt: skip
def test_what_an_evaluation_writes_is_checked(base: str, content: str | None, match: str) -> None:
    write = "true {model} {json}" if content is None else f"printf %s {shlex.quote(content)} > {{json}} # {{model}}"
    with pytest.raises(MergeError, match=match):
        run_loop(asked(base, evaluate=write, gate="score"), "run")


# --- gates, and what is kept


def test_a_gate_that_is_closed_asks_for_larger_alphas(base: str) -> None:
    """The distance from the base may be 0.008 more a round: 0.5 gives 0.005, then more than that."""
    said: list[str] = []
    wanted = asked(base, evaluate=EVALUATE, gate="-distance", tolerance=0.008, drop="0", retry=(0.4, 0.7, 0.9))
    state = run_loop(wanted, "run", tell=said.append)
    assert state.stopped == ""
    assert state.alphas == {"0": 0.5, "1": 0.5, "2": 0.7}
    assert any("not accepted with alpha 0.5: distance is" in line for line in said)
    merged = read_model(Path("run/round-2/merged"))
    models = expected(read_model(Path("base")), [0.5, 0.5, 0.7], 0.0)
    assert all(same_bits(merged[name], tensor) for name, tensor in models[2].items())


def test_a_gate_that_no_alpha_opens_ends_the_loop(base: str) -> None:
    wanted = asked(base, evaluate=EVALUATE, gate="nested.left", retry=(0.9,))
    state = run_loop(wanted, "run")
    assert state.stopped.startswith("round 0 was not accepted: nested.left is 0.9")
    assert (state.model, state.alphas) == ("base", {"0": 0.9})
    assert run_loop(wanted, "run") == state


def test_models_of_older_rounds_are_removed_when_asked(base: str) -> None:
    state = run_loop(asked(base, evaluate=EVALUATE, baseline=True, keep_rounds=1, anchor="ema:0.5"), "run")
    models = {str(path.parent) for path in Path("run").rglob("model.safetensors")}
    assert models == {"run/round-2/sft", "run/round-2/merged", "run/round-2/anchor", "run/baseline/round-2/sft"}
    assert Path("run/round-0/imm_recipe.json").exists()
    assert Path("run/round-0/merged.json").exists()
    other = run_loop(asked(base, evaluate=EVALUATE, baseline=True, anchor="ema:0.5"), "other")
    assert other.metrics == state.metrics


def test_the_last_accepted_model_stays_when_a_gate_ends_the_loop(base: str) -> None:
    said = "test -d {model}; case {model} in base) v=1 ;; *round-0*) v=2 ;; *) v=0 ;; esac; echo '{\"x\": '$v} > {json}"
    wanted = asked(base, evaluate=said, gate="x", keep_rounds=1, baseline=True)
    state = run_loop(wanted, "run")
    assert (state.model, state.done[-1]) == ("run/round-0/merged", "1/evaluate baseline")
    assert Path("run/round-0/merged/model.safetensors").exists()
    told: list[str] = []
    assert run_loop(wanted, "run", tell=told.append) == state
    assert told == []


def test_the_rounds_without_merges_go_on_when_a_gate_ended_the_loop(base: str) -> None:
    said = "test -d {model}; case {model} in base) v=1 ;; *round-0*) v=2 ;; *) v=0 ;; esac; echo '{\"x\": '$v} > {json}"
    train = f"case {{output}} in *baseline*) test -e go || exit 3 ;; esac; {TRAIN}"
    wanted = asked(base, train=train, evaluate=said, gate="x", baseline=True)
    with pytest.raises(CommandError):
        run_loop(wanted, "run")
    Path("go").touch()
    state = run_loop(wanted, "run")
    assert state.stopped.startswith("round 1 was not accepted")
    assert "1/baseline" in state.metrics


def test_what_is_kept_elsewhere_stays_there(base: str) -> None:
    """A training command may leave a link to where the model is."""
    there = "$PWD/there-{round}"
    train = f"{PYTHON} {TRAINER} train {{model}} {there} {{round}} && ln -s {there} {{output}}"
    run_loop(asked(base, train=train, rounds=2, keep_rounds=1), "run")
    assert not Path("run/round-0/sft").is_symlink()
    assert Path("there-0/model.safetensors").exists()


def test_a_generate_command_makes_the_data(base: str) -> None:
    made = "mkdir -p {output} && echo {round} > {output}/data.txt && test -d {model}"
    run_loop(asked(base, generate=made, train=f"test -s {{data}}/data.txt && {TRAIN}"), "run")
    assert Path("run/round-2/data/data.txt").read_text() == "2\n"
    assert Path("run/round-2/generate.log").exists()


def test_the_table_and_the_pictures_show_what_was_measured(base: str) -> None:
    state = run_loop(asked(base, evaluate=EVALUATE, baseline=True), "run")
    lines = table(state).splitlines()
    assert lines[0].split() == ["model", "alpha", "distance", "nested.left"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "base", *(f"{what} {n}" for n in (1, 2, 3) for what in ("SFT", "Merge", "SFT without merges"))
    ]  # fmt: skip
    assert lines[2].split() == ["SFT", "1", "0.01", "0.99"]
    paths = plot(state, Path("run"))
    assert paths == [Path("run/metrics.png"), Path("run/metrics.svg")]
    first = [path.read_bytes() for path in paths]
    plot(state, Path("run"))
    assert [path.read_bytes() for path in paths] == first
    assert first[0].startswith(b"\x89PNG")
    assert first[1].decode().count("<!-- nested.left -->") == 1  # the title of its panel
    assert plot(run_loop(asked(base), "other"), Path("other")) == []


def test_of_many_numbers_the_first_are_drawn(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_imm.loopsummary.PANELS", 2)
    state = run_loop(asked(base, rounds=1), "run")
    many = replace(state, metrics={"base": {f"task-{number}": 0.5 for number in range(3)}})
    with mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot(many, Path("run"))
    drawn = Path("run/metrics.svg").read_text()
    assert [f"task-{number}" in drawn for number in range(3)] == [True, True, False]


def test_any_name_is_that_of_a_number(base: str) -> None:
    names = {"round": 7, "kind": 3, "alpha": 0.1, "$\\frac$": 1}
    said = f"echo {{model}} {shlex.quote(json.dumps(names))} | cut -d' ' -f2- > {{json}}"
    state = run_loop(asked(base, evaluate=said, rounds=1), "run")
    assert table(state).splitlines()[-1].split() == ["Merge", "1", "0.5", "7", "3", "0.1", "1"]
    assert len(plot(state, Path("run"))) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"train": "train {model}"}, r"has no \{output\}"),
        ({"train": "train {model} ${output}"}, r"has no \{output\}"),
        ({"train": "train {output} {data}"}, r"has \{data\}, but there is no generate command"),
        ({"generate": "make"}, r"generate command has no \{output\}"),
        ({"evaluate": "measure {model}"}, r"needs \{model\} and \{json\}"),
        ({"evaluate": EVALUATE, "gate": "-"}, "the gate is '-'; name a number"),
        ({"gate": "x"}, "no evaluate command that measures it"),
        ({"retry": (0.9,)}, "no gate that would ask for them"),
        ({"alpha": "0.1,0.2"}, "has 2 values, and there are 3 rounds"),
        ({"alpha": "linear:0.1"}, "linear takes the first and the last"),
        ({"alpha": "square:1,2"}, "is no number for each round"),
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
    with pytest.raises(OutputError, match="output ~nobody-here/run cannot be"):
        run_loop(asked(base, rounds=1), "~nobody-here/run")


def test_names_that_are_no_utf_8_are_refused_before_anything_is_run(base: str) -> None:
    name = os.fsdecode(b"run-\xff")
    with pytest.raises(OutputError, match=r"the path run-\\udcff is not valid UTF-8; give another folder"):
        run_loop(asked(base), name)
    assert not Path(name).exists()
    with pytest.raises(ArgumentError, match=r"is not valid UTF-8, which loop\.json is written in"):
        asked(base, train=f"{TRAIN} {name}")


def test_folders_that_are_no_loop_are_left_alone(base: str) -> None:
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"full is there, not empty, and holds no loop\.json"):
        run_loop(asked(base), "full")
    assert list(Path("full").iterdir()) == [Path("full/thesis.tex")]
    run_loop(asked(base, rounds=1), "run")
    Path("run/loop.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run/loop\.json is damaged"):
        run_loop(asked(base, rounds=1), "run")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        run_loop(asked("nowhere"), "new")


# --- commands


@given(value=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_value_reaches_a_command_as_one_word(value: str) -> None:
    command = filled("printf '<%s>' {model} '{x: 1}' {other}", {"model": value})
    said = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True).stdout
    assert said.decode() == f"<{value}><{{x: 1}}><{{other}}>"


def test_placeholders_inside_quotes_are_filled_or_refused() -> None:
    assert filled("run '{model}'", {"model": "plain"}) == "run 'plain'"
    assert filled("run ${model} $x{model}", {"model": "m"}) == "run ${model} $xm"  # the first is a variable
    for template in ("run '{model}'", 'run "--m={model}"'):
        with pytest.raises(ArgumentError, match="leave out the quotes around it"):
            filled(template, {"model": "a b"})
    assert filled("run \\'{model} \"'\" {model}", {"model": "a b"}) == "run \\''a b' \"'\" 'a b'"


def test_commands_have_the_environment_and_no_input(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_USER", "here")
    heard: list[bytes] = []
    run_loop(asked(base, rounds=1, train=f"echo $OF_THE_USER; cat; {TRAIN}"), "run", echo=heard.append)
    assert b"here\ntrained round 0\n" in b"".join(heard)


def test_what_a_command_leaves_running_is_not_waited_for_but_holds_the_folder(base: str) -> None:
    began = time.monotonic()
    wanted = asked(base, rounds=1, train=f"sleep 30 & echo $! > pid; {TRAIN}")
    run_loop(wanted, "run")
    assert time.monotonic() - began < 25
    with pytest.raises(OutputError, match="run/lock is in use"):
        run_loop(wanted, "run")
    os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    for _ in range(100):
        try:
            run_loop(wanted, "run")
            return
        except OutputError:
            time.sleep(0.05)
    pytest.fail("the folder is still held")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_filesystem_without_locks(base: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told: list[str] = []
    run_loop(asked(base, rounds=1), "run", tell=told.append)
    assert told[0] == "note: the filesystem of run has no locks: see to it that no other loop runs there"


# --- the command itself


def imm_loop(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mergekit_imm", "loop", *arguments]


def test_the_command_tells_its_steps_and_ends_with_the_table(base: str) -> None:
    arguments = imm_loop("base", "-o", "run", "--rounds", "2", "--train", TRAIN, "--evaluate", EVALUATE)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("trained round 0\ntrained round 1\nmodel    alpha  distance  nested.left\nbase")
    assert done.stdout.endswith("drawn in run/metrics.png, run/metrics.svg\nthe last model is run/round-1/merged\n")
    assert "round 1: merge: alpha 0.5, drop 0.2, anchor base\n" in done.stderr
    quiet = subprocess.run([*arguments, "--json", "-q"], capture_output=True, text=True, check=True)
    assert json.loads(quiet.stdout)["model"] == "run/round-1/merged"
    assert quiet.stderr == ""


def test_the_command_ends_with_the_status_of_the_user_s(base: str) -> None:
    arguments = imm_loop("base", "-o", "run", "--train", "echo oh; exit 42 # {output}")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 42
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the train command of round 0 ended with status 42; its last line: oh")
    quiet = subprocess.run([*arguments, "-q"], capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stderr.splitlines()[:-1], quiet.stdout) == (42, ["oh"], "")


def test_refused_before_anything_is_run(base: str) -> None:
    done = subprocess.run(
        imm_loop("nowhere", "-o", "run", "--train", "touch ran {output}"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, Path("ran").exists()) == (1, False)


def until(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to that")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_too(base: str, number: signal.Signals, status: int) -> None:
    train = "echo $$ > pid; trap 'echo asked >> told; exit 1' INT TERM; while :; do sleep 0.1; done # {output}"
    loop = subprocess.Popen(
        imm_loop("base", "-o", "run", "--train", train), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a job in the background may have it ignored
    )  # fmt: skip
    until(lambda: Path("pid").exists() and Path("pid").read_text().strip() != "")
    loop.send_signal(number)
    _, told = loop.communicate(timeout=60)
    assert loop.returncode == status
    assert "the same command goes on where it stopped" in told
    assert Path("told").read_text() == "asked\n"
    assert not Path(f"/proc/{int(Path('pid').read_text())}").exists()


def test_killed_anywhere_the_same_command_goes_on_to_the_same_models(base: str) -> None:
    arguments = imm_loop("base", "-o", "run", "--rounds", "2", "--train", TRAIN, "--evaluate", EVALUATE, "-q")
    subprocess.run([*arguments[:6], "whole", *arguments[7:]], check=True, capture_output=True)
    for number in range(8):
        loop = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3 + 0.35 * number)
        loop.kill()
        loop.wait()
    until(lambda: subprocess.run(arguments, capture_output=True, check=False).returncode == 0)
    one, other = load(Path("run")), load(Path("whole"))
    assert one is not None
    assert other is not None
    assert one.metrics == other.metrics
    for path in Path("whole").rglob("*.safetensors"):
        assert (Path("run") / path.relative_to("whole")).read_bytes() == path.read_bytes()


# --- schedules


@given(first=st.floats(0, 1), last=st.floats(0, 1), rounds=st.integers(1, 30))
def test_schedules_begin_and_end_where_they_say(first: float, last: float, rounds: int) -> None:
    for make in (linear, cosine):
        schedule = make(first, last, rounds)
        values = [schedule(t) for t in range(rounds)]
        assert values[0] == first
        assert rounds == 1 or values[-1] == last
        assert schedule(rounds + 5) == last
        ordered = sorted(values, reverse=last < first)
        assert values == pytest.approx(ordered, abs=1e-12)


def test_a_schedule_is_read_as_it_is_written() -> None:
    assert [parse_schedule("0.1,0.2,0.3", 3)(t) for t in range(3)] == [0.1, 0.2, 0.3]
    assert parse_schedule("0.5", 9)(8) == 0.5
    assert parse_schedule("cosine:0,1", 5)(1) == pytest.approx((1 - 2**-0.5) / 2)
    with pytest.raises(ArgumentError, match=re.escape("there are 3 values, and none for round 3")):
        parse_schedule("0.1,0.2,0.3", 3)(3)
