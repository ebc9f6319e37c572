"""Sparsified deltas as they are read, in any pieces, against sorting: ties, zeros, NaN and infinity, every dtype."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from checkpoints import write_model
from mergekit_imm.checkpoint.open_checkpoint import open_checkpoint
from mergekit_imm.checkpoint.reader import Files
from mergekit_imm.errors import ChangedError
from mergekit_imm.numerics.mask import mask_key
from mergekit_imm.transforms import sparsified_delta
from mergekit_imm.transforms.sparsified_delta import Ranked, Trimmed, count_kept
from strategies import WIDER
from thorough import examples

NAME = "w"
SPECIALS = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-44, -6e-8, 60000.0]


def values(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> torch.Tensor:
    """Make numbers of many sizes: `coarse` has many that are equal, `sparse` many zeros, `special` NaN and the like."""
    draw = np.random.default_rng(seed)
    found = draw.normal(size=shape) * 2.0 ** draw.integers(-9, 3, size=shape)
    if kind == "coarse":
        found = np.round(found * 4) / 4
    if kind in ("sparse", "special"):
        found = np.where(draw.random(shape) < 0.6, 0.0, found)
    if kind == "special":
        found = np.where(draw.random(shape) < 0.2, draw.choice(SPECIALS, size=shape), found)
    return torch.tensor(found).to(dtype)


def sizes(delta: reference.Array) -> np.ndarray[Any, Any]:
    return np.abs(delta).view(np.uint64 if delta.dtype == np.float64 else np.uint32)


def trimmed(delta: reference.Array, drop: float) -> tuple[reference.Array, np.ndarray[Any, Any]]:
    """Trim by sorting; return the delta and what is kept. Infinity is kept even if there is enough NaN."""
    wanted = max(1, round((1 - drop) * len(delta)))
    least = min(np.sort(sizes(delta))[-wanted], sizes(np.array([np.inf], delta.dtype))[0])
    return delta, sizes(delta) >= least


def ranked(delta: reference.Array, row: int, drop: float, epsilon: float) -> tuple[reference.Array, Any]:
    """Rank by sorting; return the rescaled delta and what is kept."""
    out, kept = delta.copy(), np.ones(len(delta), bool)
    for begin in range(0, len(delta), row):
        order = np.argsort(sizes(delta[begin : begin + row]), kind="stable")
        for rank, i in enumerate(begin + order):
            share = rank / (row - 1) if row > 1 else 0.5
            keep16 = max(1, min(65536, round(((1 - drop) - epsilon + 2 * epsilon * share) * 65536)))
            if np.isfinite(delta[i]):
                out[i] = delta[i] * delta.dtype.type(65536 / keep16)
                kept[i] = reference.u16(NAME, int(i), 5, 2) < keep16
    return out, kept


@pytest.mark.parametrize("kind", ["trim", "della"])
@settings(max_examples=examples(60), deadline=None)
@given(
    dtypes=st.tuples(st.sampled_from(WIDER), st.sampled_from(WIDER)),
    shape=st.sampled_from([(), (1,), (7,), (2, 3, 33), (40, 130), (3, 700)]),
    numbers=st.sampled_from(["gauss", "coarse", "sparse", "special"]),
    drop=st.sampled_from([0.1, 0.2, 0.5, 0.9]),
    digit=st.sampled_from([2, 8, 11]),
    whole=st.sampled_from([0, 700, 1 << 20]),
    cut=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_any_piece_matches_sorting(
    kind: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    numbers: str,
    drop: float,
    digit: int,
    whole: int,
    cut: float,
    seed: int,
) -> None:
    sft, start = values(shape, dtypes[0], numbers, seed), values(shape, dtypes[1], numbers, seed + 1)
    if numbers != "gauss":  # many are unchanged
        same = torch.tensor(np.random.default_rng(seed).random(shape) < 0.5)
        sft = torch.where(same, start.to(sft.dtype), sft)
    wide: type = np.float64 if torch.float64 in dtypes else np.float32
    with np.errstate(all="ignore"):
        delta = reference.widen(reference.to_array(sft), wide) - reference.widen(reference.to_array(start), wide)
        delta = delta.reshape(-1)
        row = shape[-1] if shape else 1
        thin, kept = trimmed(delta, drop) if kind == "trim" else ranked(delta, row, drop, min(drop, 0.05))
    expected = np.where(kept, thin + wide(0), wide(-0.0))  # -0.0 is what was dropped
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple(sparsified_delta, WHOLE=whole, SAMPLE=64, SAMPLED=16, PIECE=500, DIGIT=digit),
    ):
        inputs = {}
        for role, tensor in (("base", start), ("sft", sft)):
            write_model(Path(folder) / role, {NAME: tensor})
            inputs[role] = open_checkpoint(Path(folder) / role, role)
        sides = inputs["sft"].tensors[NAME], inputs["base"].tensors[NAME]
        given = (NAME, shape, *sides, "base", wide is np.float64, drop)
        thinned = Trimmed(*given) if kind == "trim" else Ranked(*given, min(drop, 0.05), mask_key(NAME, 5, 2))
        found: np.ndarray[Any, Any] = np.empty(len(delta), wide)
        middle = int(cut * len(delta))
        with Files(inputs) as files:
            for first, part in ((0, found[:middle]), (middle, found[middle:])):
                files.read("sft", thinned, first * found.itemsize, part.view(np.uint8))
    bits = f"u{found.itemsize}"
    same_nan = np.isnan(found) & np.isnan(expected)
    assert np.array_equal(np.where(same_nan, 0, found.view(bits)), np.where(same_nan, 0, expected.view(bits)))
    assert count_kept(found.view(np.uint8), thinned.dtype) == kept.sum()


@pytest.mark.parametrize("skewed", [None, 0.0, 1e9])
def test_a_threshold_is_right_whatever_the_sample_says(tmp_path: Path, skewed: float | None) -> None:
    """A sample reads the first elements of each of its pieces; those may all be far from the threshold."""
    delta = values((1, 20000), torch.float32, "gauss", 3)
    if skewed is None:
        delta = torch.arange(20000.0).reshape(1, -1) % 3
    else:
        delta[0].view(4, 5000)[:, :16] = skewed
    write_model(tmp_path / "base", {NAME: torch.zeros_like(delta)})
    write_model(tmp_path / "sft", {NAME: delta})
    inputs = {role: open_checkpoint(tmp_path / role, role) for role in ("base", "sft")}
    tensor = Trimmed(NAME, (1, 20000), inputs["sft"].tensors[NAME], inputs["base"].tensors[NAME], "base", False, 0.5)
    read = []

    def counted(files: Files, role: str) -> Any:
        def reading(tensor: Any, first: int, out: Any) -> None:
            read.append(len(out))
            files.read(role, tensor, first, out)

        return reading

    with Files(inputs) as files, patch.multiple(sparsified_delta, WHOLE=0, SAMPLE=64, SAMPLED=16, PIECE=999):
        found = sparsified_delta.Threshold(tensor).find(partial(counted, files))
    assert int(found) == np.sort(sizes(delta.numpy()[0]))[-10000]
    passes = sum(read) // (2 * 4 * 20000)
    assert passes == (1 if skewed is None else 3)  # beside the sample


def test_what_one_thread_cannot_read_is_left_to_the_next(tmp_path: Path) -> None:
    """So none waits for ever, and no piece is forgotten: here in the second pass, where all elements are."""
    values = 1 + torch.arange(5000.0).reshape(1, -1) * 2.0**-23
    write_model(tmp_path / "base", {NAME: torch.zeros(1, 5000)})
    write_model(tmp_path / "sft", {NAME: values})
    inputs = {role: open_checkpoint(tmp_path / role, role) for role in ("base", "sft")}
    sides = inputs["sft"].tensors[NAME], inputs["base"].tensors[NAME]
    threshold = sparsified_delta.Threshold(Trimmed(NAME, (1, 5000), *sides, "base", False, 0.2))
    pieces = 0

    def reads(role: str) -> Any:
        nonlocal pieces
        pieces += role == "sft"
        if pieces in (6, 7, 8):
            raise ChangedError(role)
        return partial(files.read, role)

    with Files(inputs) as files, patch.multiple(sparsified_delta, WHOLE=0, PIECE=1000):
        for _ in range(3):
            with pytest.raises(ChangedError):
                threshold.find(reads)
        assert threshold.find(reads).view(np.float32) == values[0, 1000].item()
    assert pieces == 5 + 3 + 5
