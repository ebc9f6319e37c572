"""The Pareto front against its definition, and where results and their alphas are found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import random_state, write_model
from mergekit_imm import ArgumentError, CheckpointError
from mergekit_imm.evaluation import pareto_front
from mergekit_imm.evaluation.results import read_results, tradeoff

Points = list[tuple[float, float]]
few = st.integers(-2, 2).map(float)  # with equal points and equal coordinates
any_finite = st.floats(allow_nan=False, allow_infinity=False)
points = st.lists(st.tuples(few, few)) | st.lists(st.tuples(any_finite, any_finite))


def dominates(q: tuple[float, float], p: tuple[float, float]) -> bool:
    return q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1])


@given(points)
def test_the_front_is_what_no_other_point_dominates(found: Points) -> None:
    expected = [i for i, p in enumerate(found) if not any(dominates(q, p) for q in found)]
    assert pareto_front(found) == expected
    assert bool(expected) == bool(found)


@given(points, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(found: Points, random: object) -> None:
    mixed = list(found)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert sorted(mixed[i] for i in pareto_front(mixed)) == sorted(found[i] for i in pareto_front(found))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_cannot_be_compared_is_refused(wrong: float) -> None:
    with pytest.raises(ArgumentError, match="is not two finite numbers"):
        pareto_front([(1.0, 2.0), (wrong, 1.0)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(name: str, alpha: float | None = None, drop: float = 0.2) -> Path:
    """Make what this reads of a merged folder; its recipe is that of a merge."""
    place = Path(name)
    place.mkdir()
    if alpha is not None:
        from mergekit_imm.options.options import MergeOptions
        from mergekit_imm.options.recipe import make_recipe, to_json

        inputs: dict[str, dict[str, Any]] = {role: {"path": role, "files": {}} for role in ("base", "sft")}
        recipe = make_recipe(MergeOptions(alpha=alpha, drop=drop, iteration=0), inputs, {}, [])
        (place / "imm_recipe.json").write_bytes(to_json(recipe))
        (place / "README.md").touch()
    return place


def numbers(place: str | Path, inside: float, outside: float) -> None:
    Path(place).write_text(json.dumps({"math": {"acc": inside}, "loss": outside, "of": "x"}))


def test_numbers_are_found_in_the_folder_of_a_model_and_beside_it(folder: Path) -> None:
    numbers(model("out-0.7", 0.7) / "metrics.json", 1, 2)
    model("out-0.3", 0.3)
    numbers("out-0.3.json", 3, 4)
    numbers(model("base") / "metrics.json", 5, 6)
    numbers(model("out-0.5", 0.5) / "eval-1.json", 7, 8)
    numbers("elsewhere.json", 9, 10)
    expected = [("base", None), ("elsewhere", None), ("out-0.3", 0.3), ("out-0.5", 0.5), ("out-0.7", 0.7)]
    for places in (
        ["out-0.7", "base", "out-0.3", "out-0.5/eval-1.json", "elsewhere.json"],
        ["out-0.7/metrics.json", "base/", "out-0.3.json", "out-0.5/eval-1.json", "elsewhere.json"],
    ):
        found = read_results(places)
        assert [(each.name, each.alpha) for each in found] == expected
        assert [each.metrics["math.acc"] for each in found] == [5, 9, 3, 7, 1]


def test_several_drops_are_several_series(folder: Path) -> None:
    for alpha in (0.5, 0.3):
        for drop in (0.9, 0.2):
            numbers(model(f"out-{alpha}-{drop}", alpha, drop) / "metrics.json", 1, 2)
    found = read_results(sorted(map(str, Path().glob("out-*"))))
    assert [(each.series, each.alpha) for each in found] == [
        ("drop 0.2", 0.3), ("drop 0.2", 0.5), ("drop 0.9", 0.3), ("drop 0.9", 0.5),
    ]  # fmt: skip


def test_less_may_be_better(folder: Path) -> None:
    for name, inside, outside in (("a", 1, 5), ("b", 2, 6), ("c", 0, 4)):
        numbers(f"{name}.json", inside, outside)
    found = read_results(["a.json", "b.json", "c.json"])
    assert tradeoff(found, "math.acc", "loss").front == (1,)
    assert tradeoff(found, "math.acc", "-loss").front == (0, 1, 2)
    assert tradeoff(found, "-math.acc", "-loss").front == (2,)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "a.json is not JSON"),
        ("[1]", "a.json is not a JSON object with numbers in it"),
        ('{"x": "y"}', "a.json is not a JSON object with numbers in it"),
        ('{"format": "mergekit_imm loop", "version": 1}', "a.json is not a JSON object with numbers in it"),
        ('{"math": {"ac": 1}, "loss": 1}', "a.json has no number 'math.acc' of a; did you mean 'math.ac'?"),
        ('{"y": 1}', "a.json has no number 'math.acc' of a; it has y"),
        ('{"math": {"acc": NaN}, "loss": 1}', "a.json: 'math.acc' is nan, which cannot be compared"),
    ],
)
def test_what_is_no_result_is_refused(folder: Path, content: str, match: str) -> None:
    Path("a.json").write_text(content)
    with pytest.raises(CheckpointError) as refused:
        tradeoff(read_results(["a.json"]), "math.acc", "loss")
    assert match in str(refused.value)


def test_a_number_that_does_not_matter_may_be_anything(folder: Path) -> None:
    Path("a.json").write_text('{"math": {"acc": 1}, "loss": 1, "stderr": NaN}')
    assert tradeoff(read_results(["a.json"]), "math.acc", "loss").front == (0,)


def test_places_without_numbers_are_refused(folder: Path) -> None:
    model("out-0.3", 0.3)
    with pytest.raises(CheckpointError, match=r"out-0\.3 has no metrics\.json, and no out-0\.3\.json beside it; give"):
        read_results(["out-0.3"])
    with pytest.raises(CheckpointError, match=r"nowhere\.json cannot be read: No such file"):
        read_results(["nowhere.json"])


def test_numbers_that_came_along_with_a_merge_are_refused(folder: Path) -> None:
    """A merge copies what lies beside the weights, and numbers of the base are none of the merged model."""
    from mergekit_imm import merge_checkpoints

    for name in ("base", "sft"):
        write_model(Path(name), random_state({"w": (8, 8)}, seed=len(name)), config={"model_type": "tiny"})
    numbers("base/metrics.json", 1, 2)
    merge_checkpoints("base", "sft", "out-1.0", alpha=1.0)
    assert Path("out-1.0/metrics.json").exists()
    with pytest.raises(
        CheckpointError, match=r"out-1\.0/metrics\.json is a copy of base/metrics\.json, which the merge took"
    ):
        read_results(["out-1.0"])
    numbers("out-1.0/metrics.json", 1, 2)  # the same numbers, measured later
    later = Path("out-1.0/imm_recipe.json").stat().st_mtime + 1
    os.utime("out-1.0/metrics.json", (later, later))
    assert read_results(["out-1.0"])[0].alpha == 1.0
    numbers("out-1.0.json", 3, 4)
    assert read_results(["out-1.0"])[0].metrics["loss"] == 4


@pytest.mark.parametrize(("inside", "outside"), [("x", "-x"), ("-", "x"), ("x", "")])
def test_two_metrics_are_asked_for(inside: str, outside: str) -> None:
    with pytest.raises(ArgumentError, match="give two different metrics"):
        tradeoff([], inside, outside)
