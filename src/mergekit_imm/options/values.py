"""Check the values of options, and put them into the form in which they are stored."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ..common.checks import as_number, as_path, is_integer, is_number
from ..common.messages import shown
from ..errors import ArgumentError
from ..numerics.dtypes import OUTPUT_DTYPES, SHORT_NAMES
from .layer_factors import check_factors, is_rule

LEAST_BARE_SIZE = 1_000_000  # bytes; a smaller number without a unit probably means GB


def as_patterns(name: str, values: Any) -> tuple[str, ...]:
    """Return the values of a repeatable option as a tuple; reject a bare string."""
    if isinstance(values, str):
        raise ArgumentError(f"{name} is a string; give a list of patterns, [{values!r}]")
    try:
        return tuple(values)
    except TypeError as error:
        raise ArgumentError(f"{name} is {shown(repr(values), 60)}; give a list of patterns") from error


def as_regexes(name: str, values: Any) -> tuple[str, ...]:
    """Return regular expressions as a tuple. Raises ArgumentError, naming the option."""
    patterns = as_patterns(name, values)
    for pattern in patterns:
        try:
            if not isinstance(pattern, str):
                raise TypeError("give a string")
            re.compile(pattern)
        except (re.error, TypeError) as error:
            given = f"--{name.replace('_', '-')} {shlex.quote(shown(pattern))}"
            raise ArgumentError(f"{given} is not a regular expression: {error}{_without_stars(pattern)}") from error
    return patterns


def _without_stars(pattern: Any) -> str:
    """Return what to write in place of a pattern of the shell's, such as '*norm*'; "" if there is nothing to say."""
    bare = pattern.strip("*") if isinstance(pattern, str) else ""
    try:
        re.compile(bare)
    except re.error:
        return ""
    return f"; a pattern matches anywhere in the name, so write '{shown(bare)}'" if bare not in ("", pattern) else ""


def as_renames(values: Any) -> tuple[str, ...]:
    """Return rules of --rename as a tuple, each of them understood."""
    from ..model.rename_rules import parse_rename  # only for who renames: --help must not wait

    rules = as_patterns("rename", values)
    for rule in rules:
        parse_rename(rule)
    return rules


def as_files(values: Any) -> tuple[str, ...]:
    """Return paths of files in a model as a tuple."""
    files = as_patterns("leave_out", values)
    for file in files:
        if not isinstance(file, str) or not file:
            raise ArgumentError(f"leave_out holds {file!r}; give files by their path in the model, 'vit.safetensors'")
    return files


def as_dtype(value: Any) -> str:
    """Return "base", "start" or a long dtype name, given None, a long or short name, or a torch.dtype."""
    text = "base" if value is None else str(value).removeprefix("torch.")
    text = SHORT_NAMES.get(text, text)
    if text not in ("base", "start", *OUTPUT_DTYPES):
        raise ArgumentError(f"dtype is {shown(text, 60)!r}; it must be one of base, start, {', '.join(OUTPUT_DTYPES)}")
    return text


def as_size(value: Any) -> int:
    """Return a size in bytes. Integers pass: `options_from` has checked them, and recipes may hold any."""
    return value if type(value) is int else parse_size(value)


def as_importance(value: Any) -> Any:
    """Return a mapping with Python numbers, or the path of a file."""
    if isinstance(value, str | os.PathLike):
        return as_path("importance", value)
    if not isinstance(value, Mapping):
        raise ArgumentError(f"importance is {value!r:.60}; give a mapping of layers, or a JSON file that holds one")
    return {key: as_number(each) for key, each in value.items()}


def as_layer_factors(value: Any) -> Any:
    """Return a mapping with Python numbers, a rule, or the path of a file."""
    if isinstance(value, str | os.PathLike):
        if isinstance(value, str) and is_rule(value):
            check_factors(value)
        return as_path("layer_factors", value)
    check_factors(value)
    return {key: as_number(each) for key, each in value.items()}


def as_clip(value: Any) -> Any:
    """Return the bounds as Python numbers; whether they are bounds is checked where they are used."""
    return tuple(map(as_number, value)) if isinstance(value, tuple | list) else value


def check_device(device: Any) -> str:
    """Return a valid device name, or raise ArgumentError. Does not check that the device exists."""
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise ArgumentError(
            f"device is {shown(repr(device), 60)}; it must be 'cpu' or 'cuda', or 'cuda:1' for the second GPU"
        )
    return device


def check_sample(value: Any) -> float:
    """Return the share of a merge to recompute."""
    if not is_number(value) or not 0 < value <= 1:
        raise ArgumentError(f"sample is {shown(repr(value), 60)}; it is the share to recompute, 0 < sample <= 1")
    return float(value)


def as_workers(value: Any) -> int:
    """Return a number of threads."""
    if not is_integer(value) or value < 1:
        raise ArgumentError(f"workers is {shown(repr(value), 60)}; it is a number of threads, at least 1")
    return int(value)


def parse_size(size: int | str) -> int:
    """Parse a size in bytes: 5000000000, "5GB", "500MB" or "4GiB". Raises ArgumentError.

    >>> parse_size("5GB"), parse_size("4GiB")
    (5000000000, 4294967296)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match:
        raise ArgumentError(f"size {size!r} is not understood; write it as 5GB, 500MB or 4GiB")
    number, unit, binary = match.groups()
    bare = str(size).strip()
    if bare == number and 0 < float(number) < LEAST_BARE_SIZE:
        raise ArgumentError(f"size {size!r} is in bytes; write {number}GB, or {number}B if bytes are meant")
    value = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    if value < 1:
        raise ArgumentError(f"size {size!r} must be at least one byte")
    return value
