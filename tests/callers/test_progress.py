"""Progress of functions called from Python: shown where a person watches, silent elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_state, write_model
from commands import seen_on_a_terminal
from mergekit_imm import ArgumentError, audit, merge_checkpoints, merge_into, verify
from mergekit_imm.analysis.change import checkpoint_change
from mergekit_imm.common import progress as module
from mergekit_imm.common.progress import watched
from modules import Model

MERGE = "from mergekit_imm import merge_checkpoints\nmerge_checkpoints('base', 'sft', 'out', drop=0, overwrite=True{})"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    state = random_state({f"model.layers.{n}.w": (64, 64) for n in range(4)})
    write_model(folder / "base", state)
    write_model(folder / "sft", {name: tensor + 0.01 for name, tensor in state.items()})
    return folder


def environment(**added: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in module._UNWATCHED} | added


def on_a_terminal(code: str, cwd: Path, **added: str) -> tuple[str, int]:
    """Return what Python code prints on a terminal, and its status."""
    return seen_on_a_terminal([code], cwd, env=environment(TERM="xterm", **added))


def test_a_terminal_shows_a_bar_that_leaves_the_cursor(models: Path) -> None:
    printed, status = on_a_terminal(MERGE.format(""), models)
    assert status == 0
    assert "merging" in printed
    assert "100%" in printed
    assert printed.rindex(SHOWN) > max(printed.rindex("100%"), printed.rindex(HIDDEN))
    assert printed.endswith("\n")


@pytest.mark.parametrize(
    ("option", "added"),
    [
        (", progress=False", {}),
        (", progress=lambda done, total: None", {}),
        ("", {"CI": "true"}),
        ("", {"PYTEST_CURRENT_TEST": "t"}),
        ("", {"TERM": "dumb"}),
        (", dry_run=True", {}),
    ],
)
def test_a_terminal_shows_nothing_if_asked_or_unwatched(models: Path, option: str, added: dict[str, str]) -> None:
    code = f"import os; os.environ.update({added})\n" + MERGE.format(option)
    assert on_a_terminal(code, models) == ("", 0)


def test_pipes_get_nothing(models: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", MERGE.format("")], cwd=models, env=environment(), capture_output=True, check=True
    )
    assert (ran.stdout, ran.stderr) == (b"", b"")


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError"])
def test_a_bar_that_is_cut_off_leaves_the_cursor_and_a_new_line(models: Path, error: str) -> None:
    code = (
        "from mergekit_imm.common.progress import watched\ntry:\n  with watched(None, 'merging') as update:\n"
        f"    update(1, 10); update(2, 10); raise {error}\nexcept {error}:\n  print('after')"
    )
    printed, status = on_a_terminal(code, models)
    assert status == 0
    assert printed.endswith(f"{SHOWN}\r\nafter\r\n")


def test_a_function_is_called_up_to_the_end(models: Path) -> None:
    base, sft, out = models / "base", models / "sft", models / "called"
    model = Model(random_state({f"model.layers.{n}.w": (64, 64) for n in range(4)}))
    calls: dict[str, list[tuple[int, int]]] = {}

    def seen(name: str) -> Any:
        return lambda done, total: calls.setdefault(name, []).append((done, total))

    merge_checkpoints(base, sft, out, drop=0, progress=seen("merge"))
    verify(out, progress=seen("verify"))
    audit(out, base, sft, alpha=0.5, progress=seen("audit"))
    checkpoint_change(base, sft, progress=seen("change"))
    merge_into(model, base, drop=0, progress=seen("merge_into"))
    assert len(calls) == 5
    for name, each in calls.items():
        assert each == sorted(each)
        done, total = each[-1]
        assert done > 0.9 * total if name == "verify" else done == total  # headers count in the total alone
        assert len({total for _, total in each}) == 1


@pytest.mark.parametrize("wrong", [True, 1, "yes"])
def test_anything_else_is_refused_before_anything_is_done(models: Path, wrong: Any) -> None:
    base, sft, out = models / "base", models / "sft", models / f"refused{wrong}"
    for call in (
        lambda: merge_checkpoints(base, sft, out, progress=wrong),
        lambda: audit(base, base, sft, progress=wrong),
        lambda: checkpoint_change(base, "nothing", progress=wrong),
    ):
        with pytest.raises(ArgumentError, match=r"progress is .*; give a function of \(done, in all\), False for"):
            call()
    assert not out.exists()


class Handle:
    """Stands for the handle that IPython.display.display returns."""

    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def update(self, html: str) -> None:
        self.shown.append(html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this process pass for the kernel of a notebook; return what it shows."""
    shown: list[str] = []

    def display(html: str, *, display_id: bool) -> Handle:
        assert display_id
        shown.append(html)
        return Handle(shown)

    ipython, of_display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    of_display.HTML, of_display.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", of_display)
    monkeypatch.setattr(module, "_UNWATCHED", ())
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return shown


def interrupted() -> None:
    with watched(None, "x") as update:
        assert update is not None
        update(1, 10)
        raise KeyboardInterrupt


def test_a_notebook_shows_a_bar_and_takes_it_away(notebook: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with watched(None, "<b>", rate=str) as update:
        assert update is not None
        update(0, 10)
        update(5, 10)
    assert ['value="0"' in notebook[0], 'value="5" max="10"' in notebook[1], "50 %" in notebook[1]] == [True] * 3
    assert "&lt;b&gt;" in notebook[0]
    assert notebook[2:] == [""]
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert notebook[-1] == ""


def test_a_notebook_shows_nothing_of_what_ends_at_once(notebook: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    with watched(None, "x") as update:
        assert update is not None
        update(1, 1)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with watched(None, "x", here=False) as update:  # another rank
        assert update is None
    assert notebook == []
