"""Make command-line options from merge options, which declare name, type, default, heading and help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from ..common.checks import check_count
from ..common.messages import shown
from ..errors import ArgumentError
from ..numerics.dtypes import SHORT_NAMES
from ..options.options import MergeOptions, RunOptions
from .completion import files, words
from .help import option

_FIELDS: dict[str, Field[Any]] = {each.name: each for each in (*fields(MergeOptions), *fields(RunOptions))}
Command = Callable[..., Any]


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.2 only
    """A number, float or int. `check` refuses it with the sentence that Python callers read; None: it is checked later.

    `allowed` is for the help: "x>=1".
    """

    name = "number"

    def __init__(self, kind: type[float], check: Callable[[Any], Any] | None = None, allowed: str = "") -> None:
        self.kind, self.check, self.allowed = kind, check, allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            number = self.kind(value)
        except ValueError:
            number = math.nan
        if number != number:
            comma = "; a decimal takes a point, not a comma" if "," in str(value) else ""
            self.fail(f"'{shown(value)}' is not a {'whole ' if self.kind is int else ''}number{comma}", param, ctx)
        try:
            if self.check is not None:
                whole = isinstance(number, float) and number.is_integer()
                self.check(int(number) if whole else number)  # a message says 50, as typed, not 50.0
        except ArgumentError as error:
            self.fail(str(error), param, ctx)
        return number


class DtypeChoice(click.Choice):  # type: ignore[type-arg]  # generic in click 8.2 only
    """A choice of dtypes, by long or short name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the long name of a dtype."""
        return super().convert(SHORT_NAMES.get(value, value), param, ctx)


def options_of(*names: str, **changes: dict[str, Any]) -> Callable[[Command], Command]:
    """Add these options to a command, in this order; `changes` are arguments of `option` by option name."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = _option(name, changes.get(name, {}))(command)
        return command

    return add


def _option(name: str, changes: dict[str, Any]) -> Callable[[Command], Command]:
    declared = _FIELDS[name]
    metadata = declared.metadata
    assert declared.default is not MISSING
    settings: dict[str, Any] = {"help": metadata["help"], "default": declared.default}
    settings |= {"metavar": metadata["metavar"]} if "metavar" in metadata else {}
    if declared.default is False:
        settings = {"help": metadata["help"], "is_flag": True}
    elif declared.default == ():
        settings |= {"multiple": True}
    elif name == "clip":
        settings |= {"nargs": 2, "type": Number(float)}
    elif "choices" in metadata:
        settings |= {"type": (DtypeChoice if name == "dtype" else click.Choice)(metadata["choices"])}
    elif isinstance(declared.default, int | float) or "range" in metadata:
        kind = float if isinstance(declared.default, float) else int
        settings |= {"type": Number(kind, metadata["check"], metadata.get("range", ""))}
    if declared.default is not False and declared.default not in (None, ()):
        settings |= {"show_default": True}
    if "completes" in metadata:
        completes = metadata["completes"]
        settings |= {"shell_complete": files if completes == "files" else words(*completes)}
    settings = {"heading": metadata["heading"], **settings, **changes}
    return option(settings.pop("heading"), f"--{name.replace('_', '-')}", **settings)


def _count(name: str, least: int) -> Number:
    return Number(int, lambda value: check_count(name, value, least), f"x>={least}")


def data_options(command: Command) -> Command:
    """Add the options of commands that run models on a file of texts."""
    for each in reversed(
        (
            option(
                "Inputs",
                "--data",
                required=True,
                metavar="FILE",
                shell_complete=files,
                help='JSONL: one {"text": ...} or {"prompt": ..., "response": ...} per line; prompts do not count.',
            ),
            option(
                "Inputs",
                "--samples",
                type=_count("samples", 1),
                metavar="N",
                help="Use the first N examples.  [default: all]",
            ),
            option(
                "Inputs",
                "--max-length",
                type=_count("max_length", 2),
                default=1024,
                show_default=True,
                metavar="N",
                help="Truncate sequences to N tokens, with a note.",
            ),
            option(
                "Running",
                "--batch-size",
                type=_count("batch_size", 1),
                metavar="N",
                help="Sequences per forward pass; the result is the same.  [default: up to 1024 tokens]",
            ),
            options_of("device", device={"help": "Device to compute on."}),
            option(
                "Running",
                "--dtype",
                type=DtypeChoice(["float32", "bfloat16", "auto"]),
                default="float32",
                show_default=True,
                help="Dtype of the weights in memory; auto: as stored.",
            ),
        )
    ):
        command = each(command)
    return command
