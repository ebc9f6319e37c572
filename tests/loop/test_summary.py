"""The table and the plots of the metrics."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest

from loops import EVALUATE, asked
from mergekit_imm.loop.run import run_loop
from mergekit_imm.views.loop_summary import plot, table


def test_the_table_and_the_pictures_show_what_was_measured(base: str) -> None:
    state = run_loop(asked(base, evaluate=EVALUATE, baseline=True), "run")
    lines = table(state).splitlines()
    assert lines[0].split() == ["model", "alpha", "distance", "nested.left"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "base",
        *(f"{what} {n}" for n in (0, 1, 2) for what in ("SFT", "Merge", "SFT without merges")),
    ]
    assert lines[2].split() == ["SFT", "0", "0.01", "0.99"]
    paths = plot(state, Path("run"))
    assert paths == [Path("run/metrics.png"), Path("run/metrics.svg")]
    first = [path.read_bytes() for path in paths]
    plot(state, Path("run"))
    assert [path.read_bytes() for path in paths] == first
    assert first[0].startswith(b"\x89PNG")
    assert first[1].decode().count("<!-- nested.left -->") == 1  # the title of its panel
    assert plot(run_loop(asked(base), "other"), Path("other")) == []


def test_of_many_numbers_the_first_are_drawn(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_imm.views.loop_summary.PANELS", 2)
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
    assert table(state).splitlines()[-1].split() == ["Merge", "0", "0.5", "7", "3", "0.1", "1"]
    assert len(plot(state, Path("run"))) == 2
