"""The command `imm-analyze importance`: parse, call `measure_importance`, print."""

from __future__ import annotations

import json
from typing import Any

import click

from ..common.messages import shown
from .console import CONTEXT, progress_bar, say, tell, values_checked
from .options import data_options

importance_epilog = """\b
Examples:
  imm-analyze importance base/ --data math.jsonl -o importance.json
  imm-merge base/ sft/ --importance importance.json -o merged/
"""


@click.command(
    "importance",
    short_help="How much each layer matters to the loss.",
    context_settings=CONTEXT,
    epilog=importance_epilog,
)
@click.argument("model")
@data_options
@click.option(
    "-o", "--out", required=True, metavar="FILE", help="Importance file to write, for imm-merge --importance."
)
@click.option(
    "--order",
    type=click.Choice(["first", "second", "mix", "per-sample"]),
    default="first",
    show_default=True,
    help="Summand: |G W| (the paper's Eq. 3), |W F W|, |G W - W F W / 2|, or |g W| of each sample.",
)
@click.option(
    "--accumulate",
    type=click.Choice(["memory", "disk"]),
    default="memory",
    show_default=True,
    help="Where to sum gradients, 4 bytes per parameter; disk: next to the file of -o.",
)
@click.option("-q", "--quiet", is_flag=True, help="Hide the progress bar, notes and the table.")
@click.option("--json", "as_json", is_flag=True, help="Print the content of the file.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def importance_command(model: str, data: str, out: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure how much each layer of MODEL matters to its loss on a data set.

    \b
      I_n = sum of |G * W| over the linear weights W of layer n, G the gradient of the mean loss

    MODEL is a folder or a hub id (org/name[@revision]) that transformers can load.
    """
    from ..options.options import check_device

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
