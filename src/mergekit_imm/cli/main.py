"""Run a command by its name: `imm-merge` and its siblings, `python -m mergekit_imm merge|verify|loop|analyze`.

Each command is imported when it runs, so that the help of one does not wait for the others.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from .console import run_and_exit
from .help import CONTEXT, Group, version_option

Arguments = list[str] | None  # None: those of the process


def merge() -> click.Command:
    """Import the command `imm-merge`."""
    from .merge import merge_command

    return merge_command


def verify() -> click.Command:
    """Import the command `imm-verify`."""
    from .verify import verify_command

    return verify_command


def loop() -> click.Command:
    """Import the command `imm-loop`."""
    from .loop import loop_command

    return loop_command


def analyze() -> click.Command:
    """Import the command `imm-analyze`."""
    from .analyze import analyze_command

    return analyze_command


COMMANDS = {"merge": merge, "verify": verify, "loop": loop, "analyze": analyze}


def imm_merge(arguments: Arguments = None) -> NoReturn:
    """Run `imm-merge`."""
    run_and_exit(merge(), arguments)


def imm_verify(arguments: Arguments = None) -> NoReturn:
    """Run `imm-verify`."""
    run_and_exit(verify(), arguments)


def imm_loop(arguments: Arguments = None) -> NoReturn:
    """Run `imm-loop`."""
    run_and_exit(loop(), arguments)


def imm_analyze(arguments: Arguments = None) -> NoReturn:
    """Run `imm-analyze`."""
    run_and_exit(analyze(), arguments)


class _Module(Group):
    """The commands together."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS[cmd_name]() if cmd_name in COMMANDS else None


@click.group("python -m mergekit_imm", cls=_Module, context_settings=CONTEXT)
@version_option("mergekit_imm")
def module_command() -> None:
    """Merge LLM checkpoints, round after round, for iterative self-improvement.

    Each COMMAND is also a program, imm-COMMAND, and has a --help of its own.
    """


def main() -> NoReturn:
    """Run `python -m mergekit_imm`."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]  # `torchrun -m mergekit_imm -- merge`
    if arguments and arguments[0] in COMMANDS:
        run_and_exit(COMMANDS[arguments[0]](), arguments[1:])
    run_and_exit(module_command, arguments)
