"""The command `imm-verify`: parse, call `verify`, print."""

from __future__ import annotations

import json
from typing import Any

import click

from ..common.messages import bytes_text, shown
from ..common.version import __version__
from .console import CONTEXT, progress_bar, say, values_checked


@click.command("imm-verify", context_settings=CONTEXT)
@click.argument("out")
@click.option("--base", metavar="DIR", help="Where BASE is now, if it moved.")
@click.option("--start", metavar="DIR", help="Where START is now, if it moved.")
@click.option("--sft", metavar="DIR", help="Where SFT is now, if it moved.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Fraction of the tensors' bytes to recompute.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda",
    help="Device to compute on; the result is the same.",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Number of threads.  [default: min(4, 2 x CPUs)]")
@click.option("-q", "--quiet", is_flag=True, help="Hide the progress bar and the result.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-verify")
def verify_command(quiet: bool, as_json: bool, out: str, **options: Any) -> None:
    """Recompute a merge from the recipe in OUT and compare every byte.

    Compares all tensors (or a --sample of them), headers, configs and every other file of the merge. Exit status 0
    if all are equal; 1, with the first difference, if not.
    """
    from ..engine.verify import verify
    from ..options.options import check_device

    with values_checked():
        check_device(options["device"])
    with progress_bar("verifying", shown=not quiet) as progress:
        report = verify(out, progress=progress, **options)
    if as_json:
        say(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        share = "" if report.segments == report.of_segments else f" ({report.segments} of {report.of_segments} pieces)"
        say(
            f"{shown(out)} matches its recipe: {bytes_text(report.bytes_compared)} of tensors{share} and"
            f" {len(report.files_compared)} files compared"
        )
        if report.not_of_the_merge:
            say(f"not part of the merge: {', '.join(map(shown, report.not_of_the_merge))}")
