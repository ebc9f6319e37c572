"""Run the recipes for trainers that run on a CPU, and compare the others with the sources of their trainers.

    python docs/scripts/trainers.py [--checkout NAME=FOLDER ...] [NAME ...]

Each trainer that runs gets a virtual environment of its own, which sees the packages of the Python that runs this
(torch, and the library) beneath its own pinned ones. Its recipe trains a tiny model; what it saves must have the bits
that `imm-merge` makes of the checkpoint that the trainer wrote before the merge. Of the others the published package is
downloaded, or a checkout given, and the signatures and options that the recipe uses are looked for in it. Versions,
commands and signatures are in trainers.json. Needs pip's index, and 1.5 GB of disk.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "examples" / "trainers"
TRAINERS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
VERSIONS = """
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")))
"""


def check(command: str | list[str], folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command; return its output, or end the script with the end of it."""
    ran = subprocess.run(
        command,
        cwd=folder,
        env=None if env is None else dict(env),
        shell=isinstance(command, str),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ran.returncode:
        sys.exit(f"{command} failed:\n{ran.stdout[-4000:]}")
    return ran.stdout


def run(trainer: Mapping[str, Any], folder: Path) -> str:
    """Install a trainer in an environment in a folder, run its recipe there; return what is to be said."""
    check([sys.executable, "-m", "venv", "venv"], folder)
    site = next(folder.glob("venv/lib/python*/site-packages"))
    beneath = [sysconfig.get_path("purelib"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    (site / "beneath.pth").write_text("\n".join(beneath))
    pip = ["venv/bin/pip", "install", "--quiet"]
    if "no_deps" in trainer:
        check([*pip, "--no-deps", *trainer["no_deps"]], folder)
    check([*pip, *trainer["install"]], folder)
    for name in trainer.get("empty", ()):  # imported, but used by no text model
        (site / f"{name}.py").touch()
    for file in RECIPES.iterdir():
        shutil.copy(file, folder)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{env['PATH']}"
    env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "AXOLOTL_DO_NOT_TRACK": "1"}  # nothing is sent
    check(["venv/bin/python", "tiny.py"], folder, env)
    check(f"{trainer['run']} {trainer['on_cpu']}", folder, env)
    (trained,) = folder.glob(trainer["trained"])
    found = check(["venv/bin/python", "-c", COMPARE, str(trained)], folder, env).splitlines()[-1]
    return f"{found}; with {check(['venv/bin/python', '-c', VERSIONS], folder, env).strip()}"


COMPARE = """
import sys
import torch
from safetensors.torch import load_file
from mergekit_imm import merge_checkpoints

trained, saved = (load_file(f"{folder}/model.safetensors") for folder in (sys.argv[1], "round-0"))
dtype = next(iter(saved.values())).dtype
merge_checkpoints("base", sys.argv[1], "expected", dtype=dtype)
expected = load_file("expected/model.safetensors")
assert sorted(saved) == sorted(expected)
assert all(torch.equal(saved[name], expected[name]) for name in saved), "not what imm-merge makes"
assert not all(torch.equal(saved[name], trained[name]) for name in saved), "not merged"
print(f"{len(saved)} tensors merged, {dtype}, the same bits as imm-merge")
"""


def source(trainer: Mapping[str, Any], folder: Path) -> Path:
    """Download the package of a trainer into a folder; return the folder with its source."""
    check(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), trainer["download"]],
        folder,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "source")
    return next((folder / "source").glob("*.data/purelib"), folder / "source")


def signatures(code: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the parameters of each function and method of a module."""
    for node in ast.parse(code).body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield f"{prefix}{each.name}", ast.unparse(each.args)


def options(code: str) -> set[str]:
    """Return the options of a module: strings that begin with --, and fields of classes."""
    nodes = list(ast.walk(ast.parse(code)))
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return strings | {f"--{field}" for field in fields}


def differences(trainer: Mapping[str, Any], folder: Path) -> list[str]:
    """Return what the recipe needs and the source in a folder does not have."""
    wrong = []
    for path, expected in trainer.get("hooks", {}).items():
        found = dict(signatures((folder / path).read_text(encoding="utf-8")))
        wrong += [f"{path}: {name}({found.get(name)})" for name, each in expected.items() if found.get(name) != each]
    for path, names in trainer.get("options", {}).items():
        have = options((folder / path).read_text(encoding="utf-8"))
        wrong += [f"{path} has no {name}" for name in names if name not in have]
    return wrong


def main() -> None:
    """Run or compare each trainer; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TRAINERS, []], metavar="NAME")
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=FOLDER")
    asked = parser.parse_args()
    checkouts = dict(each.split("=", 1) for each in asked.checkout)
    failed = False
    for name in asked.names or TRAINERS:
        trainer = TRAINERS[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if "run" in trainer:
                said = run(trainer, folder)
            elif name in checkouts or "download" in trainer:
                place = Path(checkouts[name]) if name in checkouts else source(trainer, folder)
                wrong = differences(trainer, place)
                failed |= bool(wrong)
                said = "; ".join(wrong) or "the source has the hooks and options of the recipe"
            else:
                said = f"not checked; give --checkout {name}=FOLDER"
        print(f"{name} {trainer['version']}: {said}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
