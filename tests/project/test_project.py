"""What holds for the project as a whole: one direction of imports, the public surface, examples and docs that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import mergekit_imm
from checkpoints import random_state, write_model
from mergekit_imm.cli.analyze import analyze_command
from mergekit_imm.cli.loop import loop_command
from mergekit_imm.cli.merge import merge_command
from mergekit_imm.cli.verify import verify_command

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mergekit_imm"

# A package imports only from those before it.
ROWS = (
    "errors schedules common numerics model options functional checkpoint transforms plan output ranks engine live loop"
    " evaluation synthesis analysis views cli __main__"
).split()
ONE_ROW = {"errors", "schedules", "common"}  # what everything uses


def imports_of(path: Path, module: str, package: bool = False) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    here = module.split(".") if package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = here[: len(here) - node.level + 1]
            target = [*parent, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = ".".join([*target, alias.name])
                known = (SOURCE / Path(*full.split("."))).with_suffix(".py")
                found.add(full if known.exists() else ".".join(target))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("mergekit_imm.") for alias in node.names if "mergekit_imm" in alias.name}
    return found - {""}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py"
    }


def wrong_way(found: Mapping[str, set[str]]) -> list[str]:
    """Imports that go back, from a package to one after it, or round in a circle within one."""
    row = {room: number for number, room in enumerate(ROWS)}
    back = [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in sorted(others)
        if (one := name.partition(".")[0]) != (two := other.partition(".")[0])
        and not (one in ONE_ROW and two in ONE_ROW)
        and row[two] > row[one]
    ]
    try:
        list(TopologicalSorter(found).static_order())
    except CycleError as error:
        back.append(" imports ".join(error.args[1]))
    return back


def test_imports_go_one_way() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(ROWS), "every package has its place in ROWS"
    assert not wrong_way({name: imports_of(path, name) for name, path in modules().items()})


def test_the_import_check_can_fail(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from ..engine.merge import merge_checkpoints\n    from . import mask\n")
    assert imports_of(probe, "numerics.probe") == {"engine.merge", "numerics.mask"}
    assert wrong_way({"numerics.probe": {"engine.merge"}}) == ["numerics.probe imports engine.merge"]
    assert wrong_way({"plan.a": {"plan.b"}, "plan.b": {"plan.a"}})
    assert not wrong_way({"engine.merge": {"numerics.mask", "errors"}, "errors": {"common.messages"}})


def test_the_public_surface() -> None:
    assert sorted(mergekit_imm.__all__) == mergekit_imm.__all__
    for name in mergekit_imm.__all__:
        thing = getattr(mergekit_imm, name)
        assert thing.__doc__, name
    assert set(mergekit_imm.__all__) <= set(dir(mergekit_imm))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(mergekit_imm, "nothing")  # noqa: B009 - type checkers know that it is not there


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mergekit_imm", "torch numba numpy transformers click huggingface_hub safetensors"),
        ("import mergekit_imm.cli.main", "torch numba numpy transformers huggingface_hub safetensors"),
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


@pytest.mark.parametrize("name", sorted(modules()))
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


def test_every_public_function_has_an_example() -> None:
    for name in mergekit_imm.__all__:
        thing = getattr(mergekit_imm, name)
        if inspect.isfunction(thing):
            assert ">>>" in (thing.__doc__ or ""), name


def options() -> list[tuple[str, str]]:
    commands = [
        merge_command,
        verify_command,
        loop_command,
        *analyze_command.commands.values(),
    ]
    return [(str(c.name), o) for c in commands for p in c.params for o in p.opts if o.startswith("--")]


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    missing = [f"{command} {option}" for command, option in options() if f"`{option}" not in page]
    assert not missing


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    page = (ROOT / "docs" / "dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {requirement.split(">")[0].split("[")[0] for group in groups for requirement in group} - {"mergekit-imm"}
    assert not [name for name in names if f"`{name}`" not in page]
