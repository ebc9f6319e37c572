"""The commands: parse, call one library function, print."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import ArgumentError, MergeError, OutputError, bytes_text, shown

if TYPE_CHECKING:
    from .recipe import MergeReport

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

merge_epilog = """\b
Examples:
  imm-merge base/ sft/ --alpha 0.5 --drop 0.2 -o merged/
  imm-merge base/ sft2/ --start merged/ -o merged2/        the next round
  imm-merge org/base@main sft/ --dry-run -o merged/        what would happen
  imm-merge base/ sft/ --alpha 0.3,0.5,0.7 -o 'merged-{alpha}'     three merges, one reading
"""


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


@click.command("imm-merge", context_settings=_CONTEXT, epilog=merge_epilog)
@click.argument("base")
@click.argument("sft")
@click.option("-o", "--out", required=True, metavar="OUT", help="Folder to make; it appears only when it is whole.")
@click.option("--start", metavar="DIR", help="Model the fine-tuning started from.  [default: BASE]")
@click.option(
    "--alpha", type=_Several(click.FloatRange(0, 1)), default="0.5", show_default=True, metavar="A[,A...]",
    help="Weight of BASE, 0 to 1. Several values, of this and the next two: a sweep; OUT names them.",
)  # fmt: skip
@click.option(
    "--drop", type=_Several(click.FloatRange(0, 1, max_open=True)), default="0.2", show_default=True,
    metavar="P[,P...]", help="Share of the delta's elements that DARE drops, from 0 to below 1.",
)  # fmt: skip
@click.option(
    "--seed", type=_Several(click.INT), default="0", show_default=True, metavar="N[,N...]",
    help="Fixes the mask, with --iteration.",
)  # fmt: skip
@click.option(
    "--iteration", type=click.IntRange(0), metavar="N",
    help="Round, from 0.  [default: one more than in START's recipe; 0 without]",
)  # fmt: skip
@click.option("--importance", metavar="FILE", help="JSON: layer -> importance; weights the delta (IIMM).")
@click.option(
    "--reference", type=click.Choice(["start", "base"]), default="start", show_default=True,
    help="What the delta is taken from.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["base", "bfloat16", "float16", "float32"]), default="base", show_default=True,
    help="Of the output's float tensors; base: tensor by tensor.",
)  # fmt: skip
@click.option("--max-shard-size", metavar="SIZE", help="Lay the files anew, e.g. 5GB.  [default: as in BASE]")
@click.option(
    "--vocab", type=click.Choice(["strict"]), default="strict", show_default=True,
    help="Vocabularies of different sizes are an error.",
)  # fmt: skip
@click.option("--keep", metavar="REGEX", multiple=True, help="Tensors to leave as in BASE; repeatable.")
@click.option("--take", metavar="REGEX", multiple=True, help="Tensors to take from SFT; repeatable.")
@click.option("--no-drop", metavar="REGEX", multiple=True, help="Tensors to merge without dropping; repeatable.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute; same bits.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: min(4, 2 x CPUs)]")
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity in the inputs through.")
@click.option("--copy-code", is_flag=True, help="Copy *.py files of the model too.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would happen, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an OUT that holds something else.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with an unfinished merge.")
@click.option("--verify", is_flag=True, help="Compute all again and compare every byte, before OUT appears.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no notes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-merge")
def merge_command(quiet: bool, as_json: bool, base: str, sft: str, out: str, **options: Any) -> None:
    """Merge the fine-tuned model SFT back towards BASE, streaming, in constant memory.

    \b
      tuned  = start + factor * DARE(sft - start)
      merged = alpha * BASE + (1 - alpha) * tuned

    BASE, SFT and --start are folders, .safetensors files or hub ids (org/name[@revision]); SFT may be a LoRA
    adapter. An interrupted merge goes on where it stopped when the same command is run again.
    """
    from .merge import merge_checkpoints
    from .sweep import SWEPT, points

    if options["dtype"] == "base":
        options["dtype"] = None
    dry_run = options["dry_run"]
    try:
        several = len(points(out, {name: options[name] for name in SWEPT})) > 1
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    with _progress("merging", shown=not (quiet or dry_run)) as progress:
        reports = merge_checkpoints(base, sft, out, progress=progress, **options)
    if not quiet:
        for note in dict.fromkeys(note for report in reports for note in report.notes):
            _tell(note)
    if as_json:
        content = [report.to_dict() for report in reports]
        _say(json.dumps(content if several else content[0], indent=2))
    for report in reports if not as_json else ():
        if dry_run:
            _say(_planned(report, base, sft, options["start"]))
        elif not quiet:
            _say(_finished(report, several))
    for report in reports:
        if report.refused:
            raise OutputError(report.refused)


@click.command("imm-verify", context_settings=_CONTEXT)
@click.argument("out")
@click.option("--base", metavar="DIR", help="Where BASE is now, if not where the recipe says.")
@click.option("--start", metavar="DIR", help="Where START is now.")
@click.option("--sft", metavar="DIR", help="Where SFT is now.")
@click.option(
    "--sample", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Share of the tensors' bytes to recompute.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute; same bits.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: min(4, 2 x CPUs)]")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="imm-verify")
def verify_command(quiet: bool, as_json: bool, out: str, **options: Any) -> None:
    """Recompute a merge from the recipe in OUT, and compare bytes.

    Compared are all tensors (or a --sample of them), headers, config and every other file of the merge. Exit
    status 0 if all are equal, 1 with the first difference if not.
    """
    from .verification import verify

    with _progress("verifying", shown=not quiet) as progress:
        report = verify(out, progress=progress, **options)
    if as_json:
        _say(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        share = "" if report.segments == report.of_segments else f" ({report.segments} of {report.of_segments} pieces)"
        _say(
            f"{shown(out)} is what its recipe says: {bytes_text(report.bytes_compared)} of tensors{share} and"
            f" {len(report.files_compared)} files compared"
        )
        if report.not_of_the_merge:
            _say(f"not of the merge: {', '.join(map(shown, report.not_of_the_merge))}")


def imm_merge() -> NoReturn:
    """Run `imm-merge`."""
    _run(merge_command)


def imm_verify() -> NoReturn:
    """Run `imm-verify`."""
    _run(verify_command)


class _Stopped(BaseException):
    """The process was asked to end, by this signal. Not a KeyboardInterrupt, of which click makes its own."""


def _run(command: click.Command, arguments: list[str] | None = None) -> NoReturn:
    """Run a command; exit 0 done, 1 refused or failed, 2 wrong usage, 130/143 on signals."""

    os.environ.setdefault("MERGEKIT_IMM_WIDE_VECTORS", "1")  # see `jit`
    _allow_open_files()
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    merging = command is merge_command and "--dry-run" not in arguments
    kept = "; what was written is kept, and the same command goes on where it stopped" if merging else ""
    try:
        _listen()
        status = command.main(arguments, prog_name=command.name, standalone_mode=False)
        sys.stdout.flush()
        _ignore_signals()  # it is done
        sys.exit(status if isinstance(status, int) else 0)
    except click.UsageError as error:
        usage = error.ctx.get_usage() if error.ctx else f"Usage: {command.name} --help"
        _fail(error.format_message(), 2, f"{usage}\n")
    except MergeError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        _fail(f"interrupted{kept}", 130)
    except _Stopped as stopped:
        number = stopped.args[0]
        _fail(f"{'interrupted' if number == signal.SIGINT else 'terminated'}{kept}", 128 + number)
    except BrokenPipeError:
        _let_go_of_stdout()
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
            _let_go_of_stdout()  # of what click prints by itself
            _fail(f"standard output cannot be written: {error.strerror}", 1)
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it shows", 1)


def _allow_open_files() -> None:
    """As many as the system permits: models have hundreds of files, and sweeps as many for each output."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _say(text: str) -> None:
    """Print on standard output."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _let_go_of_stdout()
        raise OutputError(f"standard output cannot be written: {error.strerror}; all else is done") from error


def _tell(text: str) -> None:
    """Print on standard error, if that can be."""
    with suppress(OSError):
        click.echo(text, err=True)


def _let_go_of_stdout() -> None:
    """See to it that Python does not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _listen() -> None:
    """Let SIGTERM and SIGINT raise _Stopped, once."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        numbers.append(signal.SIGINT)

    def stop(number: int, _: object) -> NoReturn:
        _ignore_signals()  # what is being written comes to its end, in a moment, before the files are closed
        raise _Stopped(number)

    def listen() -> None:
        for number in numbers:
            signal.signal(number, stop)

    def swallowed(about: sys.UnraisableHookArgs) -> None:
        if not isinstance(about.exc_value, _Stopped):
            sys.__unraisablehook__(about)
            return
        # It was raised where nothing can be: in a callback of a library, as when the kernel is loaded. Once more, soon.
        listen()
        threading.Timer(0.02, os.kill, (os.getpid(), about.exc_value.args[0])).start()

    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = swallowed
    listen()


def _ignore_signals() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _fail(message: str, status: int, before: str = "") -> NoReturn:
    _tell(f"{before}error: {' '.join(message.split())}")
    sys.exit(status)


@contextmanager
def _progress(label: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with GB/s and time left on a terminal, nothing on a pipe."""
    if not shown or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of downloads
        yield None
        return
    began = time.perf_counter()
    bar: Any = None
    first = 0

    def update(done: int, total: int) -> None:
        nonlocal bar, first
        if bar is None:
            first = done
            bar = click.progressbar(
                length=total, label=label, file=sys.stderr, show_eta=True, width=30,
                item_show_func=lambda rate: rate, update_min_steps=max(1, total // 500),
            )  # fmt: skip
            bar.__enter__()
        elapsed = time.perf_counter() - began
        bar.update(max(0, done - bar.pos), f"{(done - first) / max(elapsed, 1e-9) / 1e9:.2f} GB/s written")

    try:
        yield update
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def _finished(report: MergeReport, several: bool) -> str:
    if report.status == "already merged":
        compared = ", every byte compared" if report.verified else ""
        return f"{shown(report.out)} already merged: it holds this very recipe{compared}"
    seconds, moved = report.seconds["total"], report.bytes_read + report.bytes_written
    rate = f" ({moved / seconds / 1e9:.2f} GB/s read and written)" if moved >= 1e8 and not several else ""
    return (
        f"merged {sum(report.tensors.values())} tensors, {_count(report.parameter_count)} parameters, into"
        f" {shown(report.out)} in {seconds:.1f} s{rate}{', every byte compared' if report.verified else ''}"
    )


def _planned(report: MergeReport, base: str, sft: str, start: str | None) -> str:
    """What a dry run prints."""
    p = report.parameters
    counts = ", ".join(f"{count} {action}" for action, count in report.tensors.items() if count)
    rows: list[tuple[str, ...]] = [("kind of tensor", "tensors", "parameters", "base", "start", "sft", "out", "what")]
    for kind in report.kinds:
        what = {"merge": f"merge, drop {kind['drop']:.4g}" if kind["drop"] else "merge", "keep": "keep the base's",
                "take": "take the sft's", "copy": "copy, must be equal"}[kind["action"]]  # fmt: skip
        read = [kind["read"].get(role, "-") for role in ("base", "start", "sft")]
        rows.append((shown(kind["name"]), str(kind["tensors"]), _count(kind["elements"]), *read, kind["write"], what))
    if start is None:
        rows = [(*row[:4], *row[5:]) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  " + "  ".join(c.ljust(w) if i not in (1, 2) else c.rjust(w) for i, (c, w) in
             enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]  # fmt: skip
    inputs = [f"  base   {shown(base)}", f"  sft    {shown(sft)}", *([f"  start  {shown(start)}"] if start else [])]
    side = [
        f"  {len(names)} other files from {role}: {', '.join(map(shown, names))}"
        for role, names in report.side_files.items()
    ]
    left = [f"  left out of {role}: {', '.join(map(shown, names))}" for role, names in report.left_out.items()]
    changes = [f"  config.json: {key} = {json.dumps(value)}" for key, value in report.config_changes.items()]
    lines = [
        f"would merge {_count(report.parameter_count)} parameters ({counts}) into {shown(report.out)}"
        if report.status == "dry run" else f"{shown(report.out)} already merged: it holds this very recipe",
        *inputs,
        f"  alpha {p['alpha']:g}, drop {p['drop']:g}, seed {p['seed']}, iteration {p['iteration']}"
        + (f", reference {p['reference']}" if p["reference"] != "start" else "")
        + (f", importance of {len(p['importance'])} layers" if p["importance"] is not None else ""),
        "",
        *table,
        "",
        f"  reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)} to"
        f" {', '.join(report.files[:3])}"
        + (f", … ({len(report.files)} files)" if len(report.files) > 3 else ""),
        *side,
        *changes,
        *left,
        f"  memory about {bytes_text(report.memory)} at its peak, with {report.workers} workers on {report.device}",
        f"  disk needed {bytes_text(report.disk_needed)}, free {bytes_text(report.disk_free)}",
        "nothing was written",
    ]  # fmt: skip
    return "\n".join(lines)


def _count(count: int) -> str:
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def main() -> NoReturn:
    """Run `python -m mergekit_imm merge|verify`."""
    commands = {"merge": merge_command, "verify": verify_command}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        _run(commands[name], sys.argv[2:])
    wanted = name in ("-h", "--help")
    click.echo(f"usage: python -m mergekit_imm {{{','.join(commands)}}} ... (each has --help)", err=not wanted)
    if not wanted:
        click.echo(f"error: {name!r} is not one of {', '.join(commands)}", err=True)
    sys.exit(0 if wanted else 2)
