"""The command `imm-merge`: parse, call `merge_checkpoints` or `check`, print."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.messages import shown
from ..errors import MergeError, MismatchError, OutputError, RankError
from ..numerics.mask import check_alpha, check_drop, check_seed
from .completion import files, folders
from .console import say, tell, values_checked
from .help import CONTEXT, Command, option, printing_options, version_option
from .options import Number, options_of
from .progress import progress_bar

if TYPE_CHECKING:
    from ..ranks.ranks import Ranks


merge_epilog = """\b
Examples:
  imm-merge base/ sft/ --alpha 0.5 --drop 0.2 -o merged/
  # the next round
  imm-merge base/ sft2/ --start merged/ -o merged2/
  # print the plan
  imm-merge org/base@main sft/ --dry-run -o merged/
  # three merges; inputs are read once
  imm-merge base/ sft/ --alpha 0.3,0.5,0.7 -o 'm-{alpha}'
"""


class _Several(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.2 only
    """Comma-separated values, kept as typed because outputs are named by them."""

    def __init__(self, each: click.ParamType[Any]) -> None:
        self.each, self.name = each, each.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        typed = [part.strip() for part in str(value).split(",")]
        try:
            for part in typed:
                self.each.convert(part, param, ctx)
        except click.BadParameter as error:
            if len(typed) > 1:
                self.fail(
                    f"{error.message}; commas separate the values of a sweep, a decimal takes a point", param, ctx
                )
            raise
        return typed


@click.command(
    "imm-merge",
    cls=Command,
    short_help="Merge a fine-tuned model back towards its base.",
    context_settings=CONTEXT,
    epilog=merge_epilog,
)
@click.argument("base", shell_complete=files)
@click.argument("sft", nargs=-1, required=True, metavar="SFT", shell_complete=files)
@option(
    "Inputs",
    "--start",
    metavar="DIR",
    shell_complete=files,
    help="Model that SFT was trained from.  [default: BASE]",
)
@options_of(
    "rename",
    "vocab",
    "dequantize",
    "leave_out",
    "allow_nonfinite",
    "alpha",
    "drop",
    "sparsify",
    "seed",
    "iteration",
    "importance",
    "shrink",
    "clip",
    "layer_factors",
    "reference",
    "keep",
    "take",
    "no_drop",
    alpha={"type": _Several(Number(float, check_alpha)), "default": "0.5", "metavar": "A[,A...]"},
    drop={"type": _Several(Number(float, check_drop)), "default": "0.2", "metavar": "P[,P...]"},
    seed={"type": _Several(Number(int, check_seed)), "default": "0", "metavar": "N[,N...]"},
)
@option(
    "Output",
    "-o",
    "--out",
    metavar="OUT",
    needed=True,  # except by --check
    shell_complete=folders,
    help="Folder to create; it appears only when complete.  [required]",
)
@options_of(
    "dtype", "max_shard_size", "as_adapter", "copy_code", "digests", "verify", "overwrite", "restart", "dry_run"
)
@option("Running", "--check", is_flag=True, help="Report whether each SFT can be merged into BASE; needs no OUT.")
@options_of("device", "workers")
@option(
    "Running",
    "--ranks",
    type=click.Choice(["torchrun", "slurm"]),
    help="Share the merge among processes.  [default: torchrun, if it started `-m mergekit_imm -- merge`]",
)
@printing_options(quiet="Hide the progress, notes and the final line.", as_json="Print the report as JSON.")
@version_option("imm-merge")
def merge_command(
    quiet: bool, as_json: bool, base: str, sft: tuple[str, ...], out: str | None, check: bool, **options: Any
) -> int | None:
    """Merge the fine-tuned model SFT back towards BASE, streaming, in constant memory.

    \b
      tuned  = start + factor * DARE(sft - start)
      merged = alpha * BASE + (1 - alpha) * tuned

    BASE, SFT and --start are folders, .safetensors files or hub ids (org/name[@revision]); SFT may be a LoRA
    adapter. Run the same command again to resume an interrupted merge.
    """
    _check_values(out, check, options)
    if check:
        if options["ranks"]:
            raise click.UsageError("--check reads only headers and needs no ranks; leave out --ranks.")
        _check(base, sft, options, as_json=as_json)
        return None
    if out is None:
        last = sft[-1] if len(sft) > 1 and not Path(sft[-1]).exists() else "merged"  # as the last argument of cp
        raise click.UsageError(
            f"Missing option '-o' / '--out': give the folder to create, -o {shlex.quote(shown(last))}"
        )
    if len(sft) > 1:
        raise click.UsageError(f"Got {len(sft)} models to merge into {base}: {', '.join(sft)}; give one, or --check.")
    from ..ranks.torchrun import connected

    with connected(options.pop("ranks")) as ranks:
        if ranks is not None and ranks.rank:
            return _join(base, sft[0], out, options, ranks)
        _merge(base, sft[0], out, options, ranks, quiet=quiet, as_json=as_json)
    return None


def _check_values(out: str | None, check: bool, options: dict[str, Any]) -> None:
    """Reject, as wrong usage, values that are wrong whatever the files hold."""
    from ..options.options import RunOptions, options_from
    from ..options.sweep import sweep

    with values_checked():
        options_from(options, RunOptions)
        sweep("{alpha}{drop}{seed}" if check or out is None else out, options)


def _check(base: str, sfts: tuple[str, ...], options: dict[str, Any], *, as_json: bool) -> None:
    from ..options.options import MergeOptions, options_from
    from ..plan.describe import check
    from ..views.merge_summary import checked

    first = {name: float(options[name][0]) for name in ("alpha", "drop")}  # the first of a sweep
    merge_options = options_from({**options, **first, "seed": 0}, MergeOptions)
    reports = [check(base, sft, merge_options, start=options["start"]) for sft in sfts]
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
    """Do the part of a rank other than 0, which prints for all. Returns the exit status."""
    from ..engine.merge import merge_checkpoints
    from ..numerics.native import hushed

    try:
        with hushed():
            reports = merge_checkpoints(base, sft, out, ranks=ranks, **options)
    except RankError:
        raise
    except MergeError:
        with suppress(RankError):
            ranks.gather(
                None
            )  # wait until rank 0 has printed the reason: when one rank ends, torchrun kills the others
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
