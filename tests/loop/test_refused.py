"""What would fail after hours of training is refused before anything runs."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loops import EVALUATE, TRAIN, asked
from mergekit_imm import ArgumentError, MergeError
from mergekit_imm.loop.commands import check_placeholders
from mergekit_imm.loop.run import run_loop
from mergekit_imm.loop.state import begin_or_resume, from_dict, to_dict

NAMES = ["model", "output", "round", "base"]
EVERY = [*NAMES, "data", "json"]


def refused(template: str) -> str:
    try:
        check_placeholders("the train command", template, NAMES, EVERY)
    except ArgumentError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("template", "wrong", "near"),
    [
        ("train {modle}", "{modle}", "{model}"),
        ("train {MODEL}", "{MODEL}", "{model}"),
        ("train --to={outputs}", "{outputs}", "{output}"),
        ("train {bsae}", "{bsae}", "{base}"),
        ("train {iteration}", "{iteration}", None),
        ("train {data}", "{data}", None),  # a placeholder of another command
        ("train '{data}'", "{data}", None),
        ("sh -c 'train {modle}'", "{modle}", "{model}"),
        ('sh -c "train {ruond}"', "{ruond}", "{round}"),
        ("train $x{modle} ${modle}", "{modle}", "{model}"),
        ("# {modle}", "{modle}", "{model}"),
    ],
)
def test_a_word_that_may_be_meant_as_a_placeholder_is_refused(template: str, wrong: str, near: str | None) -> None:
    message = refused(template)
    assert message.startswith(
        f"the train command has {wrong}, which is not one of its placeholders {{model}} {{output}}"
    )
    assert (f"did you mean {near}?" in message) == (near is not None)


@pytest.mark.parametrize(
    "template",
    [
        "train {model} '{x: 1}' {a,b} {a..z} {1} {} ${modle} ${modle:-x} \\{modle}",
        "awk '{print}' {model} | awk '{print $1}' | jq '{name}' | sed 's/a{2}/b/'",
        "python -c 'print(f\"{date} {len(x)} {x!r} {x.y} {case}\")' {output}",
        "curl -w %{http_code} && git log HEAD@{upstream} && find {base} -exec ls {} \\;",
        "f() { echo; }; f {round}",
    ],
)
def test_other_braces_stay(template: str) -> None:
    assert refused(template) == ""


@pytest.mark.parametrize(
    "template", ["printf %s {modle}", "printf %s '{modle}'", 'printf %s "{modle}"', "printf %s {item}"]
)
def test_a_word_that_is_meant_as_it_stands_can_be_written_as_is_said(template: str) -> None:
    message = refused(template)
    word = message.split(" has ")[1].split(",")[0]
    cure = message.rpartition(" write ")[2]
    cured = template.replace(word, cure)
    assert refused(cured) == ""
    said = subprocess.run(["/bin/sh", "-c", cured], capture_output=True, text=True, check=True).stdout
    assert said == word


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train": f"{TRAIN} {{modle}}"}, r"the train command has \{modle\}"),
        ({"generate": "make {output} {data}"}, r"the generate command has \{data\}"),
        ({"evaluate": f"{EVALUATE} {{output}}"}, r"the evaluate command has \{output\}"),
        ({"keep": ("typo",)}, r'"typo"\] matches none of the 3 tensor names'),
        ({"no_drop": ("typo",)}, r'"typo"\] matches none of the 3 tensor names'),
        ({"rename": ("^model.=modle.",)}, "makes names with 'modle.', and no tensor of base base has such a name"),
        ({"importance": "nowhere.json"}, "importance file nowhere.json cannot be read"),
        ({"layer_factors": "nowhere.json"}, "layer factors file nowhere.json cannot be read"),
        ({"layer_factors": "layers.json"}, "no tensor of the model lies in layer 'model.layers.9'"),
        ({"shrink": 0.5}, "shrink and clip change the factors of importance, and none is given"),
    ],
)
def test_nothing_runs_and_nothing_is_written(base: str, changes: dict[str, Any], match: str) -> None:
    Path("layers.json").write_text('{"model.layers.9": 1.0}')
    before = sorted(Path().rglob("*"))
    wanted = replace(asked(base), train=f"touch ran; {TRAIN}")
    with pytest.raises(MergeError, match=match):
        run_loop(from_dict({**to_dict(wanted), **changes}), "run")
    assert sorted(Path().rglob("*")) == before


def test_a_loop_that_an_earlier_version_began_goes_on_with_its_commands(base: str) -> None:
    """That version did not check placeholders."""
    wanted = asked(base, rounds=1, train=f"{TRAIN} && echo {{item}}")
    Path("run").mkdir()
    begin_or_resume(Path("run"), wanted)
    assert run_loop(wanted, "run").model == "run/round-0/merged"
    with pytest.raises(ArgumentError, match=r"has \{item\}"):
        run_loop(wanted, "other")


def test_a_name_in_quotes_is_a_name_of_the_shell_s(base: str) -> None:
    wanted = asked(base, rounds=1, train=f"{TRAIN} && printf %s {shlex.quote('{item}')} > said")
    run_loop(wanted, "run")
    assert Path("said").read_text() == "{item}"
