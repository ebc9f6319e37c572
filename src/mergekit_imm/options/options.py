"""All options of a merge, declared once: name, default, check, help, and whether they change the output bytes.

Command options, recipes, model cards and loop settings derive from the fields of `MergeOptions` (change the bytes; go
into the recipe) and `RunOptions` (do not). Both check their values when constructed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..common.progress import Progress, check_progress
from ..errors import ArgumentError
from ..numerics.dtypes import OUTPUT_DTYPES
from ..numerics.mask import check_alpha, check_drop, check_iteration, check_seed
from ..numerics.sparsifiers import parse_sparsify
from .layer_factors import (
    check_shrink,
    importance_factors,
    read_importance,
    read_layer_factors,
    resolve_factors,
)
from .values import (
    LEAST_BARE_SIZE,
    as_clip,
    as_dtype,
    as_files,
    as_importance,
    as_layer_factors,
    as_regexes,
    as_renames,
    as_size,
    as_workers,
    check_device,
    parse_size,
)


def _option(heading: str, default: Any, text: str, check: Callable[[Any], Any] | None = None, **how: Any) -> Any:
    """Declare an option: its heading in the help, default, help text, and a check, which returns the value to store.

    how: `metavar`, `choices`, `range` (of a number, for the help) and `completes` ("files", or words that a shell
    proposes) for the command line; without a check, the value must be one of the `choices`. `late` marks options that
    the first recipes lack; recipes store them only when used.
    """
    return field(default=default, metadata={"heading": heading, "help": text, "check": check, **how})


@dataclass(frozen=True)
class _Options:
    """Options that check and normalise their values when constructed."""

    def __post_init__(self) -> None:
        """Check each value that was changed: a default is right by definition."""
        for each in fields(self):
            value, how = getattr(self, each.name), each.metadata
            if type(value) is type(each.default) and value == each.default:
                continue
            if how["check"] is not None:
                object.__setattr__(self, each.name, how["check"](value))
            elif "choices" in how and value not in how["choices"]:
                choices = ", ".join(how["choices"])
                raise ArgumentError(f"{each.name} is {shown(repr(value), 60)}; it must be one of {choices}")


@dataclass(frozen=True)
class MergeOptions(_Options):
    """Every option that changes the bytes of a merge. Raises ArgumentError for an invalid value."""

    alpha: float = _option(
        "Merge",
        0.5,
        "Weight of BASE, 0 to 1. Comma-separated values (also of --drop, --seed) run a sweep: put {alpha} in OUT.",
        check_alpha,
        metavar="A",
    )
    drop: float = _option(
        "Merge",
        0.2,
        "Fraction of the delta's elements to drop, 0 <= P < 1; see --sparsify.",
        check_drop,
        metavar="P",
    )
    seed: int = _option("Merge", 0, "Seed of the drop mask, together with --iteration.", check_seed, metavar="N")
    iteration: int | None = _option(
        "Merge",
        None,
        "Round, counted from 0.  [default: START's plus 1; 0 without --start]",
        check_iteration,
        metavar="N",
        range="x>=0",
    )
    importance: Mapping[str, float] | str | Path | None = _option(
        "Merge",
        None,
        "JSON file of layer importances, which scale each layer's delta (IIMM).",
        as_importance,
        metavar="FILE",
        completes="files",
    )
    shrink: float = _option(
        "Merge",
        1.0,
        "Strength of the --importance factors: 1 as computed, 0 all equal to 1.",
        check_shrink,
        metavar="S",
        range="0<=x<=1",
        late=True,
    )
    clip: tuple[float, float] | None = _option(
        "Merge", None, "Clamp the --importance factors to this range.", as_clip, metavar="LOW HIGH", late=True
    )
    layer_factors: Mapping[str, float] | str | Path | None = _option(
        "Merge",
        None,
        "Scale each layer's delta: lines:FIRST,LAST, groups:EARLY,MIDDLE,LATE or a JSON file.",
        as_layer_factors,
        metavar="WHAT",
        completes="files",
        late=True,
    )
    sparsify: str = _option(
        "Merge",
        "dare",
        "Which elements --drop removes: dare, random ones; trim, the smallest; della[:EPS], small ones more often.",
        metavar="HOW",
        completes=("dare", "trim", "della"),
        late=True,
    )
    reference: str = _option("Merge", "start", "Model subtracted from SFT to get the delta.", choices=("start", "base"))
    dtype: str = _option(
        "Output",
        "base",
        "Dtype of float tensors; base, start: that of the same tensor in BASE or START.",
        as_dtype,
        choices=("base", "start", *OUTPUT_DTYPES),
    )
    max_shard_size: int | None = _option(
        "Output",
        None,
        "Maximum size of an output file, e.g. 5GB.  [default: the files of BASE]",
        as_size,
        metavar="SIZE",
    )
    keep: tuple[str, ...] = _option(
        "Merge", (), "Copy matching tensors from BASE; repeatable.", partial(as_regexes, "keep"), metavar="REGEX"
    )
    take: tuple[str, ...] = _option(
        "Merge", (), "Copy matching tensors from SFT; repeatable.", partial(as_regexes, "take"), metavar="REGEX"
    )
    no_drop: tuple[str, ...] = _option(
        "Merge",
        (),
        "Merge matching tensors without dropping; repeatable.",
        partial(as_regexes, "no_drop"),
        metavar="REGEX",
    )
    rename: tuple[str, ...] = _option(
        "Inputs",
        (),
        "Rename tensors of SFT and START to BASE's names; repeatable.",
        as_renames,
        metavar="REGEX=REPL",
        late=True,
    )
    vocab: str = _option(
        "Inputs",
        "strict",
        "Model that sets the vocabulary; strict refuses different sizes.",
        choices=("strict", "base", "sft"),
    )
    dequantize: bool = _option("Inputs", False, "Multiply FP8 weights by their scales; write bfloat16.", late=True)
    allow_nonfinite: bool = _option("Inputs", False, "Accept NaN and infinity in the inputs.")
    copy_code: bool = _option("Output", False, "Also copy the model's *.py files.")
    leave_out: tuple[str, ...] = _option(
        "Inputs",
        (),
        "Ignore a file or folder that is not part of the model, by its path there; repeatable.",
        as_files,
        metavar="FILE",
        late=True,
    )

    as_adapter: bool = _option(
        "Output", False, "Write an adapter again, not a whole model: SFT is one, --drop is 0, no --start.", late=True
    )

    def __post_init__(self) -> None:
        """Check the values, then those that depend on each other."""
        super().__post_init__()
        if self.sparsify != "dare":
            how = parse_sparsify(self.sparsify, self.drop)
            object.__setattr__(self, "sparsify", how.kind + (f":{how.epsilon!r}" if how.kind == "della" else ""))
        if self.layer_factors is not None and self.importance is not None:
            raise ArgumentError("--importance and --layer-factors are both given; a layer has one factor: give one")
        if self.importance is None and (self.shrink != 1 or self.clip is not None):
            raise ArgumentError("--shrink and --clip change the factors of --importance, and none is given")
        if self.as_adapter:
            _check_as_adapter(self)
        if self.importance is not None:
            read = isinstance(self.importance, Mapping)
            importance_factors(self.importance if read else {"0": 1.0}, shrink=self.shrink, clip=self.clip)  # type: ignore[arg-type]

    @property
    def round(self) -> int:
        """The round that keys the mask: `iteration`, or 0 while that is unknown."""
        return 0 if self.iteration is None else self.iteration


def _check_as_adapter(options: MergeOptions) -> None:
    """Raise ArgumentError for options with which no adapter is the result."""
    if options.drop != 0:
        raise ArgumentError(
            f"--as-adapter is given with --drop {options.drop:g}: what is left of an adapter's change after dropping is"
            " no product of small factors; give --drop 0, or leave out --as-adapter"
        )
    if options.alpha == 1:
        raise ArgumentError(
            "--as-adapter is given with --alpha 1: the result is the base, without a change; use a smaller --alpha"
        )
    for name in ("sparsify", "dtype", "max_shard_size", "keep", "take", "vocab"):
        if getattr(options, name) != MERGE_DEFAULTS[name]:
            option = f"--{name.replace('_', '-')}"
            raise ArgumentError(
                f"--as-adapter and {option} are both given; {option} is for a whole model: leave one out"
            )


@dataclass(frozen=True)
class RunOptions(_Options):
    """Options that do not change the output bytes."""

    device: str = _option(
        "Running",
        "cpu",
        "Device to compute on; the result is the same.",
        check_device,
        metavar="cpu|cuda[:N]",
        completes=("cpu", "cuda"),
    )
    workers: int | None = _option(
        "Running",
        None,
        "Number of threads.  [default: min(4, 2 x CPUs)]",
        as_workers,
        metavar="N",
        range="x>=1",
    )
    dry_run: bool = _option("Running", False, "Run all checks and print the plan; write nothing.")
    overwrite: bool = _option("Output", False, "Replace OUT, deleting all that it holds.")
    restart: bool = _option("Output", False, "Discard an unfinished merge and start over.")
    verify: bool = _option("Output", False, "Recompute the merge and compare every byte before OUT appears.")
    digests: bool = _option("Output", False, "Hash every file of OUT; write an in-toto statement, imm_statement.json.")
    progress: Progress | None = _option("", None, "", check_progress)


MERGE_DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(MergeOptions)}


# The options of every merge of a loop, as imm-loop takes them and loop.json holds them.
LOOP_OPTIONS = (
    "seed",
    "importance",
    "shrink",
    "clip",
    "layer_factors",
    "sparsify",
    "reference",
    "dtype",
    "keep",
    "no_drop",
    "take",
    "rename",
    "leave_out",
    "vocab",
)


def options_from(given: Mapping[str, Any], options: type[Any]) -> Any:
    """Make options of a class from the values in `given` that it knows; ignore the rest."""
    values = {each.name: given[each.name] for each in fields(options) if each.name in given}
    if values.get("max_shard_size") is not None:
        values["max_shard_size"] = parse_size(values["max_shard_size"])  # rejects small integers too
    return options(**values)


def with_files_read(options: MergeOptions) -> MergeOptions:
    """Replace the paths of importance and layer factor files by their contents. Raises ArgumentError."""
    changes: dict[str, Any] = {}
    if isinstance(options.importance, str | Path):
        changes["importance"] = read_importance(options.importance)
    if isinstance(options.layer_factors, str | Path):
        changes["layer_factors"] = read_layer_factors(options.layer_factors)
    return replace(options, **changes) if changes else options


def layer_factors_of(options: MergeOptions, names: Iterable[str]) -> dict[str, float]:
    """Return layer factors by full layer key, from an importance (IIMM) or as given; empty without either.

    `names` are the base's tensor names. Key "" holds the factor outside the layers. Files must have been read.
    """
    importance, factors = options.importance, options.layer_factors
    if isinstance(importance, Mapping):
        factors = importance_factors(importance, shrink=options.shrink, clip=options.clip)
    if factors is None:
        return {}
    assert not isinstance(factors, Path)
    return resolve_factors(factors, names)


def files_of(options: MergeOptions) -> dict[str, Path]:
    """Return the files named by options, by a label for messages."""
    files = {}
    if isinstance(options.importance, str | Path):
        files["the importance file"] = Path(options.importance)
    if isinstance(options.layer_factors, str | Path) and Path(options.layer_factors).is_file():
        files["the file of layer factors"] = Path(options.layer_factors)
    return files


def check_keywords(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise ArgumentError for an unknown name, suggesting the closest known one.

    >>> check_keywords(["aplha"], ["alpha", "drop"], "a merge")
    Traceback (most recent call last):
    mergekit_imm.errors.ArgumentError: 'aplha' is not an option of a merge; did you mean 'alpha'?
    """
    for name in given:
        if name in known:
            continue
        from difflib import get_close_matches

        near = get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"its options are {', '.join(sorted(known))}"
        raise ArgumentError(f"'{shown(name)}' is not an option of {what}; {hint}")


def as_arguments(options: MergeOptions) -> list[str]:
    """Return command-line arguments for these options: alpha, drop, seed and iteration, and all that are not default.

    A mapping becomes the name of a file, which the user must write.
    """
    singles: list[str] = []
    lists: list[str] = []
    flags: list[str] = []
    for name, default in MERGE_DEFAULTS.items():
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if value == default and name not in ("alpha", "drop", "seed", "iteration"):
            continue
        if value is True:
            flags.append(option)
        elif name == "clip":
            singles += [option, *map(str, value)]
        elif isinstance(value, tuple):
            for each in value:
                lists += [option, each]
        elif isinstance(value, Mapping):
            singles += [option, {"importance": "importance.json", "layer_factors": "factors.json"}[name]]
        elif name == "max_shard_size":  # a small number needs its unit
            singles += [option, f"{value}{'B' if value < LEAST_BARE_SIZE else ''}"]
        else:
            singles += [option, str(value)]
    return [*singles, *lists, *sorted(flags)]
