"""The import graph of the library, parsed from its source, including imports inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

NAME = "mergekit_imm"
SOURCE = Path(__file__).parents[2] / "src" / NAME

# A package imports only from those before it; `docs/architecture.md` has a line for each.
ROWS = (
    "errors common schedules numerics model options functional checkpoint transforms plan output ranks engine live loop"
    " evaluation synthesis analysis testing views cli __main__"
).split()
ONE_ROW = {"errors", "common"}  # they import each other: errors format messages, checks raise errors
BY_NAME = {"common.lazy", "cli.samples", "numerics.native"}  # import by string: public names, and a user's encoder


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Return the path of every module by its dotted name within the library; its root is ''."""
    parts = {path: path.relative_to(source).with_suffix("").parts for path in sorted(source.rglob("*.py"))}
    return {".".join(part for part in names if part != "__init__"): path for path, names in parts.items()}


def imports_of(name: str, known: Mapping[str, Path]) -> set[str]:
    """Return the library modules that a module imports; 'a string' stands for an import by string."""
    package = name.split(".") if known[name].stem == "__init__" else name.split(".")[:-1]
    package = [part for part in package if part]
    found: set[str] = set()
    for module, names in _imports(ast.parse(known[name].read_text(encoding="utf-8")), package):
        if module is None:
            found.add("a string")
            continue
        if module.split(".")[0] != NAME:
            continue
        target = module.removeprefix(NAME).removeprefix(".")
        while target not in known:  # a missing module fails elsewhere
            target = target.rpartition(".")[0]
        inside = {f"{target}.{each}".removeprefix(".") for each in names}
        found |= (inside & known.keys()) or {target}
        if inside - known.keys():  # a name defined in the module itself
            found.add(target)
    return found - {name}


def _imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Yield each import in a file: the absolute module name, and the imported names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = [NAME, *package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "run_module"):
                yield None, []


def import_graph() -> dict[str, set[str]]:
    """Map every module to its imports."""
    known = modules()
    return {name: imports_of(name, known) for name in known}


def room(name: str) -> str:
    """Return the package of a module."""
    return name.partition(".")[0]


def wrong_way(graph: Mapping[str, set[str]]) -> list[str]:
    """Return imports from a later package, import cycles, and imports that cannot be followed."""
    row = {each: number for number, each in enumerate(ROWS)}
    found = []
    for name, others in graph.items():
        for other in sorted(others):
            one, two = room(name), room(other)
            if other == "a string":
                back = name not in BY_NAME
            elif one == two or {one, two} <= ONE_ROW or name == "":  # the root exports names of every package
                back = False
            else:
                back = other == "" or row[two] > row[one]
            if back:
                found.append(f"{name} imports {other or NAME}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(" is imported by ".join(error.args[1]))
    return found
