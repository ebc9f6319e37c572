"""From models to a diagnosis, and from that to files: what `imm-analyze change` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.disk import make_folder, replace_file
from ..checkpoint.output import expanded, output_errors
from ..errors import ArgumentError, OutputError, shown
from ..importance import read_layers
from ..json_input import parse_json, read_small
from ..layers import resolve_layers
from ..recipe import to_json
from .change import CHANGE_FORMAT, CHANGE_VERSION, WeightChange, checkpoint_change, reported_change
from .mismatch import Mismatch, mismatch

FILES = ("change.json", "change.png", "change.svg", "kinds.png", "kinds.svg", "mismatch.png", "mismatch.svg",
         "report.html")  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """Changes of one or several models against one base, and how each goes with an importance if one is given."""

    base: str
    changes: Mapping[str, WeightChange]
    importance: Mapping[str, float] | None
    mismatches: Mapping[str, Sequence[Mismatch]]
    provenance: Mapping[str, str]  # what the numbers are of, for readers
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, which change.json holds."""
        return {
            "format": CHANGE_FORMAT,
            "version": CHANGE_VERSION,
            "base": self.base,
            "changes": {name: change.to_dict() for name, change in self.changes.items()},
            "importance": None if self.importance is None else dict(self.importance),
            "mismatches": {name: [each.to_dict() for each in found] for name, found in self.mismatches.items()},
            "provenance": dict(self.provenance),
        }


def diagnose(
    models: Sequence[str],
    *,
    importance: str | None = None,
    rename: Sequence[str] = (),
    vocab: str = "strict",
    keep: Sequence[str] = (),
    take: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Measure where models changed: BASE and one SFT or more, or one folder that `imm-merge` made, of its own round.

    `importance` is a file of layer importances; the other options are those of `checkpoint_change`. Raises MergeError.
    """
    sizes: dict[str, float] | None = None
    provenance: dict[str, str] = {}
    if importance is not None:
        sizes, content = read_layers(importance, "importance")
        provenance["importance"] = _told(importance, content)
    changes: dict[str, WeightChange]
    notes: list[str] = []
    if len(models) == 1:
        if rename or keep or take or vocab != "strict":
            raise ArgumentError(
                f"{shown(models[0])} is one model, whose report is read; give BASE and SFT with these options"
            )
        changes = {models[0]: reported_change(models[0])}
        provenance = {"change": f"sft - start of the round that {models[0]} is, from its report"} | provenance
        base = models[0]
    else:
        base, *sfts = models
        twice = {each for each in sfts if sfts.count(each) > 1}
        if twice:
            raise ArgumentError(f"{shown(min(twice))} is given twice; give each model once")
        changes = {}
        for number, sft in enumerate(sfts):

            def advance(done: int, total: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * total + done, len(sfts) * total)

            changes[sft], told = checkpoint_change(
                base, sft, rename=rename, vocab=vocab, keep=keep, take=take, workers=workers, progress=advance
            )
            notes += told
        provenance = {"change": f"of {', '.join(sfts)} against {base}"} | provenance
    found: dict[str, list[Mismatch]] = {}
    if sizes is not None:
        names = [f"{layer}.weight" for change in changes.values() for layer in change.layers]
        sizes = resolve_layers(sizes, names)
        found = {name: mismatch(sizes, change) for name, change in changes.items()}
    return Diagnosis(base, changes, sizes, found, provenance, tuple(dict.fromkeys(notes)))


def _told(file: str, content: Mapping[str, Any]) -> str:
    """What an importance file says of itself, as far as it does."""
    said = []
    for label, place in (("order", ("order",)), ("model", ("model", "path")), ("data", ("data", "file")),
                         ("sequences", ("sequences",)), ("tokens", ("tokens",))):  # fmt: skip
        value: Any = content
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str | int):
            said.append(f"{label} {value}")
    return f"{file}{': ' if said else ''}{', '.join(said)}"


def check_folder(typed: str) -> Path:
    """Return the folder to write to. Raises OutputError if it holds files of these names that are not a diagnosis's."""
    folder = expanded(typed)
    with output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {shown(typed)} is no folder; give another")
        there = [name for name in FILES if (folder / name).exists()]
        if there:
            try:
                content = parse_json(read_small(folder / FILES[0]))
                is_ours = isinstance(content, dict) and content.get("format") == CHANGE_FORMAT
            except (OSError, ValueError):
                is_ours = False
            if not is_ours:
                raise OutputError(
                    f"{shown(folder / there[0])} is there, and {shown(typed)} holds no earlier diagnosis; give another"
                    " folder"
                )
    return folder


def write(found: Diagnosis, folder: Path) -> list[Path]:
    """Write change.json, the pictures and report.html into a folder; return their paths. Needs matplotlib."""
    from . import pictures
    from .page import html_page

    figures = {
        "change": ("Change of each layer", pictures.draw_change(found.changes)),
        "kinds": ("Relative change of each kind of weight", pictures.draw_kinds(found.changes)),
    }
    last = list(found.changes)[-1]
    if found.importance is not None:
        figures["mismatch"] = (
            f"Importance against change, {last}",
            pictures.draw_mismatch(found.importance, found.changes[last], found.mismatches[last]),
        )
    shown_first = sorted(figures, key=lambda name: name != "mismatch")
    svgs = {figures[name][0]: pictures.to_svg(figures[name][1]) for name in shown_first}
    page = html_page(found.changes, svgs, found.provenance, found.importance, found.mismatches)
    with output_errors(folder):
        make_folder(folder)
        paths = [folder / FILES[0], folder / "report.html"]
        replace_file(paths[0], to_json(found.to_dict()))
        replace_file(paths[1], page)
        for name, (_, figure) in figures.items():
            paths += pictures.save(figure, folder, name)
    return paths
