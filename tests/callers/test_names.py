"""The public names: type checkers know them and no others, and those that need an extra say which."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_imm
import mergekit_imm.evaluation

KNOWN = sorted({*mergekit_imm.__all__, "IMMCallback"})
WITHOUT = "import sys; sys.modules[{!r}] = None; "


GOOD = f"""
from mergekit_imm import {", ".join(KNOWN)}, __version__
from mergekit_imm.evaluation import {", ".join(mergekit_imm.evaluation.__all__)}
import mergekit_imm
status: str = mergekit_imm.verify("out").out
version: str = __version__
"""
BAD = """
from mergekit_imm import nothing
import mergekit_imm
mergekit_imm.merge_chekpoints
from mergekit_imm.evaluation import other
x: int = mergekit_imm.verify("out")
"""


def test_type_checkers_know_the_public_names_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    others = ",".join(f"{name}.*" for name in ("torch", "numpy", "transformers", "click", "huggingface_hub"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n[mypy-{others}]\nfollow_imports = skip\n")
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "good.py", "bad.py"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    lines = [line for line in ended.stdout.splitlines() if ": error: " in line]
    assert len(lines) == 4, ended.stdout + ended.stderr
    assert all(line.startswith("bad.py") for line in lines)
    assert '"mergekit_imm" has no attribute "nothing"' in lines[0]
    assert 'no attribute "merge_chekpoints"' in lines[1]
    assert '"mergekit_imm.evaluation" has no attribute "other"' in lines[2]
    assert "Incompatible types" in lines[3]


def test_the_lists_of_names_agree() -> None:
    for package in (mergekit_imm, mergekit_imm.evaluation):
        home = set(package._HOME)
        assert home - set(package.__all__) == ({"IMMCallback"} if package is mergekit_imm else set())
        assert home <= set(dir(package))


def test_the_page_says_where_each_name_is_imported_from() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    named = re.findall(r"^::: (mergekit_imm\.[\w.]+)\.(\w+)$", page, re.MULTILINE)
    assert len(named) > 30
    for module, name in named:
        assert name in KNOWN or f"in `{module}`" in page, f"{module}.{name}"
        assert hasattr(importlib.import_module("mergekit_imm" if name in KNOWN else module), name)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_everything_can_be_imported_without_extras() -> None:
    code = (
        WITHOUT.format("transformers") + WITHOUT.format("matplotlib") + "from mergekit_imm import *; print(dare_merge)"
    )
    ended = run(code)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("<function dare_merge")


@pytest.mark.parametrize("place", ["mergekit_imm", "mergekit_imm.loop.trainer_callback"])
def test_a_name_that_needs_an_extra_says_which(place: str) -> None:
    code = WITHOUT.format("transformers") + (
        f"import mergekit_imm\ntry:\n    from {place} import IMMCallback\n"
        "except mergekit_imm.MergeError as error:\n    print(isinstance(error, ImportError), error)\n"
    )
    ended = run(code)
    assert ended.stdout == (
        "True IMMCallback needs transformers, which is not installed; pip install 'mergekit-imm[analyze]'\n"
    )
    assert ended.stderr == ""


def test_a_broken_package_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("import a_package_that_is_not_there")
    ended = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mergekit_imm import IMMCallback")
    assert "No module named 'a_package_that_is_not_there'" in ended.stderr
    assert "not installed" not in ended.stderr
