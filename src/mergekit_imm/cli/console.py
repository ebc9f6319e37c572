"""What every command does alike: errors of one line, exit statuses, signals, progress, printing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import click

from ..common.messages import speaking_of_options
from ..errors import ArgumentError, MergeError, OutputError

T = TypeVar("T")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Stopped(BaseException):
    """The process was asked to end, by this signal. Not a KeyboardInterrupt, of which click makes its own."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; exit 0 done, 1 refused or failed, 2 wrong usage, 128 + the number on signals."""
    with speaking_of_options():
        _run(command, arguments)


def _run(command: click.Command, arguments: Sequence[str] | None) -> NoReturn:
    os.environ.setdefault("MERGEKIT_IMM_WIDE_VECTORS", "1")  # see `jit`
    _allow_open_files()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    merging = command.name == "imm-merge" and not {"--dry-run", "--check"} & set(arguments)
    merging |= command.name == "imm-loop"
    kept = "; what was written is kept, and the same command goes on where it stopped" if merging else ""
    try:
        _listen()
        if isinstance(command, click.Group) and not arguments:
            tell(command.get_help(click.Context(command, info_name=command.name)))
            sys.exit(2)
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
        _fail(str(error), getattr(error, "status", 1))
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


@contextmanager
def values_checked() -> Iterator[None]:
    """Turn an ArgumentError into wrong usage: what is within looks at values alone, and opens no file."""
    try:
        yield
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error


def pictures_or_note(draw: Callable[[], T], *, quiet: bool) -> T | None:
    """Return what is drawn, or None and a note where matplotlib is missing: everything else is done all the same."""
    try:
        return draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        if not quiet:
            tell("note: no pictures, as matplotlib is not installed; pip install 'mergekit-imm[plots]'")
        return None


def _allow_open_files() -> None:
    """As many as the system permits: models have hundreds of files, and sweeps as many for each output."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def say(text: str) -> None:
    """Print on standard output."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _let_go_of_stdout()
        raise OutputError(f"standard output cannot be written: {error.strerror}; all else is done") from error


def tell(text: str) -> None:
    """Print on standard error, if that can be."""
    with suppress(OSError):
        click.echo(text, err=True)


def _let_go_of_stdout() -> None:
    """See to it that Python does not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _listen() -> None:
    """Let SIGTERM, SIGINT and SIGHUP raise _Stopped, once."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        numbers.append(signal.SIGINT)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        numbers.append(signal.SIGHUP)

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
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _fail(message: str, status: int, before: str = "") -> NoReturn:
    tell(f"{before}error: {' '.join(message.split())}")
    sys.exit(status)


def _written(per_second: float) -> str:
    return f"{per_second / 1e9:.2f} GB/s written"


@contextmanager
def progress_bar(
    label: str, *, shown: bool, rate: Callable[[float], str] = _written
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with time left, and what `rate` makes of steps in a second, on a terminal; nothing on a pipe."""
    if not shown or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of downloads
        yield None
        return
    bar: Any = None
    first, began = 0, 0.0

    def update(done: int, total: int) -> None:
        nonlocal bar, first, began
        if bar is None:
            first, began = done, time.perf_counter()
            bar = click.progressbar(
                length=total, label=label, file=sys.stderr, show_eta=True, width=30,
                item_show_func=lambda item: item, update_min_steps=max(1, total // 500),
            )  # fmt: skip
            bar.__enter__()
        elapsed = time.perf_counter() - began
        bar.update(max(0, done - bar.pos), rate((done - first) / max(elapsed, 1e-9)))

    try:
        yield update
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
