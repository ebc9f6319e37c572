"""`imm-analyze change`: output, files, refusals; its page is self-contained and escapes names."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from checkpoints import random_state, write_model
from mergekit_imm import merge_checkpoints, weight_change
from mergekit_imm.analysis.change import WeightChange
from mergekit_imm.analysis.verdict import ModelChange, mismatch
from mergekit_imm.cli.change import change_command
from mergekit_imm.errors import MergeError
from mergekit_imm.views.change_figure import pictures_of, svgs_of
from mergekit_imm.views.change_page import answer, described, html_page, inline_svg
from mergekit_imm.views.change_terminal import render

N = 7
SHAPES: dict[str, tuple[int, ...]] = {
    f"model.layers.{i}.mlp.{kind}.weight": (8, 8) for i in range(N) for kind in ("up_proj", "down_proj")
}
SHAPES |= {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}
FILES = {"change.json", "change.png", "change.svg", "mismatch.png", "mismatch.svg", "report.html"}
HOSTILE = '"><script>alert(1)</script>\n$x_{1}$\x1b[31m_'
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collect what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    assert not reader.tags & {"script", "link", "iframe", "object"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert "@import" not in page
    assert "url(http" not in page
    return reader


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base, sft = random_state(SHAPES), random_state(SHAPES, seed=1)
    for i in range(N):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        sft[name] = base[name] + (i + 1) * torch.full_like(base[name], 0.5)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "sft", sft)
    content = {"data": "of a kind", "sequences": 40, "layers": {f"model.layers.{i}": float(N - i) for i in range(N)}}
    (tmp_path / "importance.json").write_text(json.dumps(content))
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(change_command, arguments, catch_exceptions=False, standalone_mode=False)


def test_all_is_written_and_is_the_same_each_time(folder: Path) -> None:
    given = ("base", "sft", "--importance", "importance.json", "-o", "out")
    result = call(*given)
    assert "Looks superficial: the change is where importance is low" in result.stdout
    assert "model.layers.6" in result.stdout
    first = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert set(first) == FILES
    call(*given, "-q")
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == first
    assert first["change.png"].startswith(b"\x89PNG")
    page = first["report.html"].decode()
    assert "svg" in check_page(page).tags
    assert "of a kind" in page
    content = json.loads(first["change.json"])
    assert content["importance"]["data"] == "of a kind"
    assert content["importance"]["sequences"] == 40  # as in the file, a number
    assert content["changes"][0]["mismatch"]["rho"]["value"] == -1.0


def test_json_is_what_is_measured(folder: Path) -> None:
    result = call("base", "sft", "base", "--json", "-q")
    content = json.loads(result.stdout)
    base, sft = random_state(SHAPES), random_state(SHAPES, seed=1)
    name = "model.layers.3.mlp.down_proj.weight"
    expected = weight_change({name: base[name]}, {name: sft[name]}).layers["model.layers.3"]
    first, second = content["changes"]
    assert first["kinds"]["model.layers.3"]["down_proj"] == pytest.approx(expected, rel=1e-6)
    assert set(second["layers"].values()) == {0.0}
    assert set(second["share"].values()) == {None}
    assert content["importance"] is None


def test_a_merged_folder_alone_is_read(folder: Path) -> None:
    merge_checkpoints("base", "sft", "merged")
    one, two = (json.loads(call(*args, "--json", "-q").stdout) for args in (["merged"], ["base", "sft"]))
    assert one["changes"][0]["layers"] == two["changes"][0]["layers"]
    assert one["base"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "holds no merge with imm_report.json"),
        (["gone"], "gone does not exist; give BASE and SFT"),
        (["base", "--take", "x"], "apply to two models"),
        (["base", "gone"], "gone"),
        (["base", "sft", "-o", "sft"], "is the folder of a measured model"),
        (["base", "sft", "-o", "importance.json"], "is not a folder; give another"),
        (["base", "sft", "--importance", "none.json"], "importance file none.json cannot be read"),
        (["base", "sft", "--importance", "short.json"], "for 1 of 7: missing"),
    ],
)
def test_refusals_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "short.json").write_text('{"0": 1.0}')
    with pytest.raises((MergeError, click.UsageError), match=message) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_a_sparsifier_other_than_dare_is_refused(folder: Path) -> None:
    merge_checkpoints("base", "sft", "merged", sparsify="della")
    with pytest.raises(MergeError, match=r"sparsify della:0\.1, so its report covers only kept elements; measure it"):
        call("merged")


def test_a_folder_of_others_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "report.html").write_text("mine")
    with pytest.raises(MergeError, match=r"out/report.html exists and is not of this command"):
        call("base", "sft", "-o", "out")
    assert (folder / "out" / "report.html").read_text() == "mine"


def test_pictures_that_are_not_made_again_go(folder: Path) -> None:
    call("base", "sft", "--importance", "importance.json", "-o", "out", "-q")
    call("base", "sft", "-o", "out", "-q")
    assert {path.name for path in (folder / "out").iterdir()} == {name for name in FILES if "mismatch" not in name}


def test_tensors_that_one_model_has_alone_can_be_left_out(folder: Path) -> None:
    more = {**random_state(SHAPES), "model.extra.weight": torch.ones(3, dtype=torch.bfloat16)}
    write_model(folder / "more", more)
    with pytest.raises(MergeError, match=r"take=.r.\^model"):
        call("base", "more")
    result = call("base", "more", "--take", "extra", "--json", "-q")
    assert set(json.loads(result.stdout)["changes"][0]["layers"].values()) == {0.0}
    call("more", "base", "--keep", "extra", "-q")


def test_kinds_of_modules_have_all_three_numbers(folder: Path) -> None:
    found = json.loads(call("base", "sft", "--json", "-q").stdout)["changes"][0]
    base, sft = random_state(SHAPES), random_state(SHAPES, seed=1)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(N)]
    for i, name in enumerate(names):
        sft[name] = base[name] + (i + 1) * torch.full_like(base[name], 0.5)
    norm = sum(float((sft[name].double() - base[name].double()).norm()) for name in names)
    module = found["modules"]["up_proj"]
    assert module["change"] == pytest.approx(norm, rel=1e-5)
    assert module["relative"] == pytest.approx(norm / sum(float(base[n].double().norm()) for n in names), rel=1e-5)
    assert module["share"] == pytest.approx(norm / sum(found["layers"].values()), rel=1e-5)
    assert sum(each["share"] for each in found["modules"].values()) == pytest.approx(1)


def test_hostile_names_are_text() -> None:
    keys = [f"a<b>&.{i}" for i in range(80)]
    change = WeightChange(
        {key: 1.0 + i for i, key in enumerate(keys)},
        dict.fromkeys(keys, 1.0),
        {key: {HOSTILE: 1.0} for key in keys},
        {HOSTILE: 1.0},
        (f"note: {HOSTILE}",),
    )
    importance = {key: 80.0 - i for i, key in enumerate(keys)}
    found = [
        ModelChange(HOSTILE, change, mismatch(importance, change)),
        ModelChange("_", change, mismatch(importance, change)),
    ]
    page = html_page(found, importance, {HOSTILE: HOSTILE}, *svgs_of(found, importance))
    assert page.count("<svg") == 3 + 2 * 2
    check_page(page)
    assert "\x1b" not in page
    terminal = render(found, importance)
    assert "\x1b" not in terminal
    assert max(map(len, terminal.splitlines()[:85])) <= 120
    with pytest.raises(AssertionError):
        check_page(page.replace("&lt;script", "<script"))


def test_inline_svg_has_no_prologue() -> None:
    svg = b'<?xml version="1.0"?><!DOCTYPE svg><svg><metadata>http://x\n</metadata><g/></svg>'
    assert inline_svg(svg) == "<svg><g/></svg>"


def changed(values: list[float], label: str = "m", importance: list[float] | None = None) -> ModelChange:
    keys = [f"h.{n}" for n in range(len(values))]
    change = WeightChange(
        dict(zip(keys, values, strict=True)), dict.fromkeys(keys, 10.0), {key: {"up": 1.0} for key in keys}, {}
    )
    weights = None if importance is None else dict(zip(keys, importance, strict=True))
    return ModelChange(label, change, None if weights is None else mismatch(weights, change))


def test_the_page_begins_with_the_answer_and_its_numbers() -> None:
    up, down = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    low = answer([changed(up, importance=down)])
    assert low.startswith("Looks superficial: the change is where importance is low (rho -1.00 [-1.00, -1.00] over 8 ")
    # 8 layers: thirds of 2, 3 and 3; the middle ones hold 6 + 5 + 4 of 36, of either
    assert low.endswith("The early third of the layers has 41.7% of the importance and 8.33% of the change.")
    several = answer([changed(up, importance=down), changed(down, importance=down), changed(up, importance=down)])
    assert several == (
        "Of 3 models, 2 look superficial, 1 does not look superficial. Rho, the rank correlation of importance and"
        " change over 8 layers, is -1.00 to +1.00."
    )
    assert answer([changed(up)]) == (
        "The weights of the layers moved by 45.0% of their norms, most in h.7: 22.2% of all change. Whether they moved"
        " where it matters needs --importance FILE."
    )
    assert "by 10.1% of their norms, all alike. Whether" in answer([changed([1.0, 1.01, 1.02, 1.0])])
    assert "by 12.5% to 45.0% of their norms. Whether" in answer([changed(up), changed([1.0] * 7 + [3.0])])
    assert answer([changed([0.0, 0.0])]) == "No weight matrix of a layer changed."


def test_fewer_layers_than_the_rule_asks_show_no_correlation() -> None:
    found, importance = [changed([1.0, 2.0, 3.0], importance=[3.0, 2.0, 1.0])], {f"h.{n}": 3.0 - n for n in range(3)}
    assert answer(found) == "Undecided: 3 layers are too few (at least 6)."
    shared, own = svgs_of(found, importance)
    assert (len(shared), len(own[0])) == (3, 1)
    assert set(pictures_of(found, importance)) == {"change.png", "change.svg"}
    page = html_page(found * 2, importance, {}, shared, own)
    assert "rho -1" not in page
    assert "-1.00" not in page


def test_an_importance_file_is_told_in_words() -> None:
    about = {
        "format": "f",
        "version": 1,
        "model": {"path": "a<b", "files": [1], "form": "x"},
        "tokens": 12,
        "modules": {},
    }
    assert described(about) == {"importance: model": "path a<b, form x", "importance: tokens": "12"}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_no_table_grows_with_the_number_of_models(count: int) -> None:
    page = html_page([changed([1.0] * 8, f"model {n}", [1.0] * 8) for n in range(count)], None, {})
    rows = [row.count("<td") for row in page.split("<tr>")]
    assert max(rows) <= 5
    assert page.count("<details>") == (0 if count == 1 else count)
