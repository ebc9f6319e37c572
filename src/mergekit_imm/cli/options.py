"""The options of commands, made from the options of merges: name, type, default and line of help stand there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from ..options.options import SHORT_DTYPES, MergeOptions, RunOptions

_FIELDS: dict[str, Field[Any]] = {each.name: each for each in (*fields(MergeOptions), *fields(RunOptions))}
Command = Callable[..., Any]


class DtypeChoice(click.Choice):  # type: ignore[type-arg]  # generic in click 8.2 only
    """A choice of dtypes, which have short names too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the long name of a dtype."""
        return super().convert(SHORT_DTYPES.get(value, value), param, ctx)


def options_of(*names: str, **changes: dict[str, Any]) -> Callable[[Command], Command]:
    """Add the options with these names to a command, in this order; `changes` are for click, by name."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = _option(name, changes.get(name, {}))(command)
        return command

    return add


def _option(name: str, changes: dict[str, Any]) -> Callable[[Command], Command]:
    declared = _FIELDS[name]
    said = declared.metadata
    how: dict[str, Any] = {"help": said["help"], "default": declared.default}
    assert declared.default is not MISSING
    if declared.default is False:
        return click.option(f"--{name.replace('_', '-')}", is_flag=True, help=said["help"])
    how |= {"metavar": said["metavar"]} if "metavar" in said else {}
    if declared.default == ():
        how |= {"multiple": True}
    elif name == "clip":
        how |= {"nargs": 2, "type": float}
    elif "choices" in said:
        how |= {"type": (DtypeChoice if name == "dtype" else click.Choice)(said["choices"])}
    elif "range" in said:
        low, high = said["range"]
        kind = click.FloatRange if isinstance(declared.default, float) else click.IntRange
        how |= {"type": kind(low, high, max_open=said.get("below", False))}
    elif isinstance(declared.default, int):
        how |= {"type": int}
    how |= {"show_default": True} if declared.default not in (None, ()) else {}
    return click.option(f"--{name.replace('_', '-')}", **{**how, **changes})
