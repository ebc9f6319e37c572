"""The command `imm-analyze change`: parse, call `diagnose`, print."""

from __future__ import annotations

import json
from typing import Any

import click

from ..console import CONTEXT, progress_bar, say, tell
from ..errors import shown

change_epilog = """\b
Examples:
  imm-analyze change base/ sft/
  imm-analyze change base/ round-1/ round-2/ --importance importance.json -o report/
  imm-analyze change merged/                  the round that it is of, from its report
"""


@click.command("change", context_settings=CONTEXT, epilog=change_epilog)
@click.argument("models", nargs=-1, required=True, metavar="BASE SFT...")
@click.option("--importance", metavar="FILE", help="Importance of the layers: does the change go with it?")
@click.option("-o", "--out", metavar="DIR", help="Folder for change.json, the pictures, and report.html.")
@click.option("--rename", metavar="REGEX=REPL", multiple=True, help="What names of SFT are in BASE; repeatable.")
@click.option(
    "--vocab", type=click.Choice(["strict", "base"]), default="strict", show_default=True,
    help="base: of vocabularies of different sizes compare the rows that both have.",
)  # fmt: skip
@click.option("--keep", metavar="REGEX", multiple=True, help="Tensors of BASE to leave out; repeatable.")
@click.option("--take", metavar="REGEX", multiple=True, help="Tensors of SFT to leave out; repeatable.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: min(4, 2 x CPUs)]")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no notes.")
@click.option("--json", "as_json", is_flag=True, help="Print what change.json holds.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def change_command(models: tuple[str, ...], out: str | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure where the weights of SFT differ from BASE, layer by layer; of several SFTs, side by side.

    \b
      DeltaW = sum of ||W' - W|| over the linear weights W of a layer

    Models are what imm-merge takes. With --importance also: did the layers change that matter?
    """
    from .diagnosis import check_folder, diagnose, write
    from .terminal import view

    folder = None if out is None else check_folder(out)
    with progress_bar("reading", shown=not quiet, rate=lambda rate: f"{rate / 1e9:.2f} G weights/s") as progress:
        found = diagnose(models, progress=progress, **options)
    for note in found.notes if not quiet else ():
        tell(note)
    written = [] if folder is None else write(found, folder)
    if as_json:
        say(json.dumps(found.to_dict(), indent=2))
        return
    if not quiet:
        say(view(found.changes, found.importance, found.mismatches))
    if written and not quiet:
        say(f"\nwritten to {shown(folder)}: {', '.join(path.name for path in written)}")
