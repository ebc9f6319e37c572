"""The command `imm-loop`: parse, call `run_loop`, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..common.messages import shown
from ..common.version import __version__
from ..options.options import DTYPES
from .console import (
    CONTEXT,
    pictures_or_note,
    say,
    tell,
    values_checked,
)
from .options import DtypeChoice, options_of

loop_epilog = """\b
Placeholders, each filled in as one word of the shell; a misspelt one is refused, other braces stay:
  --generate   {model} {output} {round} {base}
  --train      {model} {output} {data} {round} {base}     {data}: what --generate made
  --evaluate   {model} {json} {round} {base}

\b
Example:
  imm-loop base/ --rounds 3 -o run/ \\
    --generate 'python sample.py --model {model} --output {output}' \\
    --train 'python sft.py --model {model} --data {data} --output {output}' \\
    --evaluate 'python eval.py --model {model} --output {json}'
"""


@click.command("imm-loop", context_settings=CONTEXT, epilog=loop_epilog)
@click.argument("base")
@click.option("-o", "--out", "run", required=True, metavar="RUN", help="Folder of the loop; the same command goes on.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Rounds in all.")
@click.option("--train", required=True, metavar="COMMAND", help="Fine-tunes {model} into {output}.")
@click.option("--generate", metavar="COMMAND", help="Makes the data of a round, {output}, with {model}.")
@click.option("--evaluate", metavar="COMMAND", help="Measures {model}: writes numbers to {json}.")
@click.option(
    "--alpha",
    default="0.5",
    show_default=True,
    metavar="SCHEDULE",
    help="Weight of the anchor: 0.5; a value for each round, 0.3,0.5,0.7; linear:0.3,0.7; cosine:0.3,0.7.",
)
@click.option("--drop", default="0.2", show_default=True, metavar="SCHEDULE", help="Share that DARE drops; likewise.")
@options_of("seed", seed={"help": "Fixes the masks, with the round."})
@click.option(
    "--anchor",
    default="base",
    show_default=True,
    metavar="WHAT",
    help="What merges pull to: base (the paper), previous, or ema:DECAY of the merged models.",
)
@options_of(
    "importance",
    "shrink",
    "clip",
    "layer_factors",
    "sparsify",
    "reference",
    "dtype",
    "keep",
    "no_drop",
    "take",
    "rename",
    "leave_out",
    "vocab",
    dtype={"type": DtypeChoice(["base", *DTYPES]), "help": "Of the merged models' float tensors."},
    keep={"help": "Tensors to leave as in the anchor; repeatable."},
    take={"help": "Tensors to take from trained models; repeatable."},
    rename={"help": "What names of trained models are in BASE."},
    leave_out={"help": "File or folder of a model that is no weights of it, by its path there; repeatable."},
    vocab={"help": "Whose vocabulary merged models have."},
)
@click.option("--keep-rounds", type=click.IntRange(1), metavar="N", help="Models of older rounds are removed.")
@click.option(
    "--gate",
    metavar="METRIC",
    help="Accept a round only if this number did not fall; -METRIC where less is better.",
)
@click.option("--tolerance", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X", help="Of the gate.")
@click.option("--retry", metavar="A[,A...]", help="Larger alphas to try, in turn, where the gate is closed.")
@click.option("--baseline", is_flag=True, help="Also run the same rounds without merges, to compare.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show what commands say, nor the steps; logs keep it.")
@click.option("--json", "as_json", is_flag=True, help="Print the state of the loop as JSON at its end.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-loop")
def loop_command(base: str, run: str, quiet: bool, as_json: bool, retry: str | None, **options: Any) -> None:
    """Rounds of training and merging from BASE: your commands train, each round is merged back.

    \b
      start_0 = BASE; in each round: generate, train start into sft, then
      merged = alpha * anchor + (1 - alpha) * (start + DARE(sft - start)), the next start

    Commands run under /bin/sh -c. Killed anywhere, the same command goes on with the step that was not finished. Ends
    with the exit status of a command that fails.
    """
    from ..loop.commands import CommandError, to_stdout
    from ..loop.run import run_loop
    from ..loop.state import from_dict
    from ..views.loop_summary import plot, table

    try:
        alphas = tuple(float(part) for part in retry.split(",")) if retry else ()
    except ValueError as error:
        raise click.UsageError(f"--retry '{shown(retry)}' is no list of numbers; write 0.6,0.7") from error
    with values_checked():
        settings = from_dict({**options, "base": base, "retry": alphas})
    speak = not (quiet or as_json)
    try:
        state = run_loop(settings, run, echo=to_stdout if speak else None, tell=tell if not quiet else None)
    except CommandError as error:
        for line in () if speak else error.lines:  # which nobody has seen
            tell(shown(line, 500))
        raise
    if as_json:
        say(json.dumps(state.to_dict(), indent=2))
    else:
        say(table(state))
    pictures = pictures_or_note(lambda: plot(state, Path(run).expanduser()), quiet=quiet) or []
    if not as_json:
        if pictures:
            say(f"drawn in {', '.join(map(str, pictures))}")
        if state.stopped:
            say(state.stopped)
        say(f"the last model is {shown(state.model)}")
