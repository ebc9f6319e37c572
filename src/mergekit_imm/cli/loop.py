"""The command `imm-loop`: parse, call `run_loop`, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..common.messages import shown
from ..numerics.dtypes import OUTPUT_DTYPES
from ..options.options import LOOP_OPTIONS
from .completion import files, folders, words
from .console import pictures_or_note, say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options, version_option
from .options import DtypeChoice, Number, options_of
from .progress import LogLines

loop_epilog = """\b
Placeholders, each filled in as one shell word
(a misspelt one is an error; other braces are left alone):
  --generate   {model} {output} {round} {base}
  --train      {model} {output} {data} {round} {base}
  --evaluate   {model} {json} {round} {base}
{round} counts from 0. {data} is the output of --generate.

\b
Example:
  imm-loop base/ --rounds 3 -o run/ \\
    --generate 'python sample.py {model} {output}' \\
    --train 'python sft.py {model} {data} {output}' \\
    --evaluate 'python eval.py {model} {json}'
"""


@click.command(
    "imm-loop",
    cls=Command,
    short_help="Alternate training, by your commands, and merging.",
    context_settings=CONTEXT,
    epilog=loop_epilog,
)
@click.argument("base", shell_complete=files)
@option("Commands", "--train", required=True, metavar="COMMAND", help="Fine-tune {model}; save the result in {output}.")
@option(
    "Commands",
    "--generate",
    metavar="COMMAND",
    help="Generate the round's training data with {model}, in {output}.",
)
@option("Commands", "--evaluate", metavar="COMMAND", help="Measure {model}; write numbers to {json}.")
@option(
    "Rounds",
    "--rounds",
    type=Number(int, allowed="x>=1"),
    default=3,
    show_default=True,
    metavar="N",
    help="Number of rounds; a finished loop may get more.",
)
@option(
    "Rounds",
    "--keep-rounds",
    type=Number(int, allowed="x>=1"),
    metavar="N",
    help="Keep the models of the last N rounds; delete older ones.",
)
@option("Rounds", "--baseline", is_flag=True, help="Also run the same rounds without merging, for comparison.")
@option(
    "Merge",
    "--alpha",
    default="0.5",
    show_default=True,
    metavar="SCHEDULE",
    help="Weight of the anchor: 0.5; one value per round, 0.3,0.5,0.7; linear:0.3,0.7; cosine:0.3,0.7; or in each"
    " round the best by --metric, choose:0.2,0.4,0.6,0.8 or choose:auto.",
)
@option(
    "Merge",
    "--drop",
    default="0.2",
    show_default=True,
    metavar="SCHEDULE",
    help="Fraction of the delta's elements to drop; a schedule like --alpha.",
)
@options_of("seed", seed={"help": "Seed of the drop masks, together with the round."})
@option(
    "Merge",
    "--anchor",
    default="base",
    show_default=True,
    metavar="WHAT",
    shell_complete=words("base", "previous", "ema:"),
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
@option(
    "Selection",
    "--metric",
    metavar="METRIC",
    help="Choose alpha by METRIC, on held-out data; write -METRIC if lower is better.",
)
@option(
    "Selection",
    "--gate",
    metavar="METRIC",
    help="Accept a round only if METRIC did not fall; write -METRIC if lower is better.",
)
@option(
    "Selection",
    "--tolerance",
    type=Number(float, allowed="x>=0"),
    default=0.0,
    show_default=True,
    metavar="X",
    help="How far METRIC may fall.",
)
@option(
    "Selection",
    "--retry",
    metavar="A[,A...]",
    help="Larger alphas to try, in order, when the gate rejects a round.",
)
@option(
    "Output",
    "-o",
    "--out",
    "run",
    required=True,
    metavar="RUN",
    shell_complete=folders,
    help="Folder of the loop; run the same command again to resume.",
)
@printing_options(
    quiet="Hide steps and command output; logs keep the output.", as_json="Print the final state of the loop as JSON."
)
@version_option("imm-loop")
def loop_command(base: str, run: str, quiet: bool, as_json: bool, retry: str | None, **options: Any) -> None:
    """Alternate training and merging, starting from BASE: your commands train, and each round is merged back.

    \b
      start  = BASE in round 0, then the last merged
      tuned  = start + factor * DARE(sft - start)
      merged = alpha * anchor + (1 - alpha) * tuned

    Commands run under /bin/sh -c. If one fails, so does the loop, with the same exit status. Run the same command
    again to resume an interrupted loop at its unfinished step.
    """
    from ..loop.commands import CommandError, to_stdout
    from ..loop.run import run_loop
    from ..loop.state import check_commands, from_dict, load
    from ..output.paths import expanded
    from ..views.loop_summary import notes, plot, table

    try:
        alphas = tuple(float(part) for part in retry.split(",")) if retry else ()
    except ValueError as error:
        raise click.UsageError(f"--retry '{shown(retry)}' is not a list of numbers; write 0.6,0.7") from error
    found = load(expanded(run))
    with values_checked():
        settings = from_dict({**options, "base": base, "retry": alphas})
        check_commands(settings, found)
    speak = not (quiet or as_json)
    lines = None if not speak or sys.stdout.isatty() else LogLines(to_stdout)

    def told(text: str) -> None:
        if lines:
            lines.flush()
        tell(text)

    try:
        state = run_loop(settings, run, echo=(lines or to_stdout) if speak else None, tell=told if not quiet else None)
    except CommandError as error:
        for line in () if speak else error.lines:  # not shown yet
            tell(shown(line, 500))
        raise
    finally:
        if lines:
            lines.flush()
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
