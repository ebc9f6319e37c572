"""What the results are held against: each goal with the number that was measured, and whether it is met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from contenders import PEERS
from pair import SIZES

SPEED = {"qwen2.5-1.5b": 20, "qwen2.5-7b": 10}  # times as fast as mergekit
KERNEL = {"bf16": 0.55, "f16": 0.8}  # ns per parameter
WAIT = {"tiny merge": 0.5, "tiny merge, kernel not compiled yet": 3, "dry run, 405 B": 2}  # seconds
PLANS = {"dry run": (20, 1500), "merge": (None, 2000)}  # seconds and MB, of a million tensors
FROM_HALF_A_BILLION = list(SIZES)[list(SIZES).index("qwen2.5-0.5b") :]

Goal = dict[str, Any]


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """All goals that these results say something about; `met` is None where nothing was asked for."""
    found: list[Goal] = []
    for size, entry in results["sizes"].items():
        found += [*_floor(size, entry["summary"]), *_peers(size, entry["summary"])]
    found += _cpu(results)
    return [*found, *_memory(results["sizes"]), *_scaling(results["sizes"]), *_alone(results)]


def goal(
    name: str, where: str, value: float, unit: str, *, most: float | None = None, least: float | None = None
) -> Goal:
    """One goal, with the largest or the least value that meets it."""
    met, asked = None, ""
    if most is not None:
        met, asked = value <= most, f"at most {most:g}"
    elif least is not None:
        met, asked = value >= least, f"at least {least:g}"
    return {"goal": name, "where": where, "value": float(f"{value:.4g}"), "unit": unit, "asked": asked, "met": met}


def _floor(size: str, summary: Mapping[str, Any]) -> Iterator[Goal]:
    for cache, ours in summary.get("imm-merge", {}).items():
        floors = {name: it[cache] for name, it in summary.items() if name.startswith("floor ") and cache in it}
        if not floors:
            continue
        best = min(floors, key=lambda name: floors[name]["stream"]["median"])
        seconds, most = floors[best]["stream"], 1.05 if cache == "cold" else 1.15
        where = f"{size}, {cache}, {best}"
        ratio = ours["stream"]["median"] / seconds["median"]
        yield goal("streaming against the best floor", where, ratio, "times", most=most)
        ratio = ours["stream"]["min"] / seconds["min"]
        yield goal("streaming against the best floor, best of each", where, ratio, "times")
        limit = round(most * seconds["median"] + 0.6, 2)
        yield goal("whole process: that + 0.6 s", where, ours["wall"]["median"], "s", most=limit)


def _cpu(results: Mapping[str, Any]) -> Iterator[Goal]:
    """What a merge computes beside the input and output of the floor that takes least, and the arithmetic."""
    kernel = results.get("kernel", {}).get("bf16", {}).get("kernel_min")
    for size, entry in results["sizes"].items():
        for cache, ours in entry["summary"].get("imm-merge", {}).items():
            floors = [it[cache]["cpu"]["median"] for name, it in entry["summary"].items() if _is_floor(name, it, cache)]
            if kernel and floors and "cpu" in ours:
                beyond = ours["cpu"]["median"] - min(floors) - kernel * entry["parameters"] / 1e9
                most = 3 if size == "qwen2.5-7b" else None
                where = f"{size}, {cache}"
                yield goal("CPU seconds beyond the floor's and the kernel's", where, beyond, "s", most=most)


def _is_floor(name: str, it: Mapping[str, Any], cache: str) -> bool:
    return name.startswith("floor ") and "cpu" in it.get(cache, {})


def _peers(size: str, summary: Mapping[str, Any]) -> Iterator[Goal]:
    for peer in PEERS:
        for cache, theirs in summary.get(peer, {}).items():
            ours = summary.get("imm-merge", {}).get(cache)
            if ours is None:
                continue
            asked = peer.startswith("mergekit") and size in SPEED
            speed = theirs["wall"]["median"] / ours["wall"]["median"]
            yield goal(f"times as fast as {peer}", size, speed, "times", least=SPEED[size] if asked else None)
            less = theirs["peak"]["median"] / ours["peak"]["median"]
            yield goal(f"peak memory of {peer} / ours", size, less, "times", least=40 if asked else None)


def _memory(sizes: Mapping[str, Any]) -> Iterator[Goal]:
    peaks: dict[str, list[float]] = {"imm-merge": [], "imm-merge --start": []}
    for size, entry in sizes.items():
        for contender, found in peaks.items():
            caches = entry["summary"].get(contender, {})
            if caches:
                largest = max(it["peak"]["max"] for it in caches.values())
                yield goal(f"peak memory of {contender}", size, largest / 1e6, "MB", most=256)
                if size in FROM_HALF_A_BILLION:
                    found.append(max(it["peak"]["median"] for it in caches.values()))
    for contender, found in peaks.items():
        if len(found) > 1:
            ratio = max(found) / min(found)
            yield goal(f"peak memory of {contender}, largest / least", "from 0.5 B", ratio, "times", most=1.1)


def _scaling(sizes: Mapping[str, Any]) -> Iterator[Goal]:
    """Slope of log(seconds) over log(bytes): 1 is linear."""
    points, names = [], []
    for size, entry in sizes.items():
        ours = entry["summary"].get("imm-merge", {}).get("cold")
        if ours and size != "tiny":
            names.append(size)
            moved = ours["read"]["median"] + ours["written"]["median"]
            points.append((math.log(moved), math.log(ours["stream"]["median"])))
    if len(points) > 1:
        mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
        where = f"{names[0]} to {names[-1]}, cold"
        yield goal("growth of time with bytes: exponent", where, slope, "", most=1.1)


def _alone(results: Mapping[str, Any]) -> Iterator[Goal]:
    for name, it in results.get("kernel", {}).items():
        yield goal("kernel on one core", name, it["kernel_min"], "ns/parameter", most=KERNEL.get(name))
        yield goal("kernel / memcpy of the same bytes", name, it["kernel_min"] / it["memcpy_min"], "times")
    for name, it in results.get("forms", {}).items():
        if name != "plain":
            most = 2 if name in ("trim", "della") else 1.5
            yield goal("against a plain merge", name, it["ratio"], "times", most=most)
    for name, it in results.get("live", {}).items():
        if name != it["against"]:  # 1.25: 0.8 times the rate
            most = 2 if name.startswith("merge_into") else 1.25
            yield goal(f"time against {it['against']}", name, it["ratio"], "times", most=most)
    for name, it in results.get("startup", {}).items():
        yield goal(
            f"time of: {name}", f"{it['peak']['median'] / 1e6:.0f} MB", it["wall"]["median"], "s", most=WAIT.get(name)
        )
    for name, it in results.get("plans", {}).items():
        seconds, megabytes = PLANS[name.partition(",")[0]]
        yield goal("time", name, it["wall"]["median"], "s", most=seconds)
        yield goal("peak memory", name, it["peak"]["max"] / 1e6, "MB", most=megabytes)
