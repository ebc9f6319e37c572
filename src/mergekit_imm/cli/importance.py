"""The command `imm-analyze importance`: parse, call `measure_importance`, print."""

from __future__ import annotations

import json
from typing import Any

import click

from ..common.messages import shown
from .completion import files
from .console import say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options
from .options import data_options
from .progress import progress_bar

importance_epilog = """\b
Examples:
  imm-analyze importance base/ --data qa.jsonl -o imp.json
  imm-merge base/ sft/ --importance imp.json -o merged/
"""


@click.command(
    "importance",
    cls=Command,
    short_help="How much each layer matters to the loss.",
    context_settings=CONTEXT,
    epilog=importance_epilog,
)
@click.argument("model", shell_complete=files)
@data_options
@option(
    "Measure",
    "--order",
    type=click.Choice(["first", "second", "mix", "per-sample"]),
    default="first",
    show_default=True,
    help="Summand: |G W| (the paper's Eq. 3), |W F W|, |G W - W F W / 2|, or |g W| of each sample.",
)
@option(
    "Output",
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    shell_complete=files,
    help="Importance file to write, for imm-merge --importance.",
)
@option(
    "Running",
    "--accumulate",
    type=click.Choice(["memory", "disk"]),
    default="memory",
    show_default=True,
    help="Where to sum gradients, 4 bytes per parameter; disk: next to the file of -o.",
)
@printing_options(quiet="Hide the progress, notes and the table.", as_json="Print the content of the file.")
def importance_command(model: str, data: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure how much each layer of MODEL matters to its loss on a data set.

    \b
      I_n = sum of |G * W| over the linear weights W
            of layer n; G: gradient of the mean loss

    MODEL is a folder or a hub id (org/name[@revision]) that transformers can load.
    """
    from ..options.values import check_device

    with values_checked():
        check_device(options["device"])
    from ..analysis.measured import measure_importance
    from ..views.change_terminal import importance_table

    with progress_bar(
        "measuring", shown=not quiet, rate=lambda per_second: f"{per_second:.2f} sequences/s"
    ) as progress:
        measured = measure_importance(model, data, out, progress=progress, **options)
    for note in measured.notes if not quiet else ():
        tell(note)
    if as_json:
        say(json.dumps(measured.content, indent=2))
    elif not quiet:
        say(importance_table(measured.importance))
        say(f"written to {shown(out)}")
