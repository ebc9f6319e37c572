"""The numbers that evaluate commands write: read, listed by model, and judged by a gate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..common.json_files import numbers_in, parse_json, read_small
from ..common.messages import shown
from ..errors import CheckpointError
from .state import Settings, State, candidate, measured, without_sign

# What the rows of a loop are called.
TITLES = {
    "base": "base",
    "sft": "SFT",
    "candidate": "Candidate",
    "merged": "Merge",
    "baseline": "SFT without merges",
}


def read_metrics(path: Path, settings: Settings) -> dict[str, float]:
    """Return the numbers in a file; nested ones under dotted names.

    Raises CheckpointError if there are none, for one that is not finite, and if one is missing that the settings name.
    """
    try:
        content = parse_json(read_small(path))
    except OSError as error:
        raise CheckpointError(
            f"the evaluate command ended with status 0, but {shown(path)} cannot be read: {error.strerror}; it must"
            " write its numbers to {json}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{shown(path)}, which the evaluate command wrote, is not JSON: {error}") from error
    found = numbers_in(content)
    if not isinstance(content, dict) or not found:
        raise CheckpointError(
            f"{shown(path)}, which the evaluate command wrote, is not a JSON object with numbers in it"
        )
    wrong = next((key for key, value in found.items() if not math.isfinite(value)), None)
    if wrong is not None:
        raise CheckpointError(f"{shown(path)}: '{shown(wrong)}' is {found[wrong]}, which cannot be compared")
    for name, who in ((settings.gate, "the gate"), (settings.metric, "the choice of alpha")):
        wanted = without_sign(name or "")[0]
        if wanted and wanted not in found:
            raise CheckpointError(
                f"{shown(path)} has no '{shown(wanted)}', which {who} asks for, but {', '.join(map(shown, found))}"
            )
    return found


def gate_refusal(state: State, number: int) -> str:
    """Return why the gate refuses a round; "" if it accepts."""
    if state.settings.gate is None:
        return ""
    name, sign = without_sign(state.settings.gate)
    last = "base" if number == 0 else f"{number - 1}/merged"
    before, now = state.metrics[last][name], state.metrics[f"{number}/merged"][name]
    if sign * (now - before) >= -state.settings.tolerance:
        return ""
    return f"{shown(name)} is {now:g} after {before:g}"


def rows(state: State) -> list[dict[str, Any]]:
    """Return a row for each evaluated model: round, kind, title, alpha if it is a merge, metrics.

    Where alpha was chosen, the candidates that were not kept stand with the merged model in the order of their alphas.
    """
    found: list[dict[str, Any]] = []

    def add(number: int | None, kind: str, alpha: float | None, name: str) -> None:
        if name in state.metrics:
            title = TITLES[kind] + ("" if number is None else f" {number}")
            found.append(
                {"round": number, "kind": kind, "title": title, "alpha": alpha, "metrics": state.metrics[name]}
            )

    add(None, "base", None, "base")
    for number in range(state.settings.rounds):
        add(number, "sft", None, f"{number}/sft")
        kept = state.alphas.get(str(number))
        tried = [(alpha, "candidate", candidate(number, alpha)) for alpha in measured(state, number) if alpha != kept]
        for alpha, kind, name in sorted([*tried, *([] if kept is None else [(kept, "merged", f"{number}/merged")])]):
            add(number, kind, alpha, name)
        shared = "0/sft" if number == 0 and state.settings.baseline else ""  # round 0 has one sft
        add(number, "baseline", None, shared or f"{number}/baseline")
    return found
