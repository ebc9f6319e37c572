"""Run a command by its name: `imm-merge` and its siblings, `python -m mergekit_imm merge|verify|loop|analyze`."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from ..common.version import __version__
from .analyze import analyze_command
from .console import run_and_exit
from .loop import loop_command
from .merge import merge_command
from .verify import verify_command


def imm_merge() -> NoReturn:
    """Run `imm-merge`."""
    run_and_exit(merge_command)


def imm_verify() -> NoReturn:
    """Run `imm-verify`."""
    run_and_exit(verify_command)


def imm_loop() -> NoReturn:
    """Run `imm-loop`."""
    run_and_exit(loop_command)


def imm_analyze() -> NoReturn:
    """Run `imm-analyze`."""
    run_and_exit(analyze_command)


def main() -> NoReturn:
    """Run `python -m mergekit_imm merge|verify|loop|analyze`."""
    commands: dict[str, click.Command] = {
        "merge": merge_command,
        "verify": verify_command,
        "loop": loop_command,
        "analyze": analyze_command,
    }
    arguments = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]  # `torchrun -m mergekit_imm -- merge`
    name = arguments[0] if arguments else ""
    if name in commands:
        run_and_exit(commands[name], arguments[1:])
    if name == "--version":
        click.echo(f"mergekit_imm, version {__version__}")
        sys.exit(0)
    wanted = name in ("-h", "--help")
    click.echo(f"usage: python -m mergekit_imm {{{','.join(commands)}}} ... (each has --help)", err=not wanted)
    if not wanted:
        click.echo(f"error: {name!r} is not one of {', '.join(commands)}", err=True)
    sys.exit(0 if wanted else 2)
