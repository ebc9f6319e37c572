"""The project as a whole: import direction, light imports, examples and docs that run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

import mergekit_imm
from checkpoints import random_state, write_model
from import_graph import ROWS, import_graph, imports_of, modules, room, wrong_way
from mergekit_imm.cli.analyze import analyze_command
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command

ROOT = Path(__file__).parents[2]


def test_imports_go_one_way() -> None:
    assert {room(name) for name in modules()} - {""} == set(ROWS), "every package has its place in ROWS"
    assert not wrong_way(import_graph())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("def f():\n    from ..engine.merge import merge_checkpoints", {"engine.merge"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine import merge", {"engine.merge"}),
        ("from . import mask", {"numerics.mask"}),
        ("from .. import engine, __version__", {"engine", ""}),
        ("from ..engine import nothing", {"engine"}),
        ("from mergekit_imm.engine.merge import merge_checkpoints", {"engine.merge"}),
        ("from mergekit_imm import merge_checkpoints", {""}),
        ("import mergekit_imm.engine.merge", {"engine.merge"}),
        ("import os, mergekit_imm as imm", {""}),
        ("import mergekit_imm_other", set()),
        ("import importlib\nimportlib.import_module('mergekit_imm.engine.merge')", {"a string"}),
        ("__import__('mergekit_imm')", {"a string"}),
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, line: str, expected: set[str]) -> None:
    for path in ("__init__", "engine/__init__", "engine/merge", "numerics/__init__", "numerics/mask", "numerics/probe"):
        file = (tmp_path / path).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(line if path == "numerics/probe" else "")
    found = imports_of("numerics.probe", modules(tmp_path))
    assert found == expected
    assert bool(wrong_way({"numerics.probe": found})) == bool(expected - {"numerics.mask"})


def test_circles_are_seen_within_a_package_and_without() -> None:
    assert wrong_way({"plan.a": {"plan.b"}, "plan.b": {"plan.a"}})
    assert wrong_way({"plan": {"plan.a"}, "plan.a": {"plan"}})  # a package that imports from itself
    assert wrong_way({"errors": {"common.messages"}, "common.messages": {"errors"}})
    assert not wrong_way({"engine.merge": {"numerics.mask", "errors"}, "errors": {"common.messages"}, "": {"engine"}})


HELP = "c(['--help'], standalone_mode=False)"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mergekit_imm", "torch numba numpy transformers click huggingface_hub safetensors"),
        (
            "import mergekit_imm.evaluation, mergekit_imm.loop, mergekit_imm.functional",
            "torch numba numpy transformers",
        ),
        ("import mergekit_imm.synthesis, mergekit_imm.analysis, mergekit_imm.live", "torch numba numpy transformers"),
        ("from mergekit_imm.synthesis import keep_correct", "torch numba transformers"),
        ("import mergekit_imm.cli.main", "torch numba numpy transformers huggingface_hub safetensors"),
        ("import mergekit_imm.cli.samples", "torch numba numpy transformers matplotlib"),
        (f"from mergekit_imm.cli.change import change_command as c\n{HELP}", "torch numba numpy matplotlib"),
        (f"from mergekit_imm.cli.importance import importance_command as c\n{HELP}", "torch numba numpy transformers"),
        ("from mergekit_imm import merge_checkpoints", "torch numba transformers huggingface_hub"),
        ("from mergekit_imm import dare_merge", "numba transformers huggingface_hub safetensors"),
    ],
)
def test_imports_are_light(code: str, absent: str) -> None:
    check = f"{code}\nimport sys\nfound = [m for m in {absent.split()!r} if m in sys.modules]\nassert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_files_stay_small_enough_to_read() -> None:
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 600}
    assert not long


@pytest.mark.parametrize("name", sorted(set(modules()) - {""}))
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "__main__":
        return
    monkeypatch.chdir(tmp_path)
    state = random_state({"model.layers.0.w": (8, 8)})
    folders = {
        "base_folder": write_model(tmp_path / "base", state),
        "sft_folder": write_model(tmp_path / "sft", {n: t + 0.01 for n, t in state.items()}),
        "out_folder": tmp_path / "out",
    }
    if name == "engine.verify":
        mergekit_imm.merge_checkpoints(folders["base_folder"], folders["sft_folder"], folders["out_folder"])
    module = importlib.import_module(f"mergekit_imm.{name}")
    result = doctest.testmod(module, extraglobs={**folders, "torch": torch}, verbose=False)
    assert result.failed == 0


def options() -> list[tuple[str, str]]:
    commands: dict[str, click.Command] = {"merge": merge_command, "verify": verify_command, "loop": loop_command}
    commands |= {f"analyze {name}": command for name, command in analyze_command.commands.items()}
    return [(name, o) for name, c in commands.items() for p in c.params for o in p.opts if o.startswith("-")]


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    shown = dict(re.findall(r"<!-- generated imm-(.*?) --help -->\n(.*?)<!-- end", page, re.DOTALL))
    missing = [f"{name} {o}" for name, o in options() if not re.search(rf"^  (-\w, )?{o}[ ,\n]", shown[name], re.M)]
    assert not missing


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    page = (ROOT / "docs" / "dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {requirement.split(">")[0].split("[")[0] for group in groups for requirement in group} - {"mergekit-imm"}
    assert not [name for name in names if f"`{name}`" not in page]
