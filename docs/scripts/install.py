"""What an installation costs, and whether it merges: the tables of docs/install.md.

    python docs/scripts/install.py [--check]                  renews the tables from install.json
    python docs/scripts/install.py --measure PYTHON [...]     measures again, with each of these interpreters; others in
                                                              install.json stay. It needs the package `build`.

Builds the sdist, from it the wheel, and installs the wheel alone into empty environments: with the dependencies as pip
chooses them, without torch, with the oldest versions that pyproject.toml allows, and with those of constraints.txt (of
torch the build for CPUs, if pip finds one). Each environment then merges two small checkpoints, and the bytes must be
those of the library in this clone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from pages import update

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parents[1]
RESULTS = SCRIPTS / "install.json"
OLDEST = "3.11"  # the Python that the oldest versions are tried with; newer ones have no wheels of them


def call(*command: object, **options: Any) -> str:
    """Run a command and return what it prints; end the program with what it said if it fails."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if ended.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.stdout


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = project["project"]["dependencies"]
    return found


def write_models(folder: Path) -> None:
    """Write two small checkpoints, with numpy and safetensors alone."""
    import numpy as np
    from safetensors.numpy import save_file

    chance = np.random.default_rng(0)
    base = {f"model.layers.{n}.mlp.up_proj.weight": chance.normal(size=(256, 64)).astype(np.float32) for n in range(3)}
    for role, move in (("base", 0.0), ("sft", 0.01)):
        (folder / role).mkdir()
        (folder / role / "config.json").write_text('{"model_type": "llama"}')
        moved = {name: (each + move * chance.normal(size=each.shape)).astype(np.float32) for name, each in base.items()}
        save_file(moved, folder / role / "model.safetensors", {"format": "pt"})


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def environment(python: str, folder: Path, *installs: list[str]) -> dict[str, Any]:
    """Make an empty environment, install into it, and merge; return what it took and which bytes came out."""
    call(python, "-m", "venv", folder)
    before = size(folder)
    begin = time.perf_counter()
    for each in installs:
        call(folder / "bin" / "python", "-m", "pip", "install", "--no-cache-dir", *each)
    seconds = time.perf_counter() - begin
    listed = json.loads(call(folder / "bin" / "python", "-m", "pip", "list", "--format", "json"))
    versions = {each["name"].lower().replace("_", "-"): each["version"] for each in listed}
    megabytes = (size(folder) - before) / 1e6
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    here = folder.parent
    out = here / f"out-{folder.name}"
    call(folder / "bin" / "imm-merge", here / "base", here / "sft", "-o", out, "-q", cwd=here, env=clean)
    call(folder / "bin" / "imm-verify", out, "-q", cwd=here, env=clean)
    shutil.rmtree(folder)
    return {
        "packages": len(set(versions) - {"pip", "setuptools"}),
        "megabytes": round(megabytes),
        "seconds": round(seconds),
        "versions": versions,
        "digest": digest(out),
    }


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def measure(pythons: list[str]) -> None:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"environments": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        call(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)  # the wheel is built from the sdist
        (wheel,) = (folder / "dist").glob("*.whl")
        call(sys.executable, "-m", "mergekit_imm", "merge", folder / "base", folder / "sft", "-o", folder / "out", "-q")
        found["digest"] = digest(folder / "out")
        names = dependencies()
        without = [each for each in names if not each.startswith("torch")]
        oldest = [re.sub(r">=([\d.]+).*", r"==\1.*", each) for each in names if ">=" in each]
        for number, python in enumerate(pythons):
            version = call(python, "-c", "import platform; print(platform.python_version())").strip()
            kinds = {"as pip chooses": [[str(wheel)]], "without torch": [without, ["--no-deps", str(wheel)]]}
            if version.startswith(OLDEST):
                kinds["oldest"] = [[str(wheel), *oldest]]
                kinds["`constraints.txt`"] = [[str(wheel), "--constraint", str(ROOT / "constraints.txt")]]
            for kind, installs in kinds.items():
                name = f"{version}, {kind}"
                found["environments"][name] = environment(python, folder / f"{number}-{len(kind)}", *installs)
                print(name, {k: v for k, v in found["environments"][name].items() if k != "versions"}, flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    lines = [
        "| Python | versions | torch | packages | MB | seconds | bytes of the merge |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in found["environments"].items():
        version, _, kind = name.partition(", ")
        same = "the same" if each["digest"] == found["digest"] else "**others**"
        cells = [
            each["versions"].get("torch", "none"),
            *(each[key] for key in ("packages", "megabytes", "seconds")),
            same,
        ]
        lines.append(f"| {version} | {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def versions(found: dict[str, Any]) -> str:
    """Show the versions of the dependencies that were tried, from the oldest to the newest."""
    lines = ["| package | oldest tried | newest tried |", "|---|---|---|"]
    for each in dependencies():
        name = re.split(r"[<>=]", each)[0].replace("_", "-")
        tried = {env["versions"][name] for env in found["environments"].values() if name in env["versions"]}
        ordered = sorted(
            tried, key=lambda version: [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
        )
        lines.append(f"| `{name}` | {ordered[0]} | {ordered[-1]} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
        return
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    update("install.md", {"install": table(found), "versions": versions(found)}, __doc__)


if __name__ == "__main__":
    main()
