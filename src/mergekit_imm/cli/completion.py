"""What the shell completes after an option: the files and folders that it finds, or words.

A parameter without one of these completes nothing, as click leaves it.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

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
