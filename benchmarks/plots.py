"""Draw the pictures of docs/numbers.md from a result file.

    python benchmarks/plots.py [RESULT.json] [--out docs]

Without a name it takes the newest file of benchmarks/results. The pictures are transparent, in tones that can be read
on white and on dark pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from contenders import PEERS

HERE = Path(__file__).parent
TEXT, LINES = "#808080", "#80808055"
COLORS = {
    "imm-merge": "#3584d6",
    "imm-merge --start": "#3584d6",
    "mergekit": "#dd7b33",
    "mergekit-same": "#b8860b",
    "sd-mecha": "#a06cc8",
    "by-hand": "#36a57a",
}
LABELS = {
    "imm-merge": "imm-merge",
    "imm-merge --start": "imm-merge, three inputs",
    "mergekit": "mergekit",
    "mergekit-same": "mergekit, same formula",
    "sd-mecha": "sd-mecha",
    "by-hand": "script by hand",
}
FLOOR = "#909090"


def label_of(name: str) -> str:
    """How a contender is called."""
    return LABELS.get(name) or f"I/O floor, {name.removeprefix('floor ')}"


def best_floor(entry: Mapping[str, Any]) -> str:
    """The floor that streams fastest, of all sizes and states of the cache that were measured."""
    floors = [name for name in entry["summary"] if name.startswith("floor ")]
    seconds = {
        name: sum(it["stream"]["median"] for it in entry["summary"][name].values()) / len(entry["summary"][name])
        for name in floors
    }
    return min(floors, key=lambda name: seconds[name], default="")


def newest(folder: Path = HERE / "results") -> Path:
    """The newest result file."""
    found = sorted(folder.glob("*.json"))
    if not found:
        raise SystemExit("error: there is no result file yet; run `make bench`")
    return found[-1]


def figure(width: float, height: float) -> Figure:
    """An empty picture."""
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def plain(axes: Any, title: str) -> None:
    """Take away what says nothing; set colours."""
    axes.set_title(title, loc="left", color=TEXT, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    axes.tick_params(colors=TEXT, which="both", labelsize=9)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.set_axisbelow(True)


def with_peers(results: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, Mapping[str, Any]]]]]:
    """Sizes that peers merged too: size, cache state, and contenders with their measures."""
    for size, entry in results["sizes"].items():
        found = entry["summary"]
        if any(peer in found for peer in PEERS):
            cache = "warm" if entry["fits_in_memory"] else "cold"
            rows = [(name, found[name][cache]) for name in LABELS if cache in found.get(name, {})]
            yield size, cache, rows


def bars(results: Mapping[str, Any], key: str, label: str, unit: float, form: str) -> Figure | None:
    """One panel of bars for each size that peers merged."""
    panels = list(with_peers(results))[-3:]
    if not panels:
        return None
    heights = [len(rows) for _, _, rows in panels]
    picture = figure(8, 0.75 * len(panels) + 0.3 * sum(heights))
    grid = picture.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (size, cache, rows) in zip(grid[:, 0], panels, strict=True):
        names = [name for name, _ in rows]
        values = [it[key]["median"] / unit for _, it in rows]
        spread = [
            [it[key][side] / unit - value for (_, it), value in zip(rows, values, strict=True)]
            for side in ("min", "max")
        ]
        error = [[-low for low in spread[0]], spread[1]]
        axes.barh(
            range(len(rows)),
            values,
            xerr=error,
            color=[COLORS[name] for name in names],
            height=0.7,
            error_kw={"ecolor": TEXT, "lw": 1, "capsize": 2},
        )
        for row, (_, it) in enumerate(rows):
            axes.annotate(
                form.format(values[row]),
                (it[key]["max"] / unit, row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=TEXT,
                fontsize=9,
            )
        axes.set_yticks(range(len(rows)), [LABELS[name] for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=LINES, lw=0.6)
        inputs = "inputs in the page cache" if cache == "warm" else "inputs not in the page cache"
        plain(axes, f"{size}, {inputs}")
        axes.tick_params(axis="y", length=0)
    grid[-1, 0].set_xlabel(label, color=TEXT)
    return picture


def memory(results: Mapping[str, Any]) -> Figure | None:
    """Peak memory."""
    return bars(results, "peak", "peak resident memory, GB: median, least and largest", 1e9, "{:.2f} GB")


def time(results: Mapping[str, Any]) -> Figure | None:
    """Time of whole commands."""
    return bars(results, "wall", "time of the whole command, s: median, least and largest", 1, "{:.1f} s")


def scaling(results: Mapping[str, Any]) -> Figure | None:
    """Time and memory against size."""
    picture = figure(9, 4.5)
    left, right = picture.subplots(1, 2)
    for name, cache, style in (
        ("imm-merge", "warm", "o-"),
        ("imm-merge", "cold", "o--"),
        ("floor", "warm", "s-"),
        ("floor", "cold", "s--"),
        *((peer, "", "^-") for peer in PEERS),
    ):
        points = []
        for entry in results["sizes"].values():
            caches = entry["summary"].get(best_floor(entry) if name == "floor" else name, {})
            it = caches.get(cache) if cache else next(iter(caches.values()), None)
            if it:
                points.append((entry["parameters"] / 1e9, it["wall"]["median"], it["peak"]["median"] / 1e9))
        if not points:
            continue
        x, seconds, peak = zip(*points, strict=True)
        label = LABELS.get(name, "I/O floor, the best") + (f", {cache}" if cache else "")
        look = {"color": COLORS.get(name, FLOOR), "ms": 4.5, "lw": 1.4, "label": label}
        left.plot(x, seconds, style, **look)
        if not name.startswith("floor") and cache != "warm":  # of all sizes
            right.plot(x, peak, style.replace("--", "-"), **look)
    for axes, title, y in ((left, "Time", "whole command, s"), (right, "Memory", "peak resident memory, GB")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [entry["parameters"] / 1e9 for entry in results["sizes"].values()]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("parameters, billions")
        axes.set_ylabel(y)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=LINES, lw=0.6)
        plain(axes, title)
    right.set_ylim(bottom=0.1)
    handles, labels = left.get_legend_handles_labels()
    picture.legend(handles, labels, frameon=False, fontsize=9, labelcolor=TEXT, loc="outside lower center", ncols=4)
    return picture if results["sizes"] else None


def kernel(results: Mapping[str, Any]) -> Figure | None:
    """The kernel against memcpy."""
    cases = results.get("kernel")
    if not cases:
        return None
    picture = figure(8, 0.9 + 0.5 * len(cases))
    axes = picture.subplots()
    for shift, label, color in ((-0.2, "kernel", COLORS["imm-merge"]), (0.2, "memcpy", FLOOR)):
        rows = [row + shift for row in range(len(cases))]
        least = [it[f"{label}_min"] for it in cases.values()]
        middle = [it[f"{label}_median"] for it in cases.values()]
        shown = "merge kernel, statistics included" if label == "kernel" else "memcpy of as many bytes"
        axes.barh(rows, least, height=0.36, color=color, label=shown)
        axes.plot(middle, rows, "|", color=TEXT, ms=9)
        for row, value, right in zip(rows, least, middle, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (max(value, right), row),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=TEXT,
                fontsize=9,
            )
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ns per parameter on one core: least of many (bar, number), median (mark)")
    axes.grid(axis="x", color=LINES, lw=0.6)
    picture.legend(frameon=False, fontsize=9, labelcolor=TEXT, loc="outside upper right", ncols=2)
    plain(axes, "")
    axes.tick_params(axis="y", length=0)
    return picture


def beside(results: Mapping[str, Any]) -> Figure | None:
    """Time and memory of the largest models that others merged too: what a newcomer sees first."""
    panels = [
        (size, cache, [row for row in rows if row[0] != "imm-merge --start"])
        for size, cache, rows in list(with_peers(results))[-2:]
    ]
    if not panels:
        return None
    heights = [len(rows) for _, _, rows in panels]
    picture = figure(8, 0.55 * len(panels) + 0.3 * sum(heights))
    grid = picture.subplots(len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": heights}, sharey="row")
    for line, (size, _, rows) in zip(grid, panels, strict=True):
        for axes, key, unit, form in ((line[0], "wall", 1, "{:.1f} s"), (line[1], "peak", 1e9, "{:.2g} GB")):
            values = [it[key]["median"] / unit for _, it in rows]
            axes.barh(range(len(rows)), values, color=[COLORS[name] for name, _ in rows], height=0.7)
            for row, value in enumerate(values):
                where = {"textcoords": "offset points", "va": "center", "color": TEXT, "fontsize": 9}
                axes.annotate(form.format(value), (value, row), (4, 0), **where)
            axes.set_yticks(range(len(rows)), [LABELS[name] for name, _ in rows])
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_xticks([])
            billions = results["sizes"][size]["parameters"] / 1e9
            plain(axes, f"{billions:.1f} billion parameters, {'time' if key == 'wall' else 'memory'}")
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        line[0].invert_yaxis()
    return picture


def main() -> None:
    """Draw all pictures that the results have numbers for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    results = json.loads((arguments.result or newest()).read_text())
    pictures = {"beside": beside, "time": time, "memory": memory, "scaling": scaling, "kernel": kernel}
    for name, draw in pictures.items():
        picture = draw(results)
        if picture is not None:
            picture.savefig(arguments.out / f"bench-{name}.png", transparent=True)
            print(f"bench-{name}.png")


if __name__ == "__main__":
    main()
