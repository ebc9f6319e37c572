"""The command `imm-analyze change`: parse, measure, print, write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.messages import shown
from ..errors import OutputError
from .completion import files, folders
from .console import pictures_or_note, say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options
from .options import options_of
from .progress import progress_bar

if TYPE_CHECKING:
    from ..analysis.verdict import ModelChange

FORMAT = "mergekit_imm change"
FILES = ("change.json", "report.html", "change.png", "change.svg", "mismatch.png", "mismatch.svg")
TWO = ("rename", "keep", "take", "leave_out", "dequantize")

change_epilog = """\b
Examples:
  imm-analyze change base/ sft/
  imm-analyze change base sft --importance imp.json -o out
  imm-analyze change base/ run/round-0/sft run/round-1/sft
  # that round's change, from its report
  imm-analyze change merged/
"""


@click.command(
    "change",
    cls=Command,
    short_help="Where the weights changed, and whether they matter there.",
    context_settings=CONTEXT,
    epilog=change_epilog,
)
@click.argument("models", nargs=-1, required=True, metavar="BASE SFT [MORE...] | MERGED", shell_complete=files)
@options_of(
    "importance",
    "rename",
    "keep",
    "take",
    "leave_out",
    "dequantize",
    "vocab",
    importance={"heading": "Inputs", "help": "JSON file of layer importances, to compare the change with."},
    rename={"help": "Rename tensors of SFT to BASE's names; repeatable."},
    keep={"heading": "Inputs", "help": "Ignore matching tensors of BASE; repeatable."},
    take={"heading": "Inputs", "help": "Ignore matching tensors of SFT; repeatable."},
    leave_out={"help": "Ignore a file or folder, by its path in the model; repeatable."},
    dequantize={"help": "Multiply FP8 weights by their scales."},
    vocab={
        "default": "base",
        "help": "Vocabularies of different sizes: strict refuses them; base and sft compare the common rows.",
    },
)
@option(
    "Output",
    "-o",
    "--out",
    metavar="DIR",
    shell_complete=folders,
    help="Write report.html, change.json and pictures to this folder.",
)
@options_of("workers")
@printing_options(quiet="Print only errors (and --json).", as_json="Print the numbers as JSON.")
def change_command(
    models: tuple[str, ...], importance: str | None, out: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Measure how far each layer moved from BASE to SFT: the sum of ||W - W'|| over its weight matrices (Eq. 4).

    Several SFT are shown side by side, each against BASE. For a single folder made by imm-merge, shows the change of
    that round from its imm_report.json, without reading weights.
    """
    from ..analysis.verdict import ModelChange, mismatch, same_layers
    from ..options.options import MergeOptions
    from ..views.change_page import described

    if len(models) == 1 and (options["vocab"] != "base" or any(options[x] for x in TWO)):
        raise click.UsageError(f"--{', --'.join(TWO)} and --vocab apply to two models; give BASE and SFT")
    with values_checked():
        MergeOptions(rename=options["rename"], keep=options["keep"], take=options["take"])
    folder = None if out is None else _checked(out, models)
    weights, about = _importance(importance)
    facts = {} if importance is None else {"importance": shown(importance), **described(about)}
    comparisons = []
    for label, change in _changes(models, quiet=quiet, **options):
        compared = None if weights is None else mismatch(weights, change)
        comparisons.append(ModelChange(label, change, compared))
        if not quiet:
            for note in change.notes:
                tell(note)
    if weights is not None:
        weights = same_layers(weights, comparisons[0].change)
    base = models[0] if len(models) > 1 else None
    content = {
        "format": FORMAT,
        "version": 1,
        "base": base,
        "importance": None if weights is None else {"file": importance, **about, "layers": weights},
        "changes": [
            {
                "model": one.label,
                **one.change.to_dict(),
                "mismatch": None if one.mismatch is None else one.mismatch.to_dict(),
            }
            for one in comparisons
        ],
    }
    text = json.dumps(content, indent=2) + "\n"
    written = (
        []
        if folder is None
        else _write(folder, comparisons, weights, text, _provenance(base, comparisons) | facts, quiet=quiet)
    )
    if as_json:
        say(text.rstrip("\n"))
    elif not quiet:
        from ..views.change_terminal import render

        say(render(comparisons, weights))
    if not quiet:
        for path in written:
            tell(f"wrote {shown(path)}")


def _changes(models: tuple[str, ...], *, quiet: bool, **options: Any) -> Any:
    """Yield each model's label and change."""
    from ..analysis.change import checkpoint_change, reported_change

    if len(models) == 1:
        yield models[0], reported_change(models[0])
        return
    base, *others = models
    for sft in others:
        with progress_bar(f"measuring {shown(sft, 40)}", shown=not quiet, rate=_read) as progress:
            change = checkpoint_change(base, sft, progress=progress, **options)
        yield sft, change


def _read(per_second: float) -> str:
    return f"{per_second / 1e9:.2f} GB/s of float32"


def _importance(path: str | None) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """Read an importance file: its values, and what it says about them (model, data)."""
    if path is None:
        return None, {}
    from ..options.layer_factors import importance_factors, read_layers

    values, content = read_layers(path, "importance")
    importance_factors(values)
    about = {str(k): v for k, v in content.items() if k not in ("layers", "file")} if "layers" in content else {}
    return values, about


def _provenance(base: str | None, comparisons: list[ModelChange]) -> dict[str, str]:
    rows = {} if base is None else {"base": base}
    for i, each in enumerate(comparisons, 1):
        rows[f"model {i}" if len(comparisons) > 1 else "model"] = each.label
    return rows


def _checked(out: str, models: tuple[str, ...]) -> Path:
    """Return the output folder; refuse one that cannot be written before anything is measured."""
    from ..output.result_folder import check_folder

    folder = check_folder(out, FILES, FORMAT)
    if folder.resolve() in [Path(each).expanduser().resolve() for each in models]:
        raise OutputError(f"output {shown(out)} is the folder of a measured model; give another")
    return folder


def _write(
    folder: Path,
    comparisons: list[ModelChange],
    weights: dict[str, float] | None,
    text: str,
    provenance: dict[str, str],
    *,
    quiet: bool,
) -> list[Path]:
    """Write the numbers, the pictures and the page, each file atomically."""
    from ..output.result_folder import write_folder
    from ..views.change_figure import pictures_of, svgs_of
    from ..views.change_page import html_page

    def draw() -> tuple[dict[str, bytes], list[bytes], dict[int, list[bytes]]]:
        return pictures_of(comparisons, weights), *svgs_of(comparisons, weights)

    pictures, shared, own = pictures_or_note(draw, quiet=quiet) or ({}, [], {})
    files = {"change.json": text.encode(), **pictures}
    files["report.html"] = html_page(comparisons, weights, provenance, shared, own).encode()
    return write_folder(folder, files, FILES)
