"""The command `imm-analyze samples`: parse, compare, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.checks import check_count
from ..common.messages import shown
from ..errors import ArgumentError
from .completion import files, folders
from .console import pictures_or_note, say
from .help import CONTEXT, Command, option, printing_options
from .options import Number

if TYPE_CHECKING:
    from ..evaluation.comparison import Encoder

samples_epilog = """\b
A line of FILE; problem, response, and correct or answer
are required:
  {"problem": "gsm8k-17", "response": "...",
   "correct": true, "confidence": 0.8, "model": "round 0",
   "greedy": false, "level": 3, "ood": false}

\b
Example:
  imm-analyze samples base.jsonl sft.jsonl -o report/
"""


@click.command(
    "samples",
    cls=Command,
    short_help="Whether a gain is real: pass@k, diversity and a verdict.",
    context_settings=CONTEXT,
    epilog=samples_epilog,
)
@click.argument("samples", nargs=-1, required=True, metavar="FILE...", shell_complete=files)
@option("Comparison", "--reference", metavar="NAME", help="Model to compare the others with.  [default: the first]")
@option(
    "Comparison",
    "--cut/--no-cut",
    default=True,
    help="Judge each response only up to where it goes on to another question.  [default: --cut]",
)
@option(
    "Comparison",
    "--encoder",
    metavar="MODULE:FUNCTION",
    help="Function from a list of texts to an array of vectors, for cosine diversity.",
)
@option(
    "Comparison",
    "--seed",
    type=Number(int, lambda value: check_count("seed", value, 0), "x>=0"),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the draws that measure diversity.",
)
@option(
    "Output",
    "-o",
    "--out",
    metavar="DIR",
    shell_complete=folders,
    help="Write samples.json and pictures to this folder.",
)
@printing_options(quiet="Print the verdicts only.", as_json="Print the report as JSON.")
def samples_command(
    samples: tuple[str, ...],
    reference: str | None,
    encoder: str | None,
    seed: int,
    cut: bool,
    out: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare models by their samples, to see whether a gain is real: pass@k, diversity, gains and losses, OOD,
    calibration.

    Each number has an interval over problems. The verdict says whether pass@1 rose while something else got worse.
    Samples are JSON lines; "greedy": true marks a problem's greedy answer.
    """
    from ..evaluation.comparison import FORMAT, compare
    from ..evaluation.samples import read_samples
    from ..output.result_folder import check_folder, write_folder
    from ..views.samples import FILES, table, verdicts

    if encoder and not all(encoder.partition(":")):
        raise click.UsageError(f"--encoder '{shown(encoder)}' is not MODULE:FUNCTION; write my_encoder:encode")
    folder = check_folder(out, FILES, FORMAT) if out else None  # fail before an hour of encoding
    encode = _load(encoder) if encoder else None
    report = compare(read_samples(samples, cut=cut), reference=reference, encoder=encode, seed=seed)
    plain = report.to_dict()
    if as_json:
        say(json.dumps(plain, indent=2))
    else:
        parts = [verdicts(report)] if quiet else [table(report), verdicts(report)]
        text = "\n\n".join(part for part in parts if part)
        if text:
            say(text)
    if folder:
        from ..views.samples import pictures

        drawn = pictures_or_note(lambda: pictures(report), quiet=quiet) or {}
        content = (json.dumps(plain, indent=2) + "\n").encode()
        written = write_folder(folder, {"samples.json": content, **drawn}, FILES)
        if not (as_json or quiet):
            say(f"written to {', '.join(map(shown, written))}")


def _load(name: str) -> Encoder:
    """Load MODULE:FUNCTION, also from the current folder."""
    import importlib
    import sys

    module, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        loaded: Any = importlib.import_module(module)
    except Exception as error:  # the module may do anything
        raise ArgumentError(
            f"--encoder: {shown(module)} cannot be imported: {type(error).__name__}: {shown(error, 200)}"
        ) from error
    finally:
        sys.path.remove(here)
    encode = getattr(loaded, function, None)
    if not callable(encode):
        raise ArgumentError(f"--encoder: {shown(module)} has no function '{shown(function)}'")

    def checked(texts: list[str]) -> Any:
        try:
            return encode(texts)
        except Exception as error:  # from the user's code
            raise ArgumentError(
                f"--encoder {shown(name)} failed: {type(error).__name__}: {shown(error, 200)}; try it on a few texts"
            ) from error

    return checked
