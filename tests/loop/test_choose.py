"""Rounds that choose their alpha: the model that is kept, what is measured, kills at any step, refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from checkpoints import files_of, read_model, same_bits
from loops import asked, expected
from mergekit_imm import ArgumentError, CheckpointError, MergeError, OutputError, merge_checkpoints
from mergekit_imm.engine.merge import merged
from mergekit_imm.loop import run as running
from mergekit_imm.loop.metrics import rows
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import Settings, load
from mergekit_imm.output import direct_io, write_errors
from mergekit_imm.views.loop_summary import notes, plot, table
from thorough import others

# The score is that of the alpha in the recipe, less one in each round; every call is noted. In sh, as it runs often.
MEASURE = """
value() { sed -n 's/^ *"'$1'": \\([0-9.]*\\),*$/\\1/p' "$model/imm_recipe.json" 2>/dev/null | head -n 1; }
model=$1
echo "$model" >> calls
case "$(value alpha)" in CASES *) score=1 ;; esac
score=$((score - $(value iteration) + 0))
echo '{"score": '$score', "loss": '$((-score))'}' > "$2"
"""


def measure(scores: dict[str, int]) -> str:
    cases = " ".join(f"{alpha}) score={score} ;;" for alpha, score in scores.items())
    Path("measure.sh").write_text(MEASURE.replace("CASES", cases))
    return "sh measure.sh {model} {json}"


def choosing(base: str, scores: dict[str, int] | None = None, **changes: Any) -> Settings:
    evaluate = measure(scores or {"0.2": 5, "0.4": 7, "0.8": 6})
    return asked(
        base, **{"rounds": 2, "alpha": "choose:0.2,0.4,0.8", "metric": "score", "evaluate": evaluate} | changes
    )


def results(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(run).items() if not name.endswith(".log")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metric": "-loss", "drop": "0.5", "seed": 3},
        {"anchor": "previous", "importance": {"0": 1.0, "1": 3.0}},
        {"layer_factors": "lines:1,0.5", "keep": ("embed",)},
        {"sparsify": "trim", "drop": "0.5"},
        {"gate": "-score", "tolerance": 9.0, "keep_rounds": 1, "baseline": True},
    ],
)
def test_the_model_that_is_kept_is_that_of_a_merge_with_its_alpha(base: str, changes: dict[str, Any]) -> None:
    other = run_loop(choosing(base, **{**changes, "alpha": "0.4", "metric": None}), "run")
    Path("run").rename("other")  # recipes hold the paths of their inputs
    state = run_loop(choosing(base, **changes), "run")
    assert state.alphas == {"0": 0.4, "1": 0.4}
    one, two = (results(Path(run)) for run in ("run", "other"))
    assert "round-1/merged/imm_recipe.json" in one
    assert {name: one[name] for name in two if name != "loop.json"} == {n: two[n] for n in two if n != "loop.json"}
    assert set(one) - set(two) == {f"round-{n}/alpha-{alpha}.json" for n in (0, 1) for alpha in (0.2, 0.4, 0.8)}
    assert {name: state.metrics[name] for name in other.metrics} == other.metrics
    assert json.loads(Path("run/round-1/imm_recipe.json").read_text())["parameters"]["alpha"] == 0.4
    assert b"alpha` (weight of the base) | 0.4" in Path("run/round-1/merged/README.md").read_bytes()


def test_an_anchor_that_moves_follows_the_model_that_was_chosen(base: str) -> None:
    wanted = choosing(base, rounds=3, anchor="ema:0.75", drop="0.5")
    run_loop(choosing(base, rounds=3, anchor="ema:0.75", drop="0.5", alpha="0.4", metric=None), "run")
    Path("run").rename("other")
    run_loop(wanted, "run")
    models = expected(read_model(Path(base)), [0.4, 0.4, 0.4], 0.5, "ema:0.75")
    for number, model in enumerate(models):
        merged = read_model(Path(f"run/round-{number}/merged"))
        assert all(same_bits(merged[name], tensor) for name, tensor in model.items()), number
    assert results(Path("run/round-2/anchor")) == results(Path("other/round-2/anchor"))


def test_all_candidates_come_from_one_reading(base: str) -> None:
    with patch.object(running, "merged", wraps=merged) as merges:
        run_loop(choosing(base, rounds=1), "run")
    assert [call.args[0]["alpha"] for call in merges.call_args_list] == [[0.2, 0.4, 0.8]]
    assert Path("calls").read_text().split() == [
        base, "run/round-0/sft", *(f"run/round-0/alpha-{alpha}" for alpha in (0.2, 0.4, 0.8))
    ]  # fmt: skip


def test_both_ends_may_be_chosen(base: str) -> None:
    """With alpha 0 the base is not read by a merge of its own, with alpha 1 the trained model is not."""
    for best in ("0.0", "1.0"):
        scores = {"0.0": 1, "0.5": 1, "1.0": 1} | {best: 2}
        state = run_loop(choosing(base, scores, alpha="choose:0,0.5,1", rounds=1), f"run-{best}")
        assert state.alphas == {"0": float(best)}
        merge_checkpoints(base, f"run-{best}/round-0/sft", f"out-{best}", alpha=float(best))
        assert results(Path(f"run-{best}/round-0/merged")) == results(Path(f"out-{best}"))


def test_of_equals_the_largest_is_kept(base: str) -> None:
    state = run_loop(choosing(base, {"0.2": 7, "0.4": 7, "0.8": 6}, rounds=1), "run")
    assert state.alphas == {"0": 0.4}


def test_the_table_shows_every_candidate(base: str) -> None:
    state = run_loop(choosing(base, {"0.2": 5, "0.4": 6, "0.8": 7}), "run")
    assert table(state).splitlines() == [
        "model        alpha  score  loss",
        "base                    1    -1",
        "SFT 0                   1    -1",
        "Candidate 0    0.2      5    -5",
        "Candidate 0    0.4      6    -6",
        "Merge 0        0.8      7    -7",
        "SFT 1                   1    -1",
        "Candidate 1    0.2      4    -4",
        "Candidate 1    0.4      5    -5",
        "Merge 1        0.8      6    -6",
    ]
    assert [row["kind"] for row in rows(state)] == ["base", *(["sft", "candidate", "candidate", "merged"] * 2)]
    assert notes(state) == [
        f"round {n}: the best alpha is the largest of the list; one beyond it may be better" for n in (0, 1)
    ]
    assert len(plot(state, Path("run"))) == 2


TENTHS = [f"{n / 10}" for n in range(11)]


@pytest.mark.parametrize(
    ("scores", "best", "count", "dip"),
    [
        (range(11), 1.0, 4, ""),
        (range(11, 0, -1), 0.0, 5, ""),
        ((0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0), 0.5, 5, ""),
        ((0, 0, 9, 4, 6, 5, 1, 3, 9, 9, 9), 0.2, 5, "score does not rise to one peak: it is worse at 0.3 (4) than at"),
    ],
)
def test_a_search_measures_fewer(base: str, scores: Any, best: float, count: int, dip: str) -> None:
    wanted = choosing(base, dict(zip(TENTHS, scores, strict=True)), alpha="choose:auto", rounds=1)
    most = 0
    evaluate = running._evaluate

    def looking(*given: Any) -> None:
        nonlocal most
        most = max(most, len([path for path in Path("run/round-0").glob("alpha-*") if path.is_dir()]))
        evaluate(*given)

    with patch.object(running, "_evaluate", looking):
        state = run_loop(wanted, "run")
    assert (state.alphas, most) == ({"0": best}, 2)
    assert Path("calls").read_text().count("alpha-") == count
    (note,) = notes(state)
    assert note.startswith(f"round 0: {count} of 11 alphas were measured")
    assert (dip in note) if dip else ("peak" not in note)
    merge_checkpoints(base, "run/round-0/sft", "out", alpha=best)
    assert results(Path("run/round-0/merged")) == results(Path("out"))


class Killed(BaseException):
    pass


@contextmanager
def killed(after: int) -> Iterator[list[str]]:
    """Kill the loop before one of the calls that change what is on the disk, or run a command; the list has them."""
    calls: list[str] = []

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            if len(calls) >= after:
                if name == "rmtree" and Path(given[0]).is_dir():  # half of it is gone
                    (Path(given[0]) / "config.json").unlink(missing_ok=True)
                raise Killed
            calls.append(name)
            return call(*given, **named)

        return counting

    places: list[tuple[Any, str]] = [
        (running, "merged"), (running, "run_command"), (shutil, "rmtree"), (Path, "rename"), (os, "replace"),
        (direct_io, "write_file"), (direct_io, "sync_folder"),
    ]  # fmt: skip
    patches = [patch.object(holder, name, dying(name, getattr(holder, name))) for holder, name in places]
    try:
        for each in patches:
            each.start()
        yield calls
    except Killed:
        calls.append("killed")
    finally:
        for each in patches:
            each.stop()


@pytest.mark.parametrize(
    ("alpha", "every"), [("choose:0.2,0.4,0.8", 7), *others(("choose:0.2,0.4,0.8", 1), ("choose:auto", 1))]
)
def test_a_loop_killed_anywhere_goes_on_and_measures_nothing_again(base: str, alpha: str, every: int) -> None:
    run_loop(asked(base, rounds=1), "made")
    scores = {"0.2": 5, "0.4": 7, "0.7": 3, "0.8": 6}
    wanted = choosing(
        base, scores, alpha=alpha, rounds=1, train="mkdir -p {output} && cp -r made/round-0/sft/. {output}"
    )
    whole = run_loop(wanted, "run")
    expect = results(Path("run"))
    Path("run").rename("whole")
    with killed(10**6) as steps:
        run_loop(wanted, "run")
    assert {"merged", "run_command", "rmtree", "rename", "write_file"} <= set(steps)
    for step in range(0, len(steps), every):
        Path("calls").unlink()
        shutil.rmtree("run")
        with killed(step) as before:
            run_loop(wanted, "run")
        assert before[-1:] == ["killed"]
        state = load(Path("run"))
        recorded = len(set(state.metrics) - {"0/merged"}) if state else 0
        measured = len(Path("calls").read_text().split()) if Path("calls").exists() else 0
        assert measured - recorded in (0, 1)  # a command that ended just now
        state = run_loop(wanted, "run")
        assert (state.metrics, state.alphas, state.done) == (whole.metrics, whole.alphas, whole.done)
        assert results(Path("run")) == expect
        assert len(Path("calls").read_text().split()) == len(whole.metrics) - 1 + measured - recorded


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        ('{"score": NaN}', r"run/round-0/alpha-0\.4\.json: 'score' is nan, which cannot be compared"),
        ('{"loss": 1}', r"run/round-0/alpha-0\.4\.json has no 'score', which the choice of alpha asks for, but loss"),
        ("", r"run/round-0/alpha-0\.4\.json, which the evaluate command wrote, is not JSON"),
        (None, r"the evaluate command of 0/alpha-0\.4 ended with status 1"),
    ],
)
def test_a_candidate_that_cannot_be_measured_ends_the_loop_and_it_resumes(
    base: str, scores: str | None, match: str
) -> None:
    wanted = choosing(base, rounds=1)
    bad = "exit 1" if scores is None else f"printf %s {shlex.quote(scores)} > {{json}}"
    evaluate = f"case {{model}} in *0.4) test -e good || {{ {bad}; exit; }} ;; esac; {wanted.evaluate}"
    wanted = choosing(base, rounds=1, evaluate=evaluate)
    with pytest.raises(MergeError, match=match):
        run_loop(wanted, "run")
    Path("good").touch()
    state = run_loop(wanted, "run")
    assert state.alphas == {"0": 0.4}
    assert Path("calls").read_text().count("alpha-0.2") == 1


def test_a_metric_that_is_never_written_is_refused_before_training(base: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"run/base\.json has no 'scroe', which the choice of alpha asks for, but score"
    ):
        run_loop(choosing(base, metric="scroe"), "run")
    assert not Path("run/round-0").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metric": None}, "alpha is 'choose:0.2,0.4,0.8', but no metric says which is best"),
        ({"alpha": "0.5"}, "the metric is 'score', but alpha is '0.5', which leaves no choice"),
        ({"evaluate": None}, "the metric is 'score', but no evaluate command measures it"),
        ({"metric": "-"}, "the metric is '-'; name a number"),
        ({"gate": "score", "retry": (0.9,)}, "retry is given, but alpha is 'choose:0.2,0.4,0.8', which tries several"),
        ({"alpha": "choose:0.5"}, "write two or more different alphas"),
        ({"alpha": "choose:0.5,1.5"}, "alpha is 1.5"),
    ],
)
def test_settings_that_leave_no_choice_are_refused(base: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        choosing(base, **changes)


def test_a_disk_that_cannot_hold_the_candidates_is_refused_before_anything_runs(base: str) -> None:
    size = sum(tensor.nbytes for tensor in read_model(Path(base)).values())
    for alpha, room, fits in (
        ("choose:0.2,0.4,0.8", 3 * size - 1, False), ("choose:0.2,0.4,0.8", 3 * size, True),
        ("choose:auto", 2 * size - 1, False), ("choose:auto", 2 * size, True),
    ):  # fmt: skip
        with (
            patch.object(write_errors, "disk_of", lambda _, room=room: (0, room)),
            patch.object(running, "merged", side_effect=Killed),
            pytest.raises(Killed if fits else OutputError) as found,
        ):
            run_loop(choosing(base, alpha=alpha), "run")
        if fits:
            shutil.rmtree("run")
        else:
            assert "the models to choose from: outputs up to run/alpha-0." in str(found.value)
            assert ("choose:auto, which keeps two" in str(found.value)) == (alpha != "choose:auto")
            assert not Path("run").exists()
    half = choosing(base, alpha="choose:0.2,0.4", dtype="bfloat16")
    with (
        patch.object(write_errors, "disk_of", lambda _: (0, size)),
        patch.object(running, "merged", side_effect=Killed),
        pytest.raises(Killed),
    ):
        run_loop(half, "run")


def test_a_gate_may_refuse_what_was_chosen(base: str) -> None:
    state = run_loop(choosing(base, gate="score", anchor="ema:0.5", rounds=3), "run")
    assert state.stopped == "round 1 was not accepted: score is 6 after 7; the loop ends with the model before it"
    assert (state.model, state.alphas) == ("run/round-0/merged", {"0": 0.4, "1": 0.4})
    assert sorted(path.name for path in Path("run").glob("round-*")) == ["round-0", "round-1"]


def test_more_rounds_choose_from_the_same(base: str) -> None:
    run_loop(choosing(base, rounds=1), "run")
    with pytest.raises(OutputError, match="alpha of earlier rounds changes with more rounds"):
        run_loop(choosing(base, rounds=2, alpha="choose:0.2,0.4"), "run")
    with pytest.raises(OutputError, match=r"another loop \(metric: \"score\", now null\)"):
        run_loop(choosing(base, rounds=2, alpha="0.4", metric=None), "run")
    assert run_loop(choosing(base, rounds=2), "run").alphas == {"0": 0.4, "1": 0.4}


def test_a_folder_whose_name_merges_would_fill_in_is_refused(base: str) -> None:
    with pytest.raises(OutputError, match=r"the path r\{alpha\} has \{alpha\}, which merges fill in"):
        run_loop(choosing(base), "r{alpha}")
    assert not Path("r{alpha}").exists()
