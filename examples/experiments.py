"""What the two experiments share: running commands, and showing what came out."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

STYLE = Path(__file__).resolve().parents[1] / "docs" / "scripts" / "pictures.mplstyle"  # of all pictures


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; what it says goes to a log. Ends the program if it fails."""
    with (folder / "log").open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # imm-loop stands beside python
        status = subprocess.run(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "PATH": path}, check=False
        ).returncode
    if status:
        sys.exit(f"error: a command ended with status {status}; it and what it said are the last in {folder / 'log'}")


def machine() -> dict[str, str]:
    """Describe this machine, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "system": platform.system(), "python": platform.python_version()}


def where(results: Mapping[str, Any], seeds: Iterable[str]) -> str:
    """Say when, on what, with which versions and seeds."""
    host, versions = results["machine"], results["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{results['date']}. {host['cpu']}, one thread for each seed, {host['system']}; Python"
        f" {host['python']}, {named}. Seeds: {', '.join(seeds)}."
    )


def show(
    description: str | None, tables: Callable[[Any], Mapping[str, str]], draw: Callable[[Any, Path], None]
) -> None:
    """Print the tables of a file of results and, if asked, draw its pictures: what a report does when it is run."""
    from matplotlib import style

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where to draw pictures")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    print("\n\n".join(f"{name}\n{text}" for name, text in tables(results).items()))
    if arguments.pictures is not None:
        with style.context(STYLE):
            draw(results, arguments.pictures)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
