"""Write the newest results of `make bench` into docs/numbers.md and the README.

python docs/scripts/results.py [--check]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pages import DOCS, update

RESULTS = DOCS.parent / "benchmarks" / "results"
NAMES = {
    "imm-merge": "imm-merge",
    "imm-merge --start": "imm-merge, three inputs",
    "mergekit": "mergekit",
    "mergekit-same": "mergekit, same formula",
    "sd-mecha": "sd-mecha",
    "by-hand": "script by hand",
}
PEERS = ("mergekit", "mergekit-same", "sd-mecha", "by-hand")
NOTHING = "Not measured in this run."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head, rows = list(head), list(rows)
    if not rows:
        return NOTHING
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(measure: Mapping[str, float], unit: float = 1, digits: int = 2) -> str:
    """Median, and least to largest."""
    middle, low, high = (f"{measure[key] / unit:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low}–{high})"


def rounds(entry: Mapping[str, Any]) -> int:
    """How many rounds a size was measured in."""
    return max(len(runs) for runs in entry["runs"]["imm-merge"].values())


def where(results: Mapping[str, Any], file: str) -> str:
    """Which machine and versions, in a sentence."""
    machine, versions, peers = results["machine"], results["versions"], results["peer_versions"]
    settings = results["settings"]
    others = f"; peers: {', '.join(f'{name} {v}' for name, v in peers.items())}" if peers else ""
    return (
        f"{results['date']}, `benchmarks/results/{file}`. {machine['cpu']} ({machine['vector']}),"
        f" {machine['cores']} cores, {machine['memory_gb']:.0f} GB of memory, Linux {machine['kernel']},"
        f" {machine['filesystem']}."
        f" Python {versions['python']}, mergekit-imm {versions['mergekit-imm']} ({versions['git']}),"
        f" numba {versions['numba']}, numpy {versions['numpy']}{others}."
        f" alpha {settings['alpha']}, drop {settings['drop']}, {settings['workers']} workers,"
        f" rounds: {', '.join(f'{size} {rounds(entry)}' for size, entry in results['sizes'].items())}."
    )


def floor(results: Mapping[str, Any]) -> str:
    """Ours and the floor, warm and cold."""
    rows = []
    for size, entry in results["sizes"].items():
        for cache in ("warm", "cold"):
            for name in ("imm-merge", *sorted(name for name in entry["summary"] if name.startswith("floor "))):
                it = entry["summary"].get(name, {}).get(cache)
                if it:
                    rate = (it["read"]["median"] + it["written"]["median"]) / it["stream"]["median"] / 1e9
                    rows.append(
                        [
                            size,
                            cache,
                            NAMES.get(name, name.replace(" ", ", ")),
                            spread(it["stream"]),
                            f"{rate:.2f}",
                            spread(it["wall"]),
                            f"{it['cpu']['median']:.1f}",
                        ]
                    )
    return table(["model", "inputs", "what", "streaming s", "GB/s", "whole command s", "CPU s"], rows)


def peers(results: Mapping[str, Any]) -> str:
    """Whole commands of ours and the peers, where both ran."""
    rows, notes = [], []
    for size, entry in results["sizes"].items():
        if not any(name in entry["summary"] for name in PEERS):
            continue
        cache = "warm" if entry["fits_in_memory"] else "cold"
        for name in ("imm-merge", *PEERS):
            it = entry["summary"].get(name, {}).get(cache)
            if it:
                rows.append(
                    [
                        size,
                        NAMES[name],
                        spread(it["wall"], 1, 1),
                        spread(it["to_disk"], 1, 1),
                        spread(it["peak"], 1e9),
                        spread(it["anonymous"], 1e9),
                        f"{it['cpu']['median']:.1f}",
                        str(it["wall"]["n"]),
                    ]
                )
        notes += [f"- {size}, {NAMES[name]}: {reason}." for name, reason in entry["skipped"].items() if name in PEERS]
    head = ["model", "tool", "s", "s, until on the disk", "peak memory GB", "without mapped files GB", "CPU s", "runs"]
    return "\n\n".join([table(head, rows), *(["\n".join(["Left out:\n", *notes])] if notes else [])])


def memory(results: Mapping[str, Any]) -> str:
    """Peak memory of ours by size."""
    rows = []
    for size, entry in results["sizes"].items():
        row = [size, f"{entry['parameters'] / 1e9:.2f} B", f"{entry['bytes_of_a_model'] / 1e9:.2f}"]
        for name in ("imm-merge", "imm-merge --start"):
            caches = entry["summary"].get(name, {}).values()
            largest = max((it["peak"]["max"] for it in caches), default=None)
            row.append(f"{largest / 1e6:.0f}" if largest else "–")
        rows.append(row)
    return table(["model", "parameters", "GB of a model", "two inputs: peak MB", "three inputs: peak MB"], rows)


def kernel(results: Mapping[str, Any]) -> str:
    """ns per parameter."""
    rows = [
        [
            name,
            f"{it['bytes_per_parameter']:g}",
            f"{it['kernel_min']:.2f}",
            f"{it['kernel_median']:.2f}",
            f"{it['memcpy_min']:.2f}",
            f"{it['memcpy_median']:.2f}",
            f"{it['kernel_min'] / it['memcpy_min']:.1f}",
        ]
        for name, it in results.get("kernel", {}).items()
    ]
    head = ["case", "bytes moved", "kernel, least", "median", "memcpy, least", "median", "ratio"]
    return table(head, rows)


def startup(results: Mapping[str, Any]) -> str:
    """What comes before the first byte."""
    labels = {"help": "`imm-merge --help`"}
    rows = [
        [labels.get(name, name), spread(it["wall"]), f"{it['peak']['median'] / 1e6:.0f}"]
        for name, it in results.get("startup", {}).items()
    ]
    return table(["command", "s", "peak memory MB"], rows)


def plans(results: Mapping[str, Any]) -> str:
    """A model of many tensors."""
    rows = [
        [name, spread(it["wall"]), spread(it["cpu"]), f"{it['peak']['median'] / 1e6:.0f}"]
        for name, it in results.get("plans", {}).items()
    ]
    return table(["command", "s", "CPU s", "peak memory MB"], rows)


def forms(results: Mapping[str, Any]) -> str:
    """Each form of input against a plain merge."""
    rows = [
        [name, f"{it['wall']:.2f}", f"{it['ratio']:.2f}", f"{it['cpu']:.2f}", f"{it['cpu_ratio']:.2f}"]
        for name, it in results.get("forms", {}).items()
    ]
    return table(["sft", "s", "times a plain merge", "CPU s", "times"], rows)


def live(results: Mapping[str, Any]) -> str:
    """Models in memory."""
    rows = [
        [f"`{name}`" if "merge to" not in name else name, f"{it['seconds']:.2f}", f"{it['ratio']:.2f}", it["against"]]
        for name, it in results.get("live", {}).items()
    ]
    return table(["what", "s", "times", "of"], rows)


def goals(results: Mapping[str, Any]) -> str:
    """Goals with a limit, and whether they are met."""
    rows = [
        [
            goal["goal"],
            goal["where"],
            f"{goal['value']:g} {goal['unit']}".strip(),
            goal["asked"],
            "yes" if goal["met"] else "**no**",
        ]
        for goal in results["goals"]
        if goal["met"] is not None
    ]
    return table(["goal", "where", "measured", "asked", "met"], rows)


# What the README says of each beside its figures: what its mask depends on, and what happens if it is killed.
BESIDE = {
    "imm-merge": ("`imm-merge`", "seed, round, tensor name, element", "resumes where it stopped"),
    "mergekit-same": ("mergekit {mergekit}", "also the set and order of tensors", "starts over"),
    "sd-mecha": ("sd-mecha {sd-mecha}", "the shape: tensors of one shape share a mask", "starts over"),
    "by-hand": ("a script of twenty lines", "also the order of tensors", "starts over"),
}


def readme(results: Mapping[str, Any]) -> str:
    """The table of the README: 1.5 B with the inputs in the page cache, and what it and 7 B take from the disk."""
    found = results["sizes"]["qwen2.5-1.5b"]["summary"]
    rows = []
    for name, (label, mask, killed) in BESIDE.items():
        it = found[name]["warm"]
        seconds, memory = it["wall"]["median"], it["peak"]["median"] / 1e9
        shown = f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"
        rows.append([label.format(**results["peer_versions"]), shown, f"{memory:.2g} GB", mask, killed])
    cold = found["imm-merge"]["cold"]
    large = results["sizes"]["qwen2.5-7b"]["summary"]["imm-merge"]["cold"]
    models = "two 1.5 B checkpoints in the page cache, two cores, no GPU"
    return (
        f"{table([models, 'seconds', 'memory', 'the mask depends on', 'if it is killed'], rows)}\n\n"
        f"From the disk `imm-merge` takes {cold['wall']['median']:.1f} seconds for these, and"
        f" {large['wall']['median']:.0f} for 7 B, in {large['peak']['median'] / 1e9:.2g} GB. [Numbers](docs/numbers.md)"
        " says how this was measured, and what differs."
    )


def main() -> None:
    """Rewrite the pages, or check them."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit("error: benchmarks/results is empty; run `make bench`")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    parts = {
        "where": where(results, files[-1].name),
        "floor": floor(results),
        "peers": peers(results),
        "memory": memory(results),
        "kernel": kernel(results),
        "startup": startup(results),
        "plans": plans(results),
        "forms": forms(results),
        "live": live(results),
        "goals": goals(results),
    }
    update("numbers.md", parts, __doc__)
    update("../README.md", {"beside": readme(results)}, __doc__)


if __name__ == "__main__":
    main()
