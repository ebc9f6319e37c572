"""The command `imm-verify`: parse, call `verify`, or `audit` for what other tools merged, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..common.messages import bytes_text, shown
from ..errors import MergeError
from ..options.values import check_device, check_sample
from .completion import files
from .console import say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options, version_option
from .options import Number, options_of
from .progress import progress_bar

verify_epilog = """\b
Examples:
  # our own merge, byte for byte
  imm-verify merged/
  # was this adapter merged, by whatever tool?
  imm-verify merged/ --base base/ --sft adapter/
  # are these the weights that were merged?
  imm-verify merged/ --base base/ --sft sft/ --alpha 0.5
"""
AUDIT = ("method", "alpha", "weights", "rename", "leave_out", "dequantize")


class Weights(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.2 only
    """Two numbers, separated by a comma."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return them as floats."""
        try:
            base, sft = map(float, str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not two numbers such as 0.3,0.7", param, ctx)
        return base, sft


@click.command(
    "imm-verify",
    cls=Command,
    short_help="Recompute a merge, ours or another tool's, and compare.",
    context_settings=CONTEXT,
    epilog=verify_epilog,
)
@click.argument("out", metavar="OUT", shell_complete=files)
@option(
    "Inputs",
    "--base",
    metavar="DIR",
    shell_complete=files,
    help="BASE; for a merge of ours, only if it has moved since.",
)
@option("Inputs", "--start", metavar="DIR", shell_complete=files, help="Where START is now, if it moved.")
@option(
    "Inputs",
    "--sft",
    metavar="DIR",
    shell_complete=files,
    help="SFT or its adapter; for a merge of ours, only if it has moved since.",
)
@option(
    "Audit",
    "--method",
    type=click.Choice(["lora", "imm", "linear"]),
    help="What OUT should be: BASE + B A (or SFT); alpha BASE + (1 - alpha) SFT; a weighted sum."
    "  [default: lora for an adapter, linear with --weights, else imm]",
)
@option(
    "Audit",
    "--alpha",
    type=Number(float, allowed="0<=x<1"),
    metavar="A",
    help="Weight of BASE, for imm.  [default: the one that fits best]",
)
@option("Audit", "--weights", type=Weights(), metavar="W,W", help="Weights of BASE and SFT, for linear.")
@options_of(
    "rename",
    "leave_out",
    "dequantize",
    rename={"heading": "Audit", "help": "Rename tensors of SFT to BASE's names; repeatable."},
    leave_out={"heading": "Audit", "help": "Ignore a file or folder, by its path in the model; repeatable."},
    dequantize={"heading": "Audit", "help": "Multiply FP8 weights of BASE and SFT by their scales."},
)
@option(
    "Running",
    "--sample",
    type=Number(float, check_sample, "0<x<=1"),
    default=1.0,
    show_default=True,
    metavar="F",
    help="Fraction of the tensors' bytes to recompute.",
)
@options_of("device", "workers")
@printing_options(quiet="Hide the progress and the result.", as_json="Print the report as JSON.")
@version_option("imm-verify")
def verify_command(quiet: bool, as_json: bool, out: str, **options: Any) -> int:
    """Recompute a merge and compare: ours by the recipe in OUT, another tool's by what it claims.

    With a recipe in OUT, every byte is compared: tensors (or a --sample of them), headers, configs and every other
    file. Exit status 0 if all are equal; 1, with the first difference, if not.

    Without one, or with an option of an audit, OUT is audited: whether it is what another tool claims to have made of
    --base and --sft, within rounding, and if not, what it is. Exit status 0 if it is as claimed, 1 if not, 2 if it
    cannot be told from these inputs.
    """
    with values_checked():
        check_device(options["device"])
    audited = {name: options.pop(name) for name in AUDIT}
    asked = any(each not in (None, (), False) for each in audited.values())
    if asked or (options["base"] and options["sft"] and not _has_recipe(out)):
        return _audit(out, options, audited, quiet=quiet, as_json=as_json)
    _verify(out, options, quiet=quiet, as_json=as_json)
    return 0


def _has_recipe(out: str) -> bool:
    from ..options.recipe import RECIPE_FILE

    try:
        return (Path(out).expanduser() / RECIPE_FILE).exists()
    except (OSError, RuntimeError):
        return False


def _audit(out: str, options: dict[str, Any], audited: dict[str, Any], *, quiet: bool, as_json: bool) -> int:
    base, sft = options["base"], options["sft"]
    if base is None or sft is None:
        raise click.UsageError("an audit needs --base and --sft, the models that OUT is said to be made of")
    if options["start"] is not None or options["sample"] != 1 or options["device"] != "cpu":
        raise click.UsageError("--start, --sample and --device apply to merges of ours; an audit has none of them")
    from ..analysis.auditing import audit, check_method
    from ..views.audit import render

    with values_checked():
        check_method(audited["method"], audited["alpha"], audited["weights"])
    try:
        with progress_bar("auditing", shown=not quiet, rate=lambda x: f"{x / 1e6:.0f} M elements/s") as progress:
            report = audit(out, base, sft, workers=options["workers"], progress=progress, **audited)
    except MergeError as error:
        error.status = 2  # type: ignore[attr-defined]  # it cannot be told
        raise
    for note in () if quiet else report.notes:
        tell(note)
    if as_json:
        say(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        say(render(report))
    return 0 if report.is_as_claimed else 1


def _verify(out: str, options: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from ..engine.verify import verify

    with progress_bar("verifying", shown=not quiet, rate=lambda x: f"{x / 1e9:.2f} GB/s compared") as progress:
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
