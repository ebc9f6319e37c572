"""Write what `make thorough` saw into docs/nothing-lost.md.

python docs/scripts/lost.py [--check]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pages import DOCS, update

from results import table

RESULTS = DOCS.parent / "tests" / "lost" / "results.json"
SCENARIOS = {
    "plain": "a new output",
    "overwrite": "`--overwrite`",
    "no-exchange": "`--overwrite`, two renames",
    "restart": "`--restart` over another recipe's unfinished merge",
    "resume": "an unfinished merge resumed, with foreign files in it",
    "verify": "`--verify`",
    "refused": "an input is refused late",
    "sweep": "a sweep of two",
}


def where(part: Mapping[str, Any]) -> str:
    """When, and on what."""
    return f"{part['date']}, {part['git']}, {part['cpu']}, Linux {part['kernel']}, Python {part['python']}."


def calls(results: Mapping[str, Any]) -> str:
    """Kills and power failures, by scenario."""
    rows = []
    for name, label in SCENARIOS.items():
        killed, power = (results[part]["scenarios"][name] for part in ("calls", "power"))
        rows.append(
            [
                label,
                str(killed["calls"]),
                str(killed["tried"]),
                str(power["most_unsynced"]),
                str(power["tried"]),
                str(len(killed["failures"]) + len(power["failures"])),
            ]
        )
    total = [sum(int(row[column]) for row in rows) for column in (2, 4, 5)]
    rows.append(["together", "", str(total[0]), "", str(total[1]), str(total[2])])
    head = ["merge", "calls that change files", "killed", "most calls unsynced", "power failures", "went wrong"]
    return f"{table(head, rows)}\n\n{where(results['power'])}"


def signals(results: Mapping[str, Any]) -> str:
    """Signals at random moments."""
    kinds = sorted({kind for each in results["signals"]["signals"].values() for kind in each["found"]})
    rows = [
        [
            f"SIG{name}",
            str(each["tried"]),
            *(str(each["found"].get(kind, 0)) for kind in kinds),
            str(len(each["failures"])),
        ]
        for name, each in results["signals"]["signals"].items()
    ]
    return (
        f"{table(['signal', 'sent', *(f'OUT: {k}' for k in kinds), 'went wrong'], rows)}\n\n{where(results['signals'])}"
    )


def damage(results: Mapping[str, Any]) -> str:
    """Damaged inputs, by how they ended."""
    part = results["damage"]
    names = {"merged": "merged: it was still a model"}
    rows = [[names.get(kind, f"`{kind}`"), str(count)] for kind, count in part["endings"].items()]
    return f"{table(['how it ended', 'inputs'], [*rows, ['together', str(part['tried'])]])}\n\n{where(part)}"


def main() -> None:
    """Rewrite the page, or check it."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    makers = {"calls": calls, "signals": signals, "damage": damage}
    needs = {"calls": {"calls", "power"}, "signals": {"signals"}, "damage": {"damage"}}
    parts = {n: make(results) if needs[n] <= set(results) else "Not run yet." for n, make in makers.items()}
    update("nothing-lost.md", parts, __doc__)


if __name__ == "__main__":
    main()
