"""Run a command by its name: `imm-merge` and its siblings, `python -m mergekit_imm merge|verify|loop|analyze`.

Each command is imported when it runs, so that the help of one does not wait for the others.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from ..common.version import __version__
from .console import run_and_exit

Arguments = list[str] | None  # None: those of the process


def imm_merge(arguments: Arguments = None) -> NoReturn:
    """Run `imm-merge`."""
    from .merge import merge_command

    run_and_exit(merge_command, arguments)


def imm_verify(arguments: Arguments = None) -> NoReturn:
    """Run `imm-verify`."""
    from .verify import verify_command

    run_and_exit(verify_command, arguments)


def imm_loop(arguments: Arguments = None) -> NoReturn:
    """Run `imm-loop`."""
    from .loop import loop_command

    run_and_exit(loop_command, arguments)


def imm_analyze(arguments: Arguments = None) -> NoReturn:
    """Run `imm-analyze`."""
    from .analyze import analyze_command

    run_and_exit(analyze_command, arguments)


def main() -> NoReturn:
    """Run `python -m mergekit_imm merge|verify|loop|analyze`."""
    commands = {"merge": imm_merge, "verify": imm_verify, "loop": imm_loop, "analyze": imm_analyze}
    arguments = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]  # `torchrun -m mergekit_imm -- merge`
    name = arguments[0] if arguments else ""
    if name in commands:
        commands[name](arguments[1:])
    if name == "--version":
        click.echo(f"mergekit_imm, version {__version__}")
        sys.exit(0)
    wanted = name in ("-h", "--help")
    click.echo(f"usage: python -m mergekit_imm {{{','.join(commands)}}} ... (each has --help)", err=not wanted)
    if not wanted:
        click.echo(f"error: {name!r} is not one of {', '.join(commands)}", err=True)
    sys.exit(0 if wanted else 2)
