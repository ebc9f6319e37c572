"""What all commands share: one-line errors, exit statuses, signals, printing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import click

from ..common.messages import speaking_of_options
from ..errors import ArgumentError, ExtraError, MergeError, OutputError, install

T = TypeVar("T")


class _Stopped(BaseException):
    """A signal asked the process to end. Not a KeyboardInterrupt, which click turns into its own exception."""


def run_and_exit(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 refused or failed, 2 wrong usage, 128 + its number for a signal."""
    with speaking_of_options():
        _run(command, arguments)


def _run(command: click.Command, arguments: Sequence[str] | None) -> NoReturn:
    os.environ.setdefault("MERGEKIT_IMM_WIDE_VECTORS", "1")  # see `target` in numerics/object_code.py
    if command.name in ("imm-merge", "imm-verify"):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # they multiply no matrices, and idle threads of numpy spin
    _allow_open_files()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    merging = command.name == "imm-merge" and not {"--dry-run", "--check"} & set(arguments)
    merging |= command.name == "imm-loop"
    kept = "; what was written is kept; run the same command again to resume" if merging else ""
    numbers: list[int] = []
    try:
        numbers += _signals()
        _listen(numbers, kept)
        completing = f"_{command.name}_complete".replace("-", "_").upper() in os.environ
        if isinstance(command, click.Group) and not arguments and not completing:
            tell(command.make_context(command.name, [], resilient_parsing=True).get_help())
            sys.exit(2)
        status = command.main(arguments, prog_name=command.name, standalone_mode=False)
        sys.stdout.flush()
        _on_signals(numbers, signal.SIG_IGN)  # it is done
        sys.exit(status if isinstance(status, int) else 0)
    except click.UsageError as error:
        ctx = error.ctx or command.make_context(command.name, [], resilient_parsing=True)
        message = error.format_message().rstrip(".")
        see = f"{' See' if message.endswith('?') else '; see'} {ctx.command_path} --help"
        _fail(message + see, 2, f"{ctx.get_usage()}\n")
    except MergeError as error:
        if debug:
            raise
        _fail(str(error), getattr(error, "status", 1))
    except (KeyboardInterrupt, click.Abort):
        _fail(f"interrupted{kept}", 130)
    except _Stopped as stopped:
        _on_signals(numbers, signal.SIG_IGN)  # it ends in a moment, with one line
        _fail(f"{_word(stopped.args[0])}{kept}", 128 + stopped.args[0])
    except BrokenPipeError:
        _let_go_of_stdout()
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
            _let_go_of_stdout()  # click itself was printing, its help for example
            _fail(f"standard output cannot be written: {error.strerror}", 1)
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it shows", 1)


@contextmanager
def values_checked() -> Iterator[None]:
    """Turn an ArgumentError into wrong usage. The block must check values only, and open no file."""
    try:
        yield
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error


def pictures_or_note(draw: Callable[[], T], *, quiet: bool) -> T | None:
    """Return the pictures; without matplotlib print a note and return None, so that the command continues."""
    try:
        return draw()
    except ExtraError:
        if not quiet:
            tell(f"note: no pictures, as matplotlib is not installed; {install('matplotlib')}")
        return None


def _allow_open_files() -> None:
    """Raise the limit of open files as far as permitted: models have hundreds, and sweeps as many for each output."""
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
        raise OutputError(f"standard output cannot be written: {error.strerror}; everything else is done") from error


def tell(text: str) -> None:
    """Print on standard error; ignore an error there."""
    with suppress(OSError):
        click.echo(text, err=True)


def _let_go_of_stdout() -> None:
    """Keep Python from flushing standard output again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _signals() -> list[int]:
    """Return the signals to handle: not those that a shell or nohup ignores, nor those that a caller handles."""
    numbers: list[int] = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    return numbers


def _on_signals(numbers: Sequence[int], handler: Callable[[int, Any], Any] | signal.Handlers) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def _listen(numbers: Sequence[int], kept: str) -> None:
    """Let a first signal raise _Stopped, and a second one end the process at once: a worker may hang in a read."""

    def stop(number: int, _: object) -> NoReturn:
        _on_signals(numbers, end)
        raise _Stopped(number)

    def end(number: int, _: object) -> NoReturn:
        bar = "\n\x1b[?25h" if sys.stderr.isatty() else ""  # a bar hides the cursor
        line = f"{bar}error: {_word(number)} twice; ended without waiting for work in progress{kept}\n"
        with suppress(Exception):
            sys.stderr.flush()
        with suppress(OSError):
            os.write(2, line.encode())  # not by Python's stream, which this handler may have interrupted
        os._exit(128 + number)  # nothing is closed: a worker's late write must not land in another file

    def swallowed(about: sys.UnraisableHookArgs) -> None:
        if not isinstance(about.exc_value, _Stopped):
            sys.__unraisablehook__(about)
            return
        # It was raised in a callback of a library, as when the kernel is loaded, and went no further. Send it again.
        _on_signals(numbers, stop)
        threading.Timer(0.02, os.kill, (os.getpid(), about.exc_value.args[0])).start()

    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = swallowed
    _on_signals(numbers, stop)


def _fail(message: str, status: int, before: str = "") -> NoReturn:
    tell(f"{before}error: {' '.join(message.split())}")
    sys.exit(status)
