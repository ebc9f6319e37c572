"""Public names: one list holds them, type checkers know exactly these, and a missing extra is named."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"
WITHOUT = "import sys; sys.modules[{!r}] = None; "


def listed() -> dict[str, list[str]]:
    """Read the public names from docs/python.md: module -> names."""
    table = (PAGES / "python.md").read_text(encoding="utf-8").split("## What may be imported")[1]
    rows = re.findall(r"^\| `(mergekit_imm[\w.]*)` \| [^|]+ \| ([^|]+) \|$", table.split("have moved")[0], re.MULTILINE)
    return {module: re.findall(r"`(\w+)`", names) for module, names in rows}


PUBLIC = listed()
EXTRAS = {"IMMCallback"}  # needs transformers
PACKAGES = [name for name in PUBLIC if hasattr(importlib.import_module(name), "__path__")]


def of(name: str) -> Any:
    """Import a module, typed `Any` for dynamic access."""
    return importlib.import_module(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_has_the_names_of_the_list(name: str) -> None:
    package = of(name)
    assert PUBLIC[name] == sorted(PUBLIC[name])
    assert set(dir(package)) == set(PUBLIC[name])
    assert package.__all__ == [each for each in PUBLIC[name] if each not in EXTRAS]
    for each in PUBLIC[name]:
        thing = getattr(package, each)
        assert inspect.getdoc(thing), each
        assert not inspect.ismodule(thing)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_of_a_package_replaces_a_name_of_it(name: str) -> None:
    assert not {module.name for module in pkgutil.iter_modules(of(name).__path__)} & set(PUBLIC[name])


@pytest.mark.parametrize("name", PACKAGES)
def test_type_checkers_are_given_the_same_places(name: str) -> None:
    """Imports under TYPE_CHECKING match those of `lazy`."""
    tree = ast.parse(Path(of(name).__file__).read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    declared: dict[str, set[str]] = {}
    for node in branch.body:
        assert isinstance(node, ast.ImportFrom)
        declared.setdefault("." * node.level + (node.module or ""), set()).update(alias.name for alias in node.names)
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    done: dict[str, set[str]] = {}
    for names in map(ast.literal_eval, call.args[1:]):
        for module, each in names.items():
            done.setdefault(module, set()).update(each.split())
    assert declared == done


def test_errors_and_schedules_have_the_names_of_the_list() -> None:
    errors = of("mergekit_imm.errors")
    found = [n for n, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, errors.MergeError)]
    assert sorted(found) == PUBLIC["mergekit_imm.errors"]
    assert set(found) <= set(PUBLIC["mergekit_imm"])
    assert all(callable(getattr(of("mergekit_imm.schedules"), name)) for name in PUBLIC["mergekit_imm.schedules"])


def test_every_public_function_has_an_example() -> None:
    for name in PUBLIC["mergekit_imm"]:
        thing = getattr(of("mergekit_imm"), name)
        if inspect.isfunction(thing):
            assert ">>>" in (thing.__doc__ or ""), name


def test_pages_import_and_describe_public_names_only() -> None:
    found = []
    for page in (*sorted(PAGES.glob("*.md")), ROOT / "README.md"):
        text = page.read_text(encoding="utf-8").split("These have moved")[0]
        if page.name == "architecture.md":  # describes private modules too
            text = text.replace("from mergekit_imm.numerics.cpu import merge_span", "")
        described = re.findall(r"^::: (mergekit_imm[\w.]*)\.(\w+)$", text, re.MULTILINE)
        imported = re.findall(r"^(?:>>> )?from (mergekit_imm[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
        linked = re.findall(r"\.md#(mergekit_imm[\w.]*)\.(\w+)", text)
        found += [
            (page.name, module, name)
            for module, names in (*described, *imported, *linked)
            for name in names.split(", ")
        ]
    assert len(found) > 60
    assert not [each for each in found if each[2] not in PUBLIC.get(each[1], [])]


IMPORTS = "\n".join(f"from {module} import {', '.join(names)}" for module, names in PUBLIC.items())
GOOD = f"""{IMPORTS}
from mergekit_imm import __version__
import mergekit_imm
status: str = mergekit_imm.verify("out").out
version: str = __version__
"""
BAD = (
    "\n".join(f"from {module} import nothing" for module in PACKAGES)
    + """
import mergekit_imm
mergekit_imm.merge_chekpoints
x: int = mergekit_imm.verify("out")
from mergekit_imm.evaluation import TYPE_CHECKING
"""
)


def test_type_checkers_know_the_public_names_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    others = ",".join(f"{name}.*" for name in ("torch", "numpy", "transformers", "click", "huggingface_hub"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n[mypy-{others}]\nfollow_imports = skip\n")
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "good.py", "bad.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    lines = [line for line in ended.stdout.splitlines() if ": error: " in line]
    assert len(lines) == len(PACKAGES) + 3, ended.stdout + ended.stderr
    assert all(line.startswith("bad.py") for line in lines)
    for package, line in zip(PACKAGES, lines, strict=False):
        assert f'"{package}" has no attribute "nothing"' in line
    assert 'no attribute "merge_chekpoints"' in lines[-3]
    assert "Incompatible types" in lines[-2]
    assert '"TYPE_CHECKING"' in lines[-1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_everything_can_be_imported_without_extras() -> None:
    stars = "; ".join(f"from {name} import *" for name in PACKAGES)
    ended = run(f"{WITHOUT.format('transformers')}{WITHOUT.format('matplotlib')}{stars}; print(dare_merge)")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("<function dare_merge")


@pytest.mark.parametrize("place", ["mergekit_imm", "mergekit_imm.loop"])
def test_a_name_that_needs_an_extra_says_which(place: str) -> None:
    code = WITHOUT.format("transformers") + (
        f"import mergekit_imm\ntry:\n    from {place} import IMMCallback\n"
        "except mergekit_imm.MergeError as error:\n    print(isinstance(error, ImportError), error)\n"
    )
    ended = run(code)
    assert ended.stdout == (
        "True IMMCallback needs transformers, which is not installed; pip install 'transformers>=4.56'\n"
    )
    assert ended.stderr == ""


def test_a_broken_package_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("import a_package_that_is_not_there")
    ended = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mergekit_imm import IMMCallback")
    assert "No module named 'a_package_that_is_not_there'" in ended.stderr
    assert "not installed" not in ended.stderr
