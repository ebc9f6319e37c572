"""imm-analyze pareto, on a sweep and on a loop as their commands leave them; and what the picture shows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from commands import Command
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.pareto import pareto_command
from mergekit_imm.evaluation.results import Result, tradeoff
from mergekit_imm.views import pareto as view
from mergekit_imm.views.tables import saved

METRICS = ("--in", "new", "--out", "-loss")


@pytest.fixture
def swept(here: Path, merge: Command) -> None:
    """A sweep; alpha 0.3 is worse than 0.6 in both numbers."""
    assert merge("base", "sft", "-o", "out-{alpha}", "--alpha", "0.3,0.6,0.9").status == 0
    for alpha, new, loss in ((0.3, 5, 4), (0.6, 6, 3), (0.9, 2, 1)):
        Path(f"out-{alpha}/metrics.json").write_text(json.dumps({"new": new, "loss": loss}))
    Path("sft.json").write_text('{"new": 7, "loss": 5}')


def test_a_sweep_is_a_table_by_alpha(swept: None, command: Command) -> None:
    ended = command(pareto_command, "out-0.9/", "out-0.3/metrics.json", "out-0.6", "sft.json", *METRICS)
    assert ended.out.splitlines() == [
        "model    alpha  drop  new  loss",
        "sft                     7     5  front",
        "out-0.3    0.3   0.2    5     4",
        "out-0.6    0.6   0.2    6     3  front",
        "out-0.9    0.9   0.2    2     1  front",
    ]
    quiet = command(pareto_command, "out-0.9/", "out-0.3", "out-0.6", *METRICS, "-q")
    assert quiet.out.splitlines() == ["out-0.6  alpha 0.6", "out-0.9  alpha 0.9"]


def test_the_report_has_numbers_and_pictures(swept: None, command: Command) -> None:
    ended = command(pareto_command, "out-0.9", "out-0.3", "out-0.6", *METRICS, "-o", "report")
    assert ended.out.splitlines()[-1] == "written to report/pareto.json, report/pareto.png, report/pareto.svg"
    content = json.loads(Path("report/pareto.json").read_text())
    assert [(each["name"], each["alpha"], each["in"], each["out"], each["front"]) for each in content["results"]] == [
        ("out-0.3", 0.3, 5, 4, False), ("out-0.6", 0.6, 6, 3, True), ("out-0.9", 0.9, 2, 1, True),
    ]  # fmt: skip
    as_json = command(pareto_command, "out-0.9", "out-0.3", "out-0.6", *METRICS, "-o", "report", "--json")
    assert json.loads(as_json.out) == content
    first = Path("report/pareto.svg").read_bytes()
    command(pareto_command, "out-0.9", "out-0.3", "out-0.6", *METRICS, "-o", "report")
    assert Path("report/pareto.svg").read_bytes() == first
    Path("mine").mkdir()
    Path("mine/pareto.png").touch()
    refused = command(pareto_command, "out-0.9", *METRICS, "-o", "mine")
    assert refused.status == 1
    assert "mine/pareto.png exists and is not of this command" in refused.err


def test_a_loop_shows_every_model_that_it_measured(here: Path, command: Command) -> None:
    alpha = "$(sed -n 's/^ *\"alpha\": 0[.]\\([0-9]*\\),$/\\1/p' {model}/imm_recipe.json 2>/dev/null | head -n 1)"
    measure = f'a={alpha}; echo "{{\\"new\\": $((9 - ${{a:-0}})), \\"loss\\": $((5 - ${{a:-0}} / 2))}}" > {{json}}'
    for run in ("run", "two"):
        ended = command(
            loop_command, "base", "-o", run, "--rounds", 1, "--train", "cp -r sft {output}", "--evaluate", measure,
            "-q", "--alpha", "choose:0.2,0.5,0.8", "--metric", "new",
        )  # fmt: skip
        assert ended.status == 0, ended.err
    assert "round 0: the best alpha is the smallest of the list; one beyond it may be better" in ended.out
    for place in ("run", "run/loop.json"):
        shown = command(pareto_command, place, *METRICS)
        assert [line.split("  ")[0] for line in shown.out.splitlines()[1:]] == [
            "base", "SFT 0", "Merge 0", "Candidate 0", "Candidate 0",
        ]  # fmt: skip
    both = json.loads(command(pareto_command, "run", "two", *METRICS, "--json").out)["results"]
    assert [each["name"] for each in both if each["alpha"] == 0.2] == ["run: Merge 0", "two: Merge 0"]
    assert {each["series"] for each in both} == {"", "run: round 0", "two: round 0"}


def test_wrong_usage_and_refusals(swept: None, command: Command) -> None:
    assert command(pareto_command, "out-0.9", "--in", "new").status == 2
    assert command(pareto_command, *METRICS).status == 2
    wrong = command(pareto_command, "out-0.9", "--in", "nwe", "--out", "loss")
    assert wrong.status == 1
    assert "out-0.9/metrics.json has no number 'nwe' of out-0.9; did you mean 'new'?" in wrong.err
    recipe = command(pareto_command, "out-0.9/imm_recipe.json", *METRICS)
    assert (recipe.status, recipe.err) == (
        1,
        "error: out-0.9/imm_recipe.json is no evaluation; leave it out, or give the folder of the loop or model\n",
    )


def drawn(results: list[Result], monkeypatch: pytest.MonkeyPatch, outside: str = "-b") -> Any:
    """The axes of a picture."""
    figures: list[Any] = []

    def keep(figure: Any, name: str) -> dict[str, bytes]:
        figures.append(figure)
        return saved(figure, name)

    monkeypatch.setattr(view, "saved", keep)
    view.picture(tradeoff(results, "a", outside))
    (axes,) = figures[0].axes
    return axes


@pytest.mark.parametrize("seed", range(3))
def test_labels_cover_no_point_and_no_label(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    results = [
        Result(f"model-{n}", "", {"a": draw.random() ** 3, "b": draw.random()}, n / 40 if n % 5 else None, 0.2)
        for n in range(40)
    ]
    axes = drawn(results, monkeypatch)
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to their points
    assert len(boxes) > 10
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        places = axes.transData.transform([(each.metrics["a"], each.metrics["b"]) for each in results])
        assert not any(box.contains(*place) for place in places)
        assert axes.bbox.contains(*box.min)
        assert axes.bbox.contains(*box.max)


def test_better_is_to_the_right_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [Result(f"{a}", "", {"a": float(a), "b": float(b)}, a / 9, 0.2) for a, b in ((1, 2), (2, 3), (3, 3))]
    axes = drawn(results, monkeypatch)
    assert (axes.xaxis.get_inverted(), axes.yaxis.get_inverted()) == (False, True)
    assert axes.get_xlabel() == "a (more is better)"
    assert axes.get_ylabel() == "b (less is better)"
    (front,) = (line for line in axes.lines if line.get_label() == "front")
    assert [tuple(point) for point in front.get_xydata()] == [(1, 2), (3, 3)]


def test_names_start_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [Result("$\\frac", "", {"a": 1.0, "b": 2.0}), Result("$x$", "", {"a": 2.0, "b": 2.0})]
    axes = drawn(results, monkeypatch, "b")
    assert len(axes.texts) == 2
