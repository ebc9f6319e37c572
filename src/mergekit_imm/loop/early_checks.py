"""Check the options of later merges before training starts, against the base alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.messages import shown
from ..errors import ArgumentError
from ..model.rename_rules import parse_rename
from ..numerics.dtypes import DTYPE_BITS, MERGED, TORCH_NAMES
from ..numerics.mask import arithmetic
from ..options.options import MergeOptions, RunOptions, layer_factors_of, options_from, with_files_read
from ..plan.compatibility import selector
from ..plan.open_inputs import dequantised_or_refused


def keywords(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's keyword-only parameters."""
    return {each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY}


def check_options(
    base: str | Path, options: Mapping[str, Any], *, points: Sequence[Mapping[str, float]] = ({},)
) -> None:
    """Raise MergeError if every merge with this base would refuse these options, whatever the trained model.

    `options`: keyword arguments of `merge_checkpoints` or `merge_into`; `points`: the alphas and drops to be used.
    Values are checked first, then patterns and layers against the base's headers. Checks that need the trained model
    (`take` patterns for its own tensors) are left to the merge.
    """
    options_from(options, RunOptions)
    several = [with_files_read(options_from({**options, **point}, MergeOptions)) for point in points]
    p = several[0]
    opened = open_checkpoint(base, "base", dry_run=True, leave_out=p.leave_out)
    if not p.dequantize:  # maybe only the trained model is FP8
        dequantised_or_refused({"base": opened}, p)
    taken = tuple(each for each in p.take if any(re.search(each, name) for name in opened.tensors))
    selector(replace(p, take=taken), opened, opened)
    _check_last_rename(p.rename, opened)
    factors = layer_factors_of(p, opened.tensors)
    for each in several:
        arithmetic(alpha=each.alpha, drop=each.drop, factor=max(factors.values(), default=1.0))


def output_bytes(base: str | Path, options: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors that a merge with this base writes, if the trained model adds none."""
    p = options_from(options, MergeOptions)
    tensors = open_checkpoint(base, "base", dry_run=True, leave_out=p.leave_out).tensors.values()
    dtype = TORCH_NAMES.get(p.dtype)  # None: each its own
    return sum(
        each.count * DTYPE_BITS[dtype if dtype and each.output_dtype in MERGED else each.output_dtype] // 8
        for each in tensors
    )


def _check_last_rename(rules: Sequence[str], base: Checkpoint) -> None:
    """Raise ArgumentError if the last rule cannot produce any name of the base."""
    if not rules:
        return
    _, replacement = parse_rename(rules[-1])
    parts = re.split(r"\\(?:\d+|g<\w+>)", replacement)  # the literal text between groups
    if any("\\" in part for part in parts):
        return
    wanted = re.compile(".*".join(map(re.escape, parts)))
    if not any(map(wanted.search, base.tensors)):
        raise ArgumentError(
            f"rename rule '{shown(rules[-1])}' makes names with '{shown(replacement)}', and no tensor of {base.label}"
            f" has such a name; its names are like {shown(next(iter(base.tensors), ''))!r}"
        )
