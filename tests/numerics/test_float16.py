"""Conversions of float16 in the compiled kernel, the CPU's own and ours, against numpy's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_imm.numerics import numba_kernel
from mergekit_imm.numerics.numba_jit import HAS_FLOAT16, jit

HALVES = np.arange(1 << 16, dtype=np.uint32)
OWN = pytest.mark.skipif(not HAS_FLOAT16, reason="this CPU does not convert float16")


def filled(convert: Any, values: Any, kind: type[Any]) -> Any:
    """Apply a conversion to each value, in compiled code."""

    @jit
    def fill(values: Any, out: Any) -> None:
        for i in range(len(values)):
            out[i] = convert(values[i])

    out = np.empty(len(values), kind)
    fill(values, out)
    return out


@pytest.mark.parametrize("name", ["_shift_up", pytest.param("_widen", marks=OWN)])
def test_every_float16_is_decoded_as_numpy_does(name: str) -> None:
    found = filled(getattr(numba_kernel, name), HALVES | np.uint32(0xABCD0000), np.float32)
    expected = HALVES.astype(np.uint16).view(np.float16).astype(np.float32)
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), is_nan)
    assert np.array_equal(found.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


@pytest.mark.parametrize("name", ["_round_down", pytest.param("_narrow", marks=OWN)])
def test_float32_is_rounded_to_float16_as_numpy_does(name: str) -> None:
    """Every float16 and its neighbours, every tie and its neighbours, and any bits."""
    every = HALVES.astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    ties = (finite[1:] + finite[:-1]) / 2
    limits = np.array([65504, 65520, 2.0**-24, 2.0**-25, 2.0**-26, 1e-45, 3e38, np.inf, 0.0], np.float32)
    around = np.concatenate([finite, ties, limits, -limits])
    near = [np.nextafter(around, np.float32(to)) for to in (-np.inf, np.inf)]
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    values = np.concatenate([around, *near, drawn[~np.isnan(drawn)]])
    found = filled(getattr(numba_kernel, name), values, np.uint32)
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert np.array_equal(found, expected)


DIGEST = """
import hashlib
import numpy as np
from mergekit_imm.numerics.cpu import merge_span
from mergekit_imm.numerics.mask import arithmetic
from mergekit_imm.numerics.statistics import new_tally
draw, count = np.random.default_rng(0), 5000
found = hashlib.sha256()
for dtype in ("F16", "BF16"):
    sides = [((draw.integers(0, 1 << 16, count) & 0xBBFF).astype(np.uint16).view(np.uint8), dtype) for _ in range(3)]
    out, tally = np.empty(2 * count, np.uint8), new_tally()
    merge_span(*sides, (out, dtype), count, 0, (1, 2), arithmetic(alpha=0.3, drop=0.7), tally)
    found.update(out.tobytes() + tally.tobytes())
print(found.hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names CPUs of Intel")
@pytest.mark.parametrize("cpu", ["nehalem", pytest.param("haswell", marks=pytest.mark.thorough)])
def test_older_cpus_give_the_same_bits(cpu: str, tmp_path: Path) -> None:
    """Without 512-bit vectors, and without conversions of float16."""
    digests = []
    for chosen in ({}, {"NUMBA_CPU_NAME": cpu, "NUMBA_CACHE_DIR": str(tmp_path)}):
        command = [sys.executable, "-W", "error", "-c", DIGEST]
        digests.append(subprocess.run(command, env=os.environ | chosen, check=True, capture_output=True).stdout)
    assert digests[0] == digests[1]
