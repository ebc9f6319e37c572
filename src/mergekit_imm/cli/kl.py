"""The command `imm-analyze kl`: parse, call `measure_kl`, print."""

from __future__ import annotations

import json
from typing import Any

import click

from .completion import files
from .console import say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options
from .options import data_options
from .progress import progress_bar

kl_epilog = """\b
Examples:
  imm-analyze kl base/ sft/ merged/ --data task.jsonl
  imm-loop base/ ... --gate -kl --tolerance 0.1 \\
    --evaluate 'python eval.py {model} {json} &&
      imm-analyze kl {base} {model} --data task.jsonl \\
        --add-to {json}'
"""


@click.command(
    "kl",
    cls=Command,
    short_help="How far predictions are from the base's.",
    context_settings=CONTEXT,
    epilog=kl_epilog,
)
@click.argument("base", shell_complete=files)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=files)
@data_options
@option(
    "Output",
    "--add-to",
    metavar="FILE",
    shell_complete=files,
    help="Add the number `kl` to a JSON object in FILE, or create it; one MODEL.",
)
@printing_options(quiet="Hide the progress, notes and the table.", as_json="Print the report as JSON.")
def kl_command(
    base: str, models: tuple[str, ...], data: str, add_to: str | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Measure how far the predictions of MODELs are from those of BASE, as a sign of forgetting (arXiv 2509.04259).

    \b
      kl = mean over tokens of
           sum_v p(v) * (log p(v) - log q(v))
      p: BASE, q: MODEL

    BASE and MODELs are folders or hub ids (org/name[@revision]) that transformers can load; a MODEL may be an adapter.
    The texts are those of --data: prompts of the task, with responses of BASE.
    """
    from ..options.values import check_device

    with values_checked():
        check_device(options["device"])
    if add_to is not None and len(models) > 1:
        raise click.UsageError("--add-to takes the number of one MODEL; give one, or leave out --add-to")
    from ..analysis.measured_kl import add_kl, measure_kl, numbers_to_extend
    from ..views.divergence import kl_table

    numbers = None if add_to is None else numbers_to_extend(add_to)  # refuse before loading models
    with progress_bar(
        "measuring", shown=not quiet, rate=lambda per_second: f"{per_second:.2f} sequences/s"
    ) as progress:
        measured = measure_kl(base, models, data, progress=progress, **options)
    for note in measured.notes if not quiet else ():
        tell(note)
    if add_to is not None and numbers is not None:
        add_kl(add_to, numbers, measured.models[models[0]].kl.value)
    if as_json:
        say(json.dumps(measured.content, indent=2))
    elif not quiet:
        say(kl_table(measured.models))
