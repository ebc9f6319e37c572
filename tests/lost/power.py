"""What a disk may hold after the power fails: everything that was synced, and any part of the rest.

The model is stricter than real filesystems. A call is durable only if a sync of the file it wrote, or of the folder
whose names it changed, followed; every other call may be lost, whatever came after it, and a write may be torn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .tracing import Call

SECTOR = 512


@dataclass
class Node:
    """A file or a folder."""

    content: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] | None = None  # of a folder


Nodes = dict[int, Node]


def read(folder: Path, nodes: Nodes) -> int:
    """Add a folder to the model; return its inode."""
    number = folder.stat().st_ino
    nodes[number] = Node(entries={})
    for path in folder.iterdir():
        if path.is_dir():
            inner = read(path, nodes)
        else:
            inner = path.stat().st_ino
            nodes[inner] = Node(bytearray(path.read_bytes()))
        nodes[number].entries[path.name] = inner  # type: ignore[index]
    return number


def write(nodes: Nodes, number: int, folder: Path) -> dict[int, int]:
    """Write the model to disk; return its folders' new inodes."""
    folder.mkdir(parents=True)
    found = {number: folder.stat().st_ino}
    for name, inner in (nodes[number].entries or {}).items():
        if nodes[inner].entries is None:
            (folder / name).write_bytes(nodes[inner].content)
        else:
            found |= write(nodes, inner, folder / name)
    return found


def durable(calls: Sequence[Call], end: int) -> list[bool]:
    """Return which of the first `end` calls are certainly on the disk."""
    certain = [False] * end
    synced: set[int] = set()
    for number in range(end - 1, -1, -1):
        call = calls[number]
        if call.kind == "sync":
            synced.add(call.node)
        elif call.kind == "nothing":
            certain[number] = True
        elif call.kind in ("write", "size"):
            certain[number] = call.node in synced
        else:
            certain[number] = call.folder in synced and (not call.to_folder or call.to_folder in synced)
    return certain


def after(nodes: Nodes, calls: Sequence[Call], kept: Callable[[int, Call], float]) -> Nodes:
    """Apply calls to a copy of the model; `kept` gives the share of each: 0 none, 1 all, else a torn write."""
    nodes = {n: Node(bytearray(e.content), None if e.entries is None else dict(e.entries)) for n, e in nodes.items()}
    shuffle = random.Random(len(calls))
    for number, call in enumerate(calls):
        share = kept(number, call)
        if share > 0:
            _apply(nodes, call, share, shuffle)
    return nodes


def _apply(nodes: Nodes, call: Call, share: float, shuffle: random.Random) -> None:
    if call.kind in ("create", "mkdir"):
        folder = nodes.get(call.folder)
        nodes[call.node] = Node(entries=None if call.kind == "create" else {})
        if folder is not None and folder.entries is not None:
            folder.entries[call.name] = call.node
    elif call.kind == "size" and call.node in nodes:
        content = nodes[call.node].content
        del content[call.offset :]
        content.extend(bytes(call.offset - len(content)))
    elif call.kind == "write" and call.node in nodes:
        content = nodes[call.node].content
        content.extend(bytes(max(0, call.offset + len(call.data) - len(content))))
        for first in range(0, len(call.data), SECTOR):
            if share >= 1 or shuffle.random() < share:
                piece = call.data[first : first + SECTOR]
                content[call.offset + first : call.offset + first + len(piece)] = piece
    elif call.kind in ("rename", "exchange", "remove"):
        here = nodes[call.folder].entries if call.folder in nodes else None
        there = nodes[call.to_folder].entries if call.to_folder in nodes else None
        if here is None or call.name not in here:
            return
        if call.kind == "remove":
            del here[call.name]
        elif there is not None and call.kind == "rename":
            there[call.to_name] = here.pop(call.name)
        elif there is not None and call.to_name in there:
            here[call.name], there[call.to_name] = there[call.to_name], here[call.name]


def choices(certain: Sequence[bool], seed: int) -> list[tuple[str, Callable[[int, Call], float]]]:
    """Return ways in which a disk may lose what is not certain."""
    pending = [number for number, it in enumerate(certain) if not it]
    draw = random.Random(seed)
    some = {number: draw.choice([0.0, 0.0, 0.5, 1.0, 1.0]) for number in pending}
    alone = draw.choice(pending) if pending else -1
    return [
        ("none of it", lambda number, _: float(certain[number])),
        ("all of it", lambda *_: 1.0),
        ("all but one call", lambda number, _: float(number != alone)),
        ("one call of it", lambda number, _: float(certain[number] or number == alone)),
        ("its last call", lambda number, _: float(certain[number] or number == max(pending, default=-1))),
        ("some, torn", lambda number, _: some.get(number, 1.0)),
    ]
