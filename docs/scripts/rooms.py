"""Draw docs/rooms.svg from the imports of the library, and check what docs/architecture.md says of its files.

    python docs/scripts/rooms.py [--check]

The page's table of packages must be `ROWS` of tests/support/import_graph.py, and every file and name in it must exist.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from import_graph import ONE_ROW, ROWS, SOURCE, import_graph, room  # noqa: E402 - the path is set above

PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "rooms.svg"

# Where a package stands from left to right; its height follows from what it imports.
COLUMNS = {
    "numerics": 1,
    "model": 2,
    "options": 1.5,
    "functional": 0.5,
    "checkpoint": 1.5,
    "transforms": 1.5,
    "plan": 1.5,
    "ranks": 1.5,
    "output": 2.6,
    "engine": 1.5,
    "evaluation": 3.5,
    "schedules": 0,
    "live": 1,
    "testing": 2,
    "analysis": 3,
    "synthesis": 4,
    "loop": 1,
    "views": 2,
    "cli": 2,
}
WIDTH, HEIGHT, BOX, TALL, GAP = 118, 62, 112, 32, 5  # of a column, of a row; of a box, in pixels; around all


def packages() -> dict[str, set[str]]:
    """Each package, and those that it imports; but for those at the bottom, which all import, and the way in."""
    left_out = {*ONE_ROW, "", "__main__"}
    found: dict[str, set[str]] = {name: set() for name in ROWS if name not in left_out}
    for name, others in import_graph().items():
        if room(name) in found:
            found[room(name)] |= {room(other) for other in others} & (found.keys() - {room(name)})
    return found


def direct(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Only the imports that no other way leads to."""

    def reached(name: str) -> set[str]:
        return graph[name].union(*map(reached, graph[name]))

    return {name: {o for o in others if not any(o in reached(way) for way in others)} for name, others in graph.items()}


def heights(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The row of each package: below all that it imports; one that imports nothing stands above its first user."""
    row: dict[str, int] = {}
    for name in ROWS:
        if graph.get(name):
            row[name] = 1 + max(row.get(other, 1) for other in graph[name])
    for name in graph.keys() - row.keys():
        row[name] = min((row[user] for user in graph if name in graph[user]), default=2) - 1
    return row


def picture() -> str:
    """The picture as SVG, in tones for light pages and dark ones."""
    graph = direct(packages())
    if graph.keys() != COLUMNS.keys():
        sys.exit(f"error: COLUMNS of docs/scripts/rooms.py and the packages differ: {graph.keys() ^ COLUMNS.keys()}")
    row = heights(graph)
    places = {name: (GAP + WIDTH * COLUMNS[name], GAP + HEIGHT * row[name]) for name in sorted(graph)}
    width = round(max(x for x, _ in places.values()) + BOX + GAP)
    height = round(max(y for _, y in places.values()) + TALL + GAP)
    lines = [
        f'<path d="M{x + BOX / 2:g} {y:g}L{places[other][0] + BOX / 2:g} {places[other][1] + TALL + 7:g}"/>'
        for name, (x, y) in places.items()
        for other in sorted(graph[name])
    ]
    boxes = [(GAP, GAP, width - 2 * GAP, ", ".join(name for name in ROWS if name in ONE_ROW))]
    boxes += [(x, y, BOX, name) for name, (x, y) in places.items()]
    drawn = [
        f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{TALL}" rx="6"/>'
        f'<text x="{x + wide / 2:g}" y="{y + 21:g}">{name}</text>'
        for x, y, wide, name in boxes
    ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>The packages of mergekit_imm, and which imports which</title>
<style>
rect {{ fill: #2f6fb0 }}
text {{ fill: #ffffff; font: 600 16px system-ui, sans-serif; text-anchor: middle }}
path {{ stroke: #808080; stroke-width: 2; marker-end: url(#head) }}
</style>
<marker id="head" viewBox="0 0 10 10" refX="5" refY="5" markerWidth="5" markerHeight="5" orient="auto">
<polygon points="0,0 10,5 0,10" fill="#808080"/>
</marker>
{chr(10).join([*lines, *drawn])}
</svg>
"""


def faults(page: str) -> list[str]:
    """What the page says and the code does not."""
    table = page.split("| package |")[1].split("\n\n")[0]
    first = [
        name.strip("/")
        for cell in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    ]
    found = [] if first == list(ROWS) else [f"the table has {' '.join(first)}, the code {' '.join(ROWS)}"]
    for names, file in re.findall(r"((?:`[\w.]+`(?:, | and ))*`[\w.]+`) in `([\w/]+\.py)`", page):
        text = (SOURCE / file).read_text(encoding="utf-8") if (SOURCE / file).exists() else ""
        found += [
            f"{file} has no {name}"
            for name in re.findall(r"`([^`]+)`", names)
            if not re.search(rf"^(?:\s*(?:async )?(?:def|class) )?\s*{name.rpartition('.')[2]}\b", text, re.MULTILINE)
        ]
    bases = (SOURCE, ROOT)
    for path in re.findall(r"`([\w/]+\.py|\w+(?:/\w+)*/)`", page):
        found += [] if any((base / path).exists() for base in bases) else [f"there is no {path}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if one of them is stale")
    check = parser.parse_args().check
    if wrong := faults(PAGE.read_text(encoding="utf-8")):
        sys.exit("error: docs/architecture.md: " + "; ".join(wrong))
    drawn = picture()
    if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn:
        if check:
            sys.exit("error: docs/rooms.svg is stale; run `python docs/scripts/rooms.py`")
        PICTURE.write_text(drawn, encoding="utf-8")
        print("docs/rooms.svg drawn")


if __name__ == "__main__":
    main()
