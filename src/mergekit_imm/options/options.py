"""Every option of a merge, once: its name, default, check, line of help, and whether it changes the bytes.

The command's options, the recipe, the model card, the loop's settings and the table in the docs derive from the fields
of `MergeOptions` (what changes the bytes; it stands in the recipe) and `RunOptions` (what does not). Both are checked
when they are made: nothing below them takes loose values.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..common.checks import as_number, as_path, is_integer
from ..common.messages import shown
from ..errors import ArgumentError
from ..model.rename import parse_rename
from ..numerics.mask import arithmetic, check_round
from ..numerics.sparsifiers import parse_sparsify
from .layer_factors import (
    check_factors,
    importance_factors,
    is_rule,
    read_importance,
    read_layer_factors,
    resolve_factors,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LEAST_BARE_SIZE = 1_000_000  # bytes; a smaller number without a unit is meant as GB

Progress = Callable[[int, int], None]  # bytes of the output done, and of all


def _option(default: Any, text: str, check: Callable[[str, Any], Any] | None = None, **how: Any) -> Any:
    """Declare an option: its default, its line of help, and a check that returns the value to keep.

    how: `metavar`, `choices`, `range` (of numbers; with `below` its end is left out) for the command line; `late` for
    an option that the first recipes lack, and later ones hold only where it is used.
    """
    return field(default=default, metadata={"help": text, "check": check, **how})


def _one_of(*choices: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ArgumentError(f"{name} is {shown(repr(value), 60)}; it must be one of {', '.join(choices)}")
        return value

    return check


def _patterns(name: str, values: Any) -> tuple[str, ...]:
    """Return the values of a repeatable option as a tuple; refuse a bare text."""
    if isinstance(values, str):
        raise ArgumentError(f"{name} is a string; give a list of patterns, [{values!r}]")
    try:
        return tuple(values)
    except TypeError as error:
        raise ArgumentError(f"{name} is {shown(repr(values), 60)}; give a list of patterns") from error


def _regexes(name: str, values: Any) -> tuple[str, ...]:
    patterns = _patterns(name, values)
    for pattern in patterns:
        try:
            if not isinstance(pattern, str):
                raise TypeError("give a string")
            re.compile(pattern)
        except (re.error, TypeError) as error:
            given = f"--{name.replace('_', '-')} {shlex.quote(shown(pattern))}"
            raise ArgumentError(f"{given} is not a regular expression: {error}") from error
    return patterns


def _renames(name: str, values: Any) -> tuple[str, ...]:
    rules = _patterns(name, values)
    for rule in rules:
        parse_rename(rule)
    return rules


def _files(name: str, values: Any) -> tuple[str, ...]:
    files = _patterns(name, values)
    for file in files:
        if not isinstance(file, str) or not file:
            raise ArgumentError(f"{name} holds {file!r}; give files by their path in the model, 'vit.safetensors'")
    return files


def _dtype(name: str, value: Any) -> str:
    """Return "base", "start", or the long name of a dtype: of None, a short name, or a torch.dtype."""
    text = "base" if value is None else str(value).removeprefix("torch.")
    text = SHORT_DTYPES.get(text, text)
    if text not in ("base", "start", *DTYPES):
        raise ArgumentError(f"{name} is {shown(text, 60)!r}; it must be one of base, start, {', '.join(DTYPES)}")
    return text


def _size(_: str, value: Any) -> int | None:
    """Return bytes: a number of them as it is, once it is checked (`options_from`)."""
    return value if value is None or type(value) is int else parse_size(value)


def _importance(name: str, value: Any) -> Any:
    """Return a mapping of plain numbers, or the path of a file as it is."""
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        return as_path(name, value)
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} is {value!r:.60}; give a mapping of layers, or a JSON file that holds one")
    return {key: as_number(each) for key, each in value.items()}


def _layer_factors(name: str, value: Any) -> Any:
    """Return a mapping of plain numbers, a rule, or the path of a file as it is."""
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        if isinstance(value, str) and is_rule(value):
            check_factors(value)
        return as_path(name, value)
    check_factors(value)
    return {key: as_number(each) for key, each in value.items()}


def _clip(_: str, value: Any) -> Any:
    return tuple(map(as_number, value)) if isinstance(value, tuple | list) else value


def _number(_: str, value: Any) -> Any:
    return as_number(value)


@dataclass(frozen=True)
class MergeOptions:
    """Everything that decides the bytes of a merge, beside its inputs. Raises ArgumentError for a wrong value."""

    alpha: float = _option(
        0.5,
        "Weight of BASE, 0 to 1. Several values, of this and the next two: a sweep; OUT names them.",
        metavar="A",
        range=(0, 1),
    )
    drop: float = _option(
        0.2,
        "Share of the delta's elements to drop (see --sparsify), from 0 to below 1.",
        metavar="P",
        range=(0, 1),
        below=True,
    )
    seed: int = _option(0, "Fixes the mask, with --iteration.", _number, metavar="N")
    iteration: int | None = _option(
        None,
        "Round, from 0.  [default: one more than in START's recipe; 0 without]",
        _number,
        metavar="N",
        range=(0, None),
    )
    importance: Mapping[str, float] | str | Path | None = _option(
        None, "JSON: layer -> importance; weights the delta (IIMM).", _importance, metavar="FILE"
    )
    shrink: float = _option(
        1.0, "Pull the factors of --importance towards 1.", _number, metavar="S", range=(0, 1), late=True
    )
    clip: tuple[float, float] | None = _option(
        None, "Bounds of the factors of --importance.", _clip, metavar="LOW HIGH", late=True
    )
    layer_factors: Mapping[str, float] | str | Path | None = _option(
        None,
        "Factors of the delta by layer: lines:FIRST,LAST, groups:EARLY,MIDDLE,LATE, or a JSON FILE.",
        _layer_factors,
        metavar="WHAT",
        late=True,
    )
    sparsify: str = _option(
        "dare",
        "What --drop drops: dare, at random; trim, all but the largest; della[:EPS], the smaller more often.",
        metavar="HOW",
        late=True,
    )
    reference: str = _option(
        "start", "What the delta is taken from.", _one_of("start", "base"), choices=("start", "base")
    )
    dtype: str = _option(
        "base",
        "Of the output's float tensors; base, start: as that model has them, tensor by tensor.",
        _dtype,
        choices=("base", "start", *DTYPES),
    )
    max_shard_size: int | None = _option(
        None, "Lay the files anew, e.g. 5GB.  [default: as in BASE]", _size, metavar="SIZE"
    )
    keep: tuple[str, ...] = _option((), "Tensors to leave as in BASE; repeatable.", _regexes, metavar="REGEX")
    take: tuple[str, ...] = _option((), "Tensors to take from SFT; repeatable.", _regexes, metavar="REGEX")
    no_drop: tuple[str, ...] = _option((), "Tensors to merge without dropping; repeatable.", _regexes, metavar="REGEX")
    rename: tuple[str, ...] = _option(
        (), "What names of SFT and START are in BASE; repeatable.", _renames, metavar="REGEX=REPL", late=True
    )
    vocab: str = _option(
        "strict",
        "Whose vocabulary the output has; strict: different sizes are an error.",
        _one_of("strict", "base", "sft"),
        choices=("strict", "base", "sft"),
    )
    dequantize: bool = _option(False, "Multiply FP8 weights by their scales; the output is bfloat16.", late=True)
    allow_nonfinite: bool = _option(False, "Let NaN and infinity in the inputs through.")
    copy_code: bool = _option(False, "Copy *.py files of the model too.")
    leave_out: tuple[str, ...] = _option(
        (),
        "File or folder of an input that is no weights of the model, by its path there; repeatable.",
        _files,
        metavar="FILE",
        late=True,
    )

    def __post_init__(self) -> None:
        """Check each value, and those that go together; keep numbers, lists and dtypes in one form."""
        arithmetic(alpha=self.alpha, drop=self.drop)
        check_round(self.seed, self.round)
        _check(self)
        for name in ("alpha", "drop"):  # 1 and 1.0 are one recipe
            object.__setattr__(self, name, float(getattr(self, name)))
        how = parse_sparsify(self.sparsify, self.drop)
        object.__setattr__(self, "sparsify", how.kind + (f":{how.epsilon:g}" if how.kind == "della" else ""))
        if self.layer_factors is not None and self.importance is not None:
            raise ArgumentError("--importance and --layer-factors are both given; a layer has one factor: give one")
        if self.importance is None and (self.shrink != 1 or self.clip is not None):
            raise ArgumentError("--shrink and --clip change the factors of --importance, and none is given")
        if self.importance is not None:
            read = isinstance(self.importance, Mapping)
            importance_factors(self.importance if read else {"0": 1.0}, shrink=self.shrink, clip=self.clip)  # type: ignore[arg-type]

    @property
    def round(self) -> int:
        """The round that the mask is of: `iteration`, and 0 where that is not known yet."""
        return 0 if self.iteration is None else self.iteration


@dataclass(frozen=True)
class RunOptions:
    """How a merge is carried out; the bytes are the same whatever these are."""

    device: str = _option("cpu", "Where to compute; same bits.", lambda _, v: check_device(v), metavar="cpu|cuda")
    workers: int | None = _option(
        None, "Threads.  [default: min(4, 2 x CPUs)]", lambda _, v: check_workers(v), metavar="N", range=(1, None)
    )
    dry_run: bool = _option(False, "Check everything, say what would happen, write nothing.")
    overwrite: bool = _option(False, "Replace an OUT that holds something else.")
    restart: bool = _option(False, "Begin anew instead of going on with an unfinished merge.")
    verify: bool = _option(False, "Compute all again and compare every byte, before OUT appears.")
    progress: Progress | None = _option(None, "")

    def __post_init__(self) -> None:
        """Check each value."""
        _check(self)


def _check(options: MergeOptions | RunOptions) -> None:
    for each in fields(options):
        check = each.metadata["check"]
        if check is not None:
            object.__setattr__(options, each.name, check(each.name, getattr(options, each.name)))


def check_device(device: Any) -> str:
    """Return a device that merges run on, or raise ArgumentError; whether it is there is not looked up."""
    if not isinstance(device, str) or (device not in ("cpu", "cuda") and not device.startswith("cuda:")):
        raise ArgumentError(f"device is {shown(repr(device), 60)}; it must be 'cpu' or 'cuda'")
    return device


def check_workers(workers: Any) -> int | None:
    """Return a number of threads, or None for the default. Raises ArgumentError unless it is >= 1."""
    if workers is not None and (not is_integer(workers) or workers < 1):
        raise ArgumentError(f"workers is {shown(repr(workers), 60)}; it is a number of threads, at least 1")
    return None if workers is None else int(workers)


def parse_size(size: int | str) -> int:
    """Return a number of bytes from 5000000000, "5GB", "500MB" or "4GiB".

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


def names_of(options: type[MergeOptions | RunOptions]) -> tuple[str, ...]:
    """Return the names of the options of a class, in order."""
    return tuple(each.name for each in fields(options))


def options_from(given: Mapping[str, Any], options: type[Any]) -> Any:
    """Return options of a class made from the values among `given` that it knows; the rest is left to others."""
    values = {name: given[name] for name in names_of(options) if name in given}
    if values.get("max_shard_size") is not None:
        values["max_shard_size"] = parse_size(values["max_shard_size"])  # a bare number too, which may be meant as GB
    return options(**values)


def with_files_read(options: MergeOptions) -> MergeOptions:
    """Return options whose importance and layer factors are read, where files were given. Raises ArgumentError."""
    changes: dict[str, Any] = {}
    if isinstance(options.importance, str | Path):
        changes["importance"] = read_importance(options.importance)
    if isinstance(options.layer_factors, str | Path):
        changes["layer_factors"] = read_layer_factors(options.layer_factors)
    return replace(options, **changes) if changes else options


def layer_factors_of(options: MergeOptions, names: Iterable[str]) -> dict[str, float]:
    """Return the factors of a merge, of an importance (IIMM) or as given, by full layer key; none if neither is given.

    `names` are the base's; the factor of everything outside the layers is under "". The files are read already.
    """
    importance, factors = options.importance, options.layer_factors
    if isinstance(importance, Mapping):
        factors = importance_factors(importance, shrink=options.shrink, clip=options.clip)
    if factors is None:
        return {}
    assert not isinstance(factors, Path)
    return resolve_factors(factors, names)


def files_of(options: MergeOptions) -> dict[str, Path]:
    """Return the files that options name, each under a label for messages."""
    found = {}
    if isinstance(options.importance, str | Path):
        found["the importance file"] = Path(options.importance)
    if isinstance(options.layer_factors, str | Path) and Path(options.layer_factors).is_file():
        found["the file of layer factors"] = Path(options.layer_factors)
    return found


def default_of(name: str) -> Any:
    """Return the default of an option that changes the bytes."""
    return next(each.default for each in fields(MergeOptions) if each.name == name)


def is_default(options: MergeOptions, name: str) -> bool:
    """Whether an option has its default."""
    return bool(getattr(options, name) == default_of(name))


def check_keywords(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise ArgumentError for a name that is none of the known ones; it says which is meant.

    >>> check_keywords(["aplha"], ["alpha", "drop"], "a merge")
    Traceback (most recent call last):
    mergekit_imm.errors.ArgumentError: 'aplha' is no option of a merge; did you mean 'alpha'?
    """
    for name in given:
        if name in known:
            continue
        near = get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"its options are {', '.join(sorted(known))}"
        raise ArgumentError(f"'{shown(name)}' is no option of {what}; {hint}")


def as_arguments(options: MergeOptions) -> list[str]:
    """Return the words of a command that mean these options: the numbers always, the others where they differ.

    A mapping is not a word; its place is taken by the name of a file to be written.
    """
    always = ("alpha", "drop", "seed", "iteration")
    words: list[str] = []
    values = {each.name: getattr(options, each.name) for each in fields(MergeOptions)}
    used = [name for name in values if name in always or not is_default(options, name)]
    lists = [name for name in used if isinstance(values[name], tuple) and name != "clip"]
    flags = sorted(name for name in used if values[name] is True)
    for name in [*(name for name in used if name not in {*lists, *flags}), *lists, *flags]:
        option, value = f"--{name.replace('_', '-')}", values[name]
        if name in flags:
            words.append(option)
        elif name in lists:
            words += [word for each in value for word in (option, each)]
        elif name == "clip":
            words += [option, *map(str, value)]
        elif isinstance(value, Mapping):
            words += [option, {"importance": "importance.json", "layer_factors": "factors.json"}[name]]
        elif name == "max_shard_size":  # a smaller number without a unit is refused
            words += [option, f"{value}{'B' if value < LEAST_BARE_SIZE else ''}"]
        else:
            words += [option, str(value)]
    return words
