"""The help of a command: options under headings, in columns that fit the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from ..common.messages import shown
from ..common.version import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
HEADINGS = (  # in the order of every help; --help itself is the last of the last
    "Commands",
    "Rounds",
    "Inputs",
    "Metrics",
    "Comparison",
    "Audit",
    "Measure",
    "Merge",
    "Selection",
    "Output",
    "Running",
)
_LAST = HEADINGS[-1]
_WHOLE = "\N{NON-BREAKING HYPHEN}"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option under a heading of the help; one that is needed stands in the usage line too."""

    def __init__(self, *names: Any, heading: str = _LAST, needed: bool = False, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading, self.needed = heading, needed or self.required

    def get_usage_pieces(self, _ctx: click.Context) -> list[str]:
        """Return the option, with its shorter name, if it is needed."""
        return [f"{min(self.opts, key=len)} {self.metavar}"] if self.needed else []

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with one pair of brackets at the end."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        allowed = getattr(self.type, "allowed", "")
        text = f"{record[1]}  [{allowed}]" if allowed else record[1]
        return record[0], text.replace("]  [", "; ")


class _Formatter(click.HelpFormatter):
    """Breaks lines at spaces only, so that `imm-merge` stays one word."""

    def write(self, string: str) -> None:
        super().write(string.replace(_WHOLE, "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _WHOLE))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("-", _WHOLE)) for name, text in rows], col_max, col_spacing)


class _Context(click.Context):
    formatter_class = _Formatter


class Command(click.Command):
    """A command whose help has its options under their headings, in the order of their declaration."""

    context_class = _Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. The errors of click's parser do not say for which command; this one is theirs."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options for each heading; all have the same columns."""
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups[getattr(param, "heading", _LAST)].append(record)
        most = max(20, min(30, formatter.width // 3))
        names = [name for rows in groups.values() for name, _ in rows]
        width = max(len(name) for name in names if len(name) <= most)
        for heading, rows in groups.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(width), text) for name, text in rows], width)


class Group(click.Group):
    """A command of commands, in the order of their declaration; their short help is wrapped, not cut."""

    context_class = _Context

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name all if there is no such."""
        names = self.list_commands(ctx)
        if args[0] not in names and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{shown(args[0])}'; give one of {', '.join(names)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of the commands."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help or "") for name, command in commands.items() if command])


def option(heading: str, *names: str, **settings: Any) -> Decorator:
    """Add an option under a heading; `settings` are those of click.option."""
    return click.option(*names, cls=Option, heading=heading, **settings)


def printing_options(*, quiet: str, as_json: str) -> Decorator:
    """Add -q, --json and --debug; the texts say what a command then hides and prints."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in (
            option(_LAST, "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
            option(_LAST, "--json", "as_json", is_flag=True, help=as_json),
            option(_LAST, "-q", "--quiet", is_flag=True, callback=_hush, help=quiet),
        ):
            command = each(command)
        return command

    return add


def _hush(ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    if quiet and not ctx.resilient_parsing:
        from ..numerics.native import hushed

        ctx.with_resource(hushed())
    return quiet


def version_option(program: str) -> Decorator:
    """Add --version."""
    return click.version_option(__version__, prog_name=program, cls=Option)
