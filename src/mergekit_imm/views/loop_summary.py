"""The metrics of a loop: a table, and a figure with a panel for each metric."""

from __future__ import annotations

from pathlib import Path

from ..common.messages import shown
from ..loop.choice import dip_in, parse_choice
from ..loop.metrics import TITLES, rows
from ..loop.state import State, measured, without_sign
from ..output.direct_io import replace_file
from ..output.write_errors import output_errors
from .tables import aligned, drawing, saved

PANELS = 60  # more take minutes to draw, and nobody reads them
_STYLES = {"sft": "^-", "candidate": "x", "merged": "o-", "baseline": "s--"}


def notes(state: State) -> list[str]:
    """Return what should be known about the alphas that were chosen: a line for each round, or none."""
    choice, found = parse_choice(state.settings.alpha), []
    if choice is None:
        return []
    name, sign = without_sign(state.settings.metric or "")
    for number, kept in ((int(key), alpha) for key, alpha in state.alphas.items()):
        seen, said = measured(state, number), []
        dip = dip_in(seen) if choice.is_search else None
        if choice.is_search:
            said.append(f"{len(seen)} of {len(choice.alphas)} alphas were measured")
        if dip:
            low, middle, high = (f"{alpha:g} ({sign * seen[alpha]:.6g})" for alpha in dip)
            said.append(
                f"{shown(name)} does not rise to one peak: it is worse at {middle} than at {low} and {high}; unless"
                " that is noise, the best may be one that was not measured, and choose:0.1,0.2,... measures all"
            )
        ends = {choice.alphas[0]: "smallest", choice.alphas[-1]: "largest"}
        if kept in ends and kept not in (0.0, 1.0):
            said.append(f"the best alpha is the {ends[kept]} of the list; one beyond it may be better")
        if said:
            found.append(f"round {number}: {'; '.join(said)}")
    return found


def table(state: State) -> str:
    """Return a table of all metrics, a line for each model: SFT n and Merge n are those of round n, from 0."""
    found = rows(state)
    if not found:
        alphas = (f"  round {number}: alpha {alpha:g}" for number, alpha in state.alphas.items())
        return "\n".join(["no evaluate command, so nothing was measured", *alphas])
    names = list(dict.fromkeys(name for row in found for name in row["metrics"]))
    cells = [["model", "alpha", *map(shown, names)]]
    for row in found:
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        cells.append(
            [row["title"], alpha, *(f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "" for name in names)]
        )
    return "\n".join(aligned(cells))


def plot(state: State, folder: Path) -> list[Path]:
    """Draw the first PANELS metrics over the rounds, as in figures 6 and 7 of the paper, into metrics.png and .svg.

    Returns the paths of the files, none without metrics. Raises ExtraError without matplotlib.
    """
    found = rows(state)
    names = list(dict.fromkeys(name for row in found for name in row["metrics"]))[:PANELS]
    if not names:
        return []
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * columns, 2.7 * lines), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, number + 1)
            measured = [(row["kind"], row["round"], row["metrics"][name]) for row in found if name in row["metrics"]]
            base = [value for kind, _, value in measured if kind == "base"]
            if base:
                axes.axhline(base[0], color="0.5", linewidth=1, linestyle=":", label="base")
            for kind, style in _STYLES.items():
                points = [(at, value) for each, at, value in measured if each == kind]
                if points:
                    grey = "0.55" if kind == "candidate" else None
                    axes.plot(*zip(*points, strict=True), style, color=grey, label=TITLES[kind], markersize=4)
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
