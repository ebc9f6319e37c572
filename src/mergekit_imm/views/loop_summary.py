"""The metrics of a loop: a table, and a figure with a panel for each metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..loop.state import State
from ..output.direct_io import replace_file
from ..output.write_errors import output_errors
from .tables import aligned, saved

KINDS = (("sft", "SFT"), ("merged", "Merge"), ("baseline", "SFT without merges"))
PANELS = 60  # more take minutes to draw, and nobody reads them
_STYLES = {"sft": "^-", "merged": "o-", "baseline": "s--"}


def rows(state: State) -> list[dict[str, Any]]:
    """Return a row for each evaluated model: round, kind, alpha if it is a merge, metrics."""
    found: list[dict[str, Any]] = []
    if "base" in state.metrics:
        found.append({"round": None, "kind": "base", "alpha": None, "metrics": state.metrics["base"]})
    for number in range(state.settings.rounds):
        for kind, _ in KINDS:
            metrics = state.metrics.get(f"{number}/{kind}")
            if metrics is None and (kind, number) == ("baseline", 0) and state.settings.baseline:
                metrics = state.metrics.get("0/sft")  # round 0 has one sft
            if metrics is not None:
                alpha = state.alphas.get(str(number)) if kind == "merged" else None
                found.append({"round": number, "kind": kind, "alpha": alpha, "metrics": metrics})
    return found


def table(state: State) -> str:
    """Return a table of all metrics, a line for each model: SFT n and Merge n are those of round n, from 0."""
    found = rows(state)
    if not found:
        alphas = (f"  round {number}: alpha {alpha:g}" for number, alpha in state.alphas.items())
        return "\n".join(["no evaluate command, so nothing was measured", *alphas])
    names = list(dict.fromkeys(name for row in found for name in row["metrics"]))
    titles = dict(KINDS)
    cells = [["model", "alpha", *map(shown, names)]]
    for row in found:
        title = "base" if row["kind"] == "base" else f"{titles[row['kind']]} {row['round']}"
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        cells.append(
            [title, alpha, *(f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "" for name in names)]
        )
    return "\n".join(aligned(cells))


def plot(state: State, folder: Path) -> list[Path]:
    """Draw the first PANELS metrics over the rounds, as in figures 6 and 7 of the paper, into metrics.png and .svg.

    Returns the paths of the files, none without metrics. Raises ImportError without matplotlib.
    """
    found = rows(state)
    names = list(dict.fromkeys(name for row in found for name in row["metrics"]))[:PANELS]
    if not names:
        return []
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.4 * columns, 2.7 * lines), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, number + 1)
            measured = [(row["kind"], row["round"], row["metrics"][name]) for row in found if name in row["metrics"]]
            base = [value for kind, _, value in measured if kind == "base"]
            if base:
                axes.axhline(base[0], color="0.5", linewidth=1, linestyle=":", label="base")
            for kind, title in KINDS:
                points = [(at, value) for each, at, value in measured if each == kind]
                if points:
                    axes.plot(*zip(*points, strict=True), _STYLES[kind], label=title, markersize=4)
            axes.set_xticks(range(state.settings.rounds))
            axes.set_xlabel("round")
            axes.set_title(shown(name, 60), parse_math=False)
            axes.grid(alpha=0.3)
            if number == 0:
                axes.legend(fontsize=7)
        files = saved(figure, "metrics")
    with output_errors(folder):
        for name, content in files.items():
            replace_file(folder / name, content)
    return [folder / name for name in files]
