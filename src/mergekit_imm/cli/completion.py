"""What a shell completes after an option or as an argument: files and folders that it finds itself, or words.

A parameter without one of these completes nothing, as click leaves it.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def files(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Let the shell complete files and folders."""
    return [CompletionItem(begun, type="file")]


def folders(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Let the shell complete folders."""
    return [CompletionItem(begun, type="dir")]


def words(*choices: str) -> Completer:
    """Complete these words, of a value that may be another too."""
    return lambda _ctx, _param, begun: [CompletionItem(each) for each in choices if each.startswith(begun)]


# What click lacks for `--option=value`: bash splits it into three words, of which click takes "=" for a value; zsh and
# fish keep it whole, and zsh would replace all of it by the value.


@add_completion_class
class _Bash(BashComplete):
    def get_completion_args(self) -> tuple[list[str], str]:
        args, begun = super().get_completion_args()
        return [each for each in args if each != "="], begun


@add_completion_class
class _Zsh(ZshComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        return _whole(super().get_completions(args, incomplete), incomplete)


@add_completion_class
class _Fish(FishComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        return _whole(super().get_completions(args, incomplete), incomplete)


def _whole(items: list[CompletionItem], incomplete: str) -> list[CompletionItem]:
    option, equals, _ = incomplete.partition("=")
    if not (equals and option.startswith("-")):
        return items
    return [CompletionItem(f"{option}={each.value}") if each.type == "plain" else each for each in items]
