"""What the two experiments share: running commands, and showing what came out."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    description: str | None, tables: Callable[[Any], Mapping[str, str]], draw: Callable[[Any], Mapping[str, Figure]]
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
            for name, figure in draw(results).items():
                figure.savefig(arguments.pictures / f"{name}.png", metadata={"Software": None})


class Row(NamedTuple):
    """An arm in a picture: its changes in domain and out of domain, each a mean and its error (nan: not known)."""

    label: str
    colour: str
    changes: tuple[tuple[float, float], tuple[float, float]]


def draw_rows(rows: Sequence[Row], title: str) -> Figure:
    """Plot every arm's change, in domain and out of domain, a row for each; what merges is round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)))
    panels = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    for part, axes in enumerate(panels):
        axes.axvline(0, color="0.5", lw=1)
        for at, row in enumerate(rows):
            mean, error = row.changes[part]
            shape = "o" if "IMM" in row.label else "s"
            axes.errorbar(mean, at, xerr=0 if math.isnan(error) else error, fmt=shape, color=row.colour, capsize=3)
        axes.set_title(("in domain", "out of domain")[part])
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel(title, fontsize=10)
    return figure


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
