"""What holds for the project as a whole: one direction of imports, the public surface, examples and docs that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekit_imm
from checkpoints import random_state, write_model
from mergekit_imm.cli import analyze as analyzecli
from mergekit_imm.cli import loop as loopcli
from mergekit_imm.cli import merge as cli

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mergekit_imm"

# A module imports only from lines above its own.
LEVELS = [
    ["errors"],
    ["json_input", "ranks", "vectors", "views"],
    ["mask", "layers", "config", "sums", "sweep", "schedules"],
    ["importance", "given"],
    ["factors", "sparsify"],
    ["recipe", "flat"],
    ["fused"],
    ["states"],
    ["ops"],
    ["sparse"],
    ["jit"],
    ["compiled", "products", "magnitudes"],
    ["kernel", "gpu"],
    ["checkpoint.sidefiles", "checkpoint.tensorfile", "checkpoint.unpickled"],
    ["spellings", "checkpoint.parts"],
    ["match"],
    ["checkpoint.hub", "checkpoint.disk", "checkpoint.computed", "checkpoint.pickled"],
    ["checkpoint.pieces", "checkpoint.lowrank", "checkpoint.experts", "checkpoint.sparsified", "checkpoint.quantunits"],
    ["checkpoint.dcp"],
    ["checkpoint.forms"],
    ["checkpoint.source", "checkpoint.output", "checkpoint.journal"],
    ["checkpoint.swap", "checkpoint.adapter", "checkpoint.quantised", "checkpoint.tokens"],
    ["joints"],
    ["names", "shards", "checkpoint.intact"],
    ["layout", "ties", "vocab"],
    ["advice"],
    ["agreement"],
    ["plan"],
    ["reading", "shares", "accounts"],
    ["execute", "report"],
    ["stream", "prepare", "inplace"],
    ["verification", "unchanged"],
    ["results"],
    ["build", "check", "options", "saving"],
    ["merge", "live", "summary", "console", "launch"],
    ["shell"],
    ["loopstate"],
    ["loop", "loopsummary", "rounds", "callback"],
    ["answers"],
    ["synthesis.filtering", "synthesis.mixture", "synthesis.deduplication"],
    ["synthesis.crescent"],
    ["evaluation.bootstrap", "evaluation.passk", "evaluation.diversity", "evaluation.samples"],
    ["evaluation.reversal"],
    ["evaluation.compare"],
    ["evaluation.samplesview"],
    ["evaluation.samplescli"],
    ["analysis.gradients", "analysis.calibration", "analysis.change"],
    ["analysis.measured", "analysis.mismatch"],
    ["analysis.terminal", "analysis.pictures"],
    ["analysis.page"],
    ["analysis.importancecli", "analysis.changecli"],
    ["loopcli", "analyzecli"],
    ["cli"],
    ["__main__"],
]


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


def test_imports_go_one_way() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    assert set(level) == set(modules()), "every module has its place in LEVELS"
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports_of(path, name)
        if level.get(other, 99) >= level[name]
    ]
    assert not wrong


def test_the_import_check_can_fail(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from .merge import merge_checkpoints\n    from . import ops\n")
    assert imports_of(probe, "mask") == {"merge", "ops"}
    probe.write_text("from ..errors import shown\nfrom .hub import fetch\n")
    assert imports_of(probe, "checkpoint.source") == {"errors", "checkpoint.hub"}


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
        ("import mergekit_imm.cli.merge", "torch numba numpy transformers huggingface_hub safetensors"),
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
    if name == "verification":
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
        cli.merge_command,
        cli.verify_command,
        loopcli.loop_command,
        *analyzecli.analyze_command.commands.values(),
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
