"""Gates, and which models stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import read_model, same_bits
from loops import EVALUATE, PYTHON, TRAIN, TRAINER, asked, expected
from mergekit_imm.loop.commands import CommandError
from mergekit_imm.loop.run import run_loop


def test_a_gate_that_is_closed_asks_for_larger_alphas(base: str) -> None:
    """The distance may grow by 0.008 per round: alpha 0.5 gives 0.005 first, too much in round 2."""
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
    lines: list[str] = []
    assert run_loop(wanted, "run", tell=lines.append) == state
    assert lines == []


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
    """A train command may leave a link to its model."""
    there = "$PWD/there-{round}"
    train = f"{PYTHON} {TRAINER} train {{model}} {there} {{round}} && ln -s {there} {{output}}"
    run_loop(asked(base, train=train, rounds=2, keep_rounds=1), "run")
    assert not Path("run/round-0/sft").is_symlink()
    assert Path("there-0/model.safetensors").exists()
