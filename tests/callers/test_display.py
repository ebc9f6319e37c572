"""What a session prints of a result, and what a notebook shows."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_state, write_model
from import_graph import modules
from mergekit_imm import audit, merge_checkpoints, verify, weight_change
from mergekit_imm.analysis import Divergence, mismatch
from mergekit_imm.analysis.measured import Measured
from mergekit_imm.analysis.measured_kl import MeasuredKL
from mergekit_imm.analysis.verdict import ModelChange
from mergekit_imm.common.display import ROWS, Displayed, Summary, bars, points
from mergekit_imm.evaluation import Calibration, Interval, Model, Problem, Response, compare
from mergekit_imm.evaluation.calibration import Bin
from mergekit_imm.evaluation.results import Result, tradeoff
from mergekit_imm.live import LiveReport
from mergekit_imm.loop.state import Settings, State
from mergekit_imm.options.layer_factors import Importance
from mergekit_imm.plan.describe import CheckReport, check
from mergekit_imm.synthesis import Consensus, Crescent, Kept, Pair, Sample, deduplicate

EVIL = "</td><script>alert(1)</script>&\x1b[31m\n<b>"
VOID = {"br", "meta"}


class Checker(HTMLParser):
    """Collects tags and texts; fails for tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def samples(name: str, right: int) -> Model:
    problems = {}
    for number in range(12):
        texts = tuple(Response(f"{EVIL} {n} " * 40, n < right) for n in range(4))
        problems[f"{EVIL}{number}"] = Problem(f"{EVIL}{number}", 1, False, texts, texts[0])
    return Model(name, problems)


def results(folder: Path) -> list[Any]:
    """Return one result of each class, with names that would break a page, or fill it."""
    layers = {f"model.layers.{n}.w": (8, 8) for n in range(8)}
    state = random_state({**layers, "model.embed.weight": (8, 8)})
    base = write_model(folder / "base", state)
    sft = write_model(folder / "sft<b>&", {name: tensor + 0.01 for name, tensor in state.items()})
    out = folder / "out<script>"
    report = merge_checkpoints(base, sft, out, alpha=0.5, drop=0.5)
    change = weight_change({f"h.{n}.up.weight": state[name] + n for n, name in enumerate(layers)},
                           {f"h.{n}.up.weight": state[name] for n, name in enumerate(layers)})  # fmt: skip
    importance = {f"h.{n}": float(n + 1) for n in range(8)}
    measured = Importance(importance, {EVIL: 0.5, "norms": 0.0}, {}, (EVIL,), "first", 4, 100, 2.5)
    found = mismatch(importance, change)
    kl = Divergence(Interval(0.1, 0.05, 0.2, 500), (1.0,) * 500, (10,) * 500)
    compared = compare([samples(EVIL, 2), samples(f"{EVIL}2", 3)])
    merges = [Result(f"{EVIL}{n}", "place", {"a<b": n / 9, "b": 1 - n / 9}, n / 10) for n in range(10)]
    questions = [f"{EVIL} {n} + {n}?" for n in range(300)]
    deduplicated = deduplicate(questions, lambda texts: [[1.0, 0.0]] * len(texts))
    kept = Kept((Sample(EVIL, EVIL, "1"),) * 500, 1, 2, 3, 9, (EVIL,) * 5)
    loop = State(
        Settings("base", rounds=2, train="t {output} {model}"),
        EVIL,
        ("0/train",) * 90,
        {EVIL: {EVIL: 0.5}},
        {"0": 0.5},
        EVIL,
    )
    made = Crescent(
        (Pair(EVIL, EVIL),) * 400, deduplicated, (Consensus(EVIL, 3, 4, (EVIL,) * 3),) * 400, {"asked": 900}
    )
    return [
        report,
        dataclasses.replace(report, status="dry run", notes=[EVIL] * 40, refused=EVIL),
        verify(out),
        audit(out, base, sft, alpha=0.5),
        check(base, sft),
        CheckReport(EVIL, EVIL, notes=[EVIL] * 9, problems=[EVIL] * 9),
        LiveReport({"merged": 3, "kept": 0}, 2, [EVIL] * 9),
        change,
        found,
        ModelChange(EVIL, change, found),
        measured,
        Measured(measured, {"layers": importance}, (EVIL,)),
        kl,
        MeasuredKL({EVIL: kl}, {}, (EVIL,)),
        compared,
        compared.comparisons[0],
        compared.comparisons[0].verdict,
        compared.comparisons[0].gained,
        Calibration(Interval(0.1, 0.05, 0.2, 500), (Bin(3, 0.5, 0.25),) * 15, "greedy", 0.02),
        samples(EVIL, 1),
        next(iter(samples(EVIL, 1).problems.values())),
        tradeoff(merges, "a<b", "-b"),
        kept,
        deduplicated,
        Consensus(EVIL, 300, 400, (EVIL * 30,) * 300),
        made,
        loop,
    ]


@pytest.fixture(scope="module")
def shown_results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results(tmp_path_factory.mktemp("display"))


def displayed() -> set[str]:
    return {name for path in modules().values() for name in re.findall(r"class (\w+)\(Displayed\)", path.read_text())}


def test_every_class_is_seen_here_and_has_no_repr_of_a_dataclass(shown_results: list[Any]) -> None:
    assert displayed() == {type(each).__name__ for each in shown_results}
    assert not [each for each in shown_results if "__repr__" in vars(type(each))]


def test_a_repr_is_a_few_lines_without_control_characters(shown_results: list[Any]) -> None:
    for each in shown_results:
        lines = repr(each).split("\n")
        assert len(lines) <= 5, each
        assert len(repr(each)) <= 1600
        assert all(line.isprintable() for line in lines), lines
        assert lines[0].startswith(type(each).__name__)


def test_html_is_well_formed_without_scripts_and_fetches_nothing(shown_results: list[Any]) -> None:
    for each in shown_results:
        page = Checker(each._repr_html_())
        assert set(page.tags) <= set("div b table tr th td svg text rect circle title".split()), each
        assert not [name for name, value in page.attributes if name.startswith("on") or "url(" in value]
        assert not {"href", "src"} & {name for name, _ in page.attributes}
        assert page.tags.count("tr") <= ROWS + 2
        assert "\x1b" not in page.text


def test_colours_are_those_of_the_page(shown_results: list[Any]) -> None:
    for each in shown_results:
        html = each._repr_html_()
        assert "#" not in html.replace("&#", "")
        assert "background" not in html


def test_a_merge_shows_its_layers_until_the_folder_holds_another_merge(tmp_path: Path) -> None:
    state = random_state({f"model.layers.{n}.w": (8, 8) for n in range(3)})
    base, sft = write_model(tmp_path / "base", state), tmp_path / "sft"
    write_model(sft, {name: tensor * (1 + 0.1 * n) for n, (name, tensor) in enumerate(state.items())})
    out = tmp_path / "out"
    report = merge_checkpoints(base, sft, out, alpha=0.5, drop=0.0)
    again = merge_checkpoints(base, sft, out, alpha=0.5, drop=0.0)
    for each in (report, again):
        (picture,) = ET.fromstring(each._repr_html_()).iter("svg")
        said = [text.text for text in picture.iter("title")]
        # sft = (1 + 0.1 n) base, so merged - base is 0.05 n of the base, in %, but for the roundings of bfloat16
        assert [float(str(text).split(": ")[1]) for text in said] == pytest.approx([0, 5, 10], abs=0.2)
    merge_checkpoints(base, sft, out, alpha=0.25, drop=0.0, overwrite=True)
    assert "<svg" not in report._repr_html_()
    (out / "imm_report.json").write_text(json.dumps({"layers": []}))
    assert "<svg" not in merge_checkpoints(base, sft, tmp_path / "x", dry_run=True)._repr_html_()
    assert "merged into" in repr(report)


def test_equality_hash_and_plain_data_do_not_depend_on_the_repr(shown_results: list[Any]) -> None:
    report = shown_results[0]
    same = dataclasses.replace(report)
    assert same == report
    assert dataclasses.asdict(same) == dataclasses.asdict(report) == report.to_dict()
    assert set(report.to_dict()) == {each.name for each in dataclasses.fields(report)}
    assert dataclasses.replace(report, out="x") != report


def test_pictures_hold_what_is_not_finite_and_nothing() -> None:
    assert ET.fromstring(bars({"h.0": float("nan"), "h.1": 0.0}, "a < b")).tag == "svg"
    assert ET.fromstring(points([(1.0, 1.0), (1.0, 1.0)], ["<", "&"], [0], "x")).tag == "svg"


def test_long_lists_are_cut_and_say_so() -> None:
    class Long(Displayed):
        def _summary(self) -> Summary:
            return Summary("x" * 999, ["y"] * 9, ("a", "b"), [["1", "2"]] * 99)

    assert repr(Long()).endswith("… and 6 more")
    assert f"… and {99 - ROWS} more" in Checker(Long()._repr_html_()).text
