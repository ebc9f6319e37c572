"""What computes merges has the bits and the statistics of the naive reference; and the check that says so can fail."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from import_graph import import_graph
from mergekit_imm.numerics import cpu, cuda
from mergekit_imm.testing import check_device
from thorough import others

ALL = ("BF16", "F16", "F32", "F64")
on_torch = functools.partial(cuda.merge_span, torch.device("cpu"))


DEVICES: dict[str, Callable[..., None]] = {"cpu": cpu.merge_span, "torch": on_torch}


@pytest.mark.parametrize(
    ("name", "dtypes"), [("cpu", ["BF16"]), ("torch", ["BF16", "F32"]), *others(("cpu", ALL), ("torch", ALL))], ids=str
)
def test_a_device_has_the_bits_of_the_reference(name: str, dtypes: Sequence[str]) -> None:
    check_device(DEVICES[name], dtypes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_so_has_a_gpu() -> None:
    check_device(cuda.merge_span_on("cuda"), ALL)


def wrong(what: str) -> Callable[..., None]:
    def merge_span(base: Any, start: Any, sft: Any, out: Any, *rest: Any) -> None:
        on_torch(base, start, sft, out, *rest)
        count, first, _, numbers, tally = rest
        if what == "one bit of the last element" and first == 1 << 40:
            out[0][-2] ^= 1
        if what == "a NaN of another kind" and out[1] == "BF16":
            bits = out[0].view(np.uint16)
            bits[bits == 0x7FC0] = 0x7FC1
        if what == "delta" and numbers.is_delta:
            out[0][0] ^= 1
        if what == "kept":
            tally[49] += count > 2000
        if what == "largest":
            tally[48] *= 1 + 1e-7

    return merge_span


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "one bit of the last element",
            r"^element 1024: bits 0x\w+, should be 0x\w+; 1 differ \(.*from 1099511627776, ",
        ),
        ("a NaN of another kind", r"^element \d+: bits 0x7fc1, should be 0x7fc0; "),
        ("delta", r"^element 0: .*sft is the delta\)$"),
        ("kept", r"^kept is .*, should be .*3000 elements from 2048"),
        ("largest", "^largest change is "),
    ],
)
def test_one_that_differs_is_found(what: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_device(wrong(what), ["BF16"])


def test_the_reference_knows_nothing_of_the_library_and_needs_no_torch() -> None:
    assert import_graph()["testing.reference"] == set()
    code = "import sys; from mergekit_imm.testing import *; assert 'torch' not in sys.modules; assert naive_merge"
    subprocess.run([sys.executable, "-c", code], check=True)
