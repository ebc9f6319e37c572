"""The command `imm-loop`: parse, call `run_loop`, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..common.messages import shown
from ..common.version import __version__
from ..numerics.dtypes import OUTPUT_DTYPES
from ..options.options import LOOP_OPTIONS
from .console import (
    CONTEXT,
    pictures_or_note,
    say,
    tell,
    values_checked,
)
from .options import DtypeChoice, options_of

loop_epilog = """\b
Placeholders, each filled in as one shell word (a misspelt one is an error; other braces are left alone):
  --generate   {model} {output} {round} {base}
  --train      {model} {output} {data} {round} {base}     {data}: output of --generate
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
@click.option(
    "-o", "--out", "run", required=True, metavar="RUN", help="Folder of the loop; run the same command again to resume."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Number of rounds.")
@click.option("--train", required=True, metavar="COMMAND", help="Fine-tune {model}; save the result in {output}.")
@click.option("--generate", metavar="COMMAND", help="Generate the round's training data with {model}, in {output}.")
@click.option("--evaluate", metavar="COMMAND", help="Measure {model}; write numbers to {json}.")
@click.option(
    "--alpha",
    default="0.5",
    show_default=True,
    metavar="SCHEDULE",
    help="Weight of the anchor: 0.5; one value per round, 0.3,0.5,0.7; linear:0.3,0.7; cosine:0.3,0.7; or in each"
    " round the best by --metric, choose:0.2,0.4,0.6,0.8 or choose:auto.",
)
@click.option(
    "--metric",
    metavar="METRIC",
    help="Choose alpha by METRIC, on held-out data; write -METRIC if lower is better.",
)
@click.option(
    "--drop",
    default="0.2",
    show_default=True,
    metavar="SCHEDULE",
    help="Fraction of the delta's elements to drop; a schedule like --alpha.",
)
@options_of("seed", seed={"help": "Seed of the drop masks, together with the round."})
@click.option(
    "--anchor",
    default="base",
    show_default=True,
    metavar="WHAT",
    help="Model that merges pull towards: base (the paper), previous, or ema:DECAY of the merged models.",
)
@options_of(
    *(name for name in LOOP_OPTIONS if name != "seed"),
    dtype={
        "type": DtypeChoice(["base", *OUTPUT_DTYPES]),
        "help": "Dtype of float tensors; base: that of the same tensor in BASE.",
    },
    keep={"help": "Copy matching tensors from the anchor; repeatable."},
    take={"help": "Copy matching tensors from the trained model; repeatable."},
    rename={"help": "Rename tensors of trained models to BASE's names; repeatable."},
)
@click.option(
    "--keep-rounds",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the models of the last N rounds; delete older ones.",
)
@click.option(
    "--gate",
    metavar="METRIC",
    help="Accept a round only if METRIC did not fall; write -METRIC if lower is better.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="How far METRIC may fall.",
)
@click.option("--retry", metavar="A[,A...]", help="Larger alphas to try, in order, when the gate rejects a round.")
@click.option("--baseline", is_flag=True, help="Also run the same rounds without merging, for comparison.")
@click.option("-q", "--quiet", is_flag=True, help="Hide steps and command output; logs keep the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the final state of the loop as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-loop")
def loop_command(base: str, run: str, quiet: bool, as_json: bool, retry: str | None, **options: Any) -> None:
    """Alternate training and merging, starting from BASE: your commands train, and each round is merged back.

    \b
      start_0 = BASE; in each round: generate, train start into sft, then
      merged = alpha * anchor + (1 - alpha) * (start + DARE(sft - start)), the next start

    Commands run under /bin/sh -c. If one fails, so does the loop, with the same exit status. Run the same command
    again to resume an interrupted loop at its unfinished step.
    """
    from ..loop.commands import CommandError, to_stdout
    from ..loop.run import run_loop
    from ..loop.state import from_dict
    from ..views.loop_summary import notes, plot, table

    try:
        alphas = tuple(float(part) for part in retry.split(",")) if retry else ()
    except ValueError as error:
        raise click.UsageError(f"--retry '{shown(retry)}' is not a list of numbers; write 0.6,0.7") from error
    with values_checked():
        settings = from_dict({**options, "base": base, "retry": alphas})
    speak = not (quiet or as_json)
    try:
        state = run_loop(settings, run, echo=to_stdout if speak else None, tell=tell if not quiet else None)
    except CommandError as error:
        for line in () if speak else error.lines:  # not shown yet
            tell(shown(line, 500))
        raise
    if as_json:
        say(json.dumps({**state.to_dict(), "notes": notes(state)}, indent=2))
    else:
        say(table(state))
        for note in notes(state):
            say(note)
    pictures = pictures_or_note(lambda: plot(state, Path(run).expanduser()), quiet=quiet) or []
    if not as_json:
        if pictures:
            say(f"pictures: {', '.join(map(str, pictures))}")
        if state.stopped:
            say(state.stopped)
        say(f"the last model is {shown(state.model)}")
