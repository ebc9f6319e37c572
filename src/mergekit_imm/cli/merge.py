"""The command `imm-merge`: parse, call `merge_checkpoints` or `check`, print."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..common.messages import shown
from ..common.version import __version__
from ..errors import MergeError, MismatchError, OutputError, RankError
from .console import (
    CONTEXT,
    DtypeChoice,
    delta_options,
    progress_bar,
    say,
    tell,
    unread,
    values_checked,
)

if TYPE_CHECKING:
    from ..ranks.ranks import Ranks


merge_epilog = """\b
Examples:
  imm-merge base/ sft/ --alpha 0.5 --drop 0.2 -o merged/
  imm-merge base/ sft2/ --start merged/ -o merged2/        the next round
  imm-merge org/base@main sft/ --dry-run -o merged/        what would happen
  imm-merge base/ sft/ --alpha 0.3,0.5,0.7 -o 'merged-{alpha}'     three merges, one reading
"""


# Options that say what is merged with what, and how, beside the three that may be lists.
VALUES = (
    "iteration", "reference", "dtype", "max_shard_size", "vocab", "rename", "leave_out", "dequantize", "keep", "take",
    "no_drop", "importance", "shrink", "clip", "layer_factors", "sparsify", "allow_nonfinite", "copy_code",
)  # fmt: skip


class _Several(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.2 only
    """Values separated by commas, kept as they were typed: outputs are named by them."""

    def __init__(self, each: click.ParamType[Any]) -> None:
        self.each, self.name = each, each.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        typed = [part.strip() for part in str(value).split(",")]
        for part in typed:
            number = self.each.convert(part, param, ctx)
            if number != number:
                self.fail(f"{part!r} is not a number", param, ctx)
        return typed


@click.command("imm-merge", context_settings=CONTEXT, epilog=merge_epilog)
@click.argument("base")
@click.argument("sft", nargs=-1, required=True, metavar="SFT")
@click.option("-o", "--out", metavar="OUT", help="Folder to make; it appears only when it is whole.  [required]")
@click.option("--start", metavar="DIR", help="Model the fine-tuning started from.  [default: BASE]")
@click.option(
    "--alpha", type=_Several(click.FloatRange(0, 1)), default="0.5", show_default=True, metavar="A[,A...]",
    help="Weight of BASE, 0 to 1. Several values, of this and the next two: a sweep; OUT names them.",
)  # fmt: skip
@click.option(
    "--drop", type=_Several(click.FloatRange(0, 1, max_open=True)), default="0.2", show_default=True,
    metavar="P[,P...]", help="Share of the delta's elements to drop (see --sparsify), from 0 to below 1.",
)  # fmt: skip
@click.option(
    "--seed", type=_Several(click.INT), default="0", show_default=True, metavar="N[,N...]",
    help="Fixes the mask, with --iteration.",
)  # fmt: skip
@click.option(
    "--iteration", type=click.IntRange(0), metavar="N",
    help="Round, from 0.  [default: one more than in START's recipe; 0 without]",
)  # fmt: skip
@delta_options
@click.option(
    "--dtype", type=DtypeChoice(["base", "start", "bfloat16", "float16", "float32"]), default="base",
    show_default=True, help="Of the output's float tensors; base, start: as that model has them, tensor by tensor.",
)  # fmt: skip
@click.option("--max-shard-size", metavar="SIZE", help="Lay the files anew, e.g. 5GB.  [default: as in BASE]")
@click.option(
    "--vocab", type=click.Choice(["strict", "base", "sft"]), default="strict", show_default=True,
    help="Whose vocabulary the output has; strict: different sizes are an error.",
)  # fmt: skip
@click.option(
    "--rename", metavar="REGEX=REPL", multiple=True,
    help="What names of SFT and START are in BASE; repeatable.",
)  # fmt: skip
@click.option("--dequantize", is_flag=True, help="Multiply FP8 weights by their scales; the output is bfloat16.")
@click.option("--keep", metavar="REGEX", multiple=True, help="Tensors to leave as in BASE; repeatable.")
@click.option("--take", metavar="REGEX", multiple=True, help="Tensors to take from SFT; repeatable.")
@click.option("--no-drop", metavar="REGEX", multiple=True, help="Tensors to merge without dropping; repeatable.")
@click.option(
    "--leave-out", metavar="FILE", multiple=True,
    help="File or folder of an input that is no weights of the model, by its path there; repeatable.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute; same bits.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: min(4, 2 x CPUs)]")
@click.option(
    "--ranks", type=click.Choice(["torchrun", "slurm"]),
    help="One merge by many processes.  [default: torchrun's, if it started `-m mergekit_imm -- merge`]",
)  # fmt: skip
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity in the inputs through.")
@click.option("--copy-code", is_flag=True, help="Copy *.py files of the model too.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would happen, write nothing.")
@click.option(
    "--check", is_flag=True, help="Say what fits and what does not, with no OUT; of several SFTs, of each.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an OUT that holds something else.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with an unfinished merge.")
@click.option("--verify", is_flag=True, help="Compute all again and compare every byte, before OUT appears.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no notes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-merge")
def merge_command(
    quiet: bool, as_json: bool, base: str, sft: tuple[str, ...], out: str | None, check: bool, **options: Any
) -> int | None:
    """Merge the fine-tuned model SFT back towards BASE, streaming, in constant memory.

    \b
      tuned  = start + factor * DARE(sft - start)
      merged = alpha * BASE + (1 - alpha) * tuned

    BASE, SFT and --start are folders, .safetensors files or hub ids (org/name[@revision]); SFT may be a LoRA
    adapter. An interrupted merge goes on where it stopped when the same command is run again.
    """
    if options["dtype"] == "base":
        options["dtype"] = None
    _check_values(out, check, options)
    if check:
        if options["ranks"]:
            raise click.UsageError("--check reads headers only, and is not for many ranks; leave --ranks out.")
        _check(base, sft, options, as_json=as_json)
        return None
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'.")
    if len(sft) > 1:
        raise click.UsageError(f"Got {len(sft)} models, {', '.join(sft)}, to merge into {base}; give one, or --check.")
    from ..ranks.torchrun import joined

    with joined(options.pop("ranks")) as ranks:
        if ranks is not None and ranks.rank:
            return _join(base, sft[0], out, options, ranks)
        _merge(base, sft[0], out, options, ranks, quiet=quiet, as_json=as_json)
    return None


def _check_values(out: str | None, check: bool, options: dict[str, Any]) -> None:
    """Refuse as wrong usage what is wrong whatever the files hold."""
    from ..engine.workers import check_device
    from ..options.sweep import SWEPT, points
    from ..plan.open_inputs import parameters_of

    values = {name: options[name] for name in VALUES}
    factors = {name: options[name] for name in ("importance", "layer_factors")}
    with values_checked():
        check_device(options["device"])
        named = "{alpha}{drop}{seed}" if check or out is None else out
        several = points(named, {name: options[name] for name in SWEPT})
        parameters_of([point.values for point in several], **{**values, **unread(**factors)})


def _check(base: str, sfts: tuple[str, ...], options: dict[str, Any], *, as_json: bool) -> None:
    from ..plan.describe import check
    from ..views.merge_summary import checked

    numbers: dict[str, Any] = {name: float(options[name][0]) for name in ("alpha", "drop")}  # of a sweep the first
    reports = [check(base, sft, **numbers, **{name: options[name] for name in ("start", *VALUES)}) for sft in sfts]
    if as_json:
        content = [report.to_dict() for report in reports]
        say(json.dumps(content if len(content) > 1 else content[0], indent=2))
    else:
        say("\n\n".join(map(checked, reports)))
    refused = [report for report in reports if report.problems]
    if refused:
        count = sum(len(report.problems) for report in refused)
        models = ", ".join(shown(report.sft) for report in refused)
        reasons = f"{count} reasons are" if count > 1 else "the reason is"
        raise MismatchError(f"{models} cannot be merged into {shown(base)}; {reasons} listed above")


def _join(base: str, sft: str, out: str, options: dict[str, Any], ranks: Ranks) -> int:
    """Do another rank's part, and leave to rank 0 what is to be said. Returns the exit status."""
    from ..engine.merge import merge_checkpoints

    try:
        reports = merge_checkpoints(base, sft, out, ranks=ranks, **options)
    except RankError:
        raise
    except MergeError:
        with suppress(RankError):
            ranks.gather(None)  # until rank 0 has said why, and ended: torchrun ends it when another ends first
        return 1
    return int(any(report.refused for report in reports))


def _merge(
    base: str, sft: str, out: str, options: dict[str, Any], ranks: Ranks | None, *, quiet: bool, as_json: bool
) -> None:
    from ..engine.merge import merge_checkpoints
    from ..options.sweep import SWEPT, points
    from ..views.merge_summary import finished, planned

    dry_run = options["dry_run"]
    several = len(points(out, {name: options[name] for name in SWEPT})) > 1
    with progress_bar("merging", shown=not (quiet or dry_run)) as progress:
        reports = merge_checkpoints(base, sft, out, progress=progress, ranks=ranks, **options)
    if not quiet:
        for note in dict.fromkeys(note for report in reports for note in report.notes):
            tell(note)
    if as_json:
        content = [report.to_dict() for report in reports]
        say(json.dumps(content if several else content[0], indent=2))
    for report in reports if not as_json else ():
        if dry_run:
            say(planned(report, base, sft, options["start"]))
        elif not quiet:
            say(finished(report, several))
    for report in reports:
        if report.refused:
            raise OutputError(report.refused)
