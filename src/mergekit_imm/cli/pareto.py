"""The command `imm-analyze pareto`: read, compare, print."""

from __future__ import annotations

import json

import click

from ..common.messages import shown
from .completion import files, folders
from .console import pictures_or_note, say
from .help import CONTEXT, Command, option, printing_options

FORMAT = "mergekit_imm pareto"

pareto_epilog = """\b
A RESULT is one of these; alpha and drop are those of the
model's recipe:
  run/                  folder of a loop: all models in it
  out-0.3.json          JSON numbers of the model out-0.3/
  out-0.3/metrics.json  the same, in the model's folder
  out-0.3/              the first of these two that exists

\b
Example:
  imm-analyze pareto out-*.json --in gsm8k.accuracy \\
    --out -wikitext.perplexity -o report/
"""


@click.command(
    "pareto",
    cls=Command,
    short_help="Which alpha: in- against out-of-domain, with the front.",
    context_settings=CONTEXT,
    epilog=pareto_epilog,
)
@click.argument("places", nargs=-1, required=True, metavar="RESULT...", shell_complete=files)
@option(
    "Metrics",
    "--in",
    "inside",
    required=True,
    metavar="METRIC",
    help="In domain; write -METRIC if lower is better.",
)
@option("Metrics", "--out", "outside", required=True, metavar="METRIC", help="Out of domain; likewise.")
@option(
    "Output",
    "-o",
    "--report",
    metavar="DIR",
    shell_complete=folders,
    help="Write pareto.json and pictures to this folder.",
)
@printing_options(quiet="Print the front only.", as_json="Print the results as JSON.")
def pareto_command(
    places: tuple[str, ...], inside: str, outside: str, report: str | None, as_json: bool, quiet: bool
) -> None:
    """Compare merged models by what they gain in domain and lose out of it, to see which alpha is worth choosing.

    On the front are the models that no other beats in both metrics. Numbers nested in a file are named by their path:
    gsm8k.accuracy.
    """
    from ..evaluation.results import read_results, tradeoff
    from ..output.result_folder import check_folder, write_folder
    from ..views.pareto import FILES, front_lines, picture, table

    folder = check_folder(report, FILES, FORMAT) if report else None
    found = tradeoff(read_results(places), inside, outside)
    content = {
        "format": FORMAT,
        "version": 1,
        "in": inside,
        "out": outside,
        "results": [
            {
                "name": each.name,
                "file": each.place,
                "series": each.series,
                "alpha": each.alpha,
                "drop": each.drop,
                "in": found.point(each)[0],
                "out": found.point(each)[1],
                "front": number in found.front,
            }
            for number, each in enumerate(found.results)
        ],
    }
    if as_json:
        say(json.dumps(content, indent=2))
    else:
        say(front_lines(found) if quiet else table(found))
    if folder:
        drawn = pictures_or_note(lambda: picture(found), quiet=quiet) or {}
        written = write_folder(folder, {FILES[0]: (json.dumps(content, indent=2) + "\n").encode(), **drawn}, FILES)
        if not (as_json or quiet):
            say(f"written to {', '.join(map(shown, written))}")
