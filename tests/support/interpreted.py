"""Compare the Triton kernel, run by Triton's interpreter on a CPU, with the naive reference; for test_gpu.py.

TRITON_INTERPRET=1 python tests/interpreted.py EVERY     1: all combinations of dtypes; 3: a third of them
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import torch

import reference
from checkpoints import same_bits
from mergekit_imm.numerics import triton_kernel
from mergekit_imm.numerics.mask import KEEP_ALL, arithmetic, mask_key
from mergekit_imm.numerics.reference import merge_flat
from mergekit_imm.numerics.triton_kernel import keep_flat_fused, merge_flat_fused
from numerics.test_mask import CHECK_VALUES, NAME
from strategies import DTYPES, tensor

KINDS = [("bits", "edges", "bits"), ("edges", "bits", "edges"), ("gauss", "gauss", "gauss")]
NUMBERS = [(0.5, 0.9, 1.0), (0.7, 0.2, 1.5), (0.3, 0.0, 1.0), (0.3, 0.0, 0.5), (1.0, 0.2, 1.0), (0.0, 0.2, 1.0)]
SPANS = [(0, 1500), (777, 1), (1023, 2), (4096, 1600), (3000, 1111), (2**35 - 700, 1400), (2**40 + 5, 300)]


def compare(dtypes: tuple[torch.dtype, ...], case: int, with_start: bool = True) -> None:
    """Run one merge with the kernel and with the reference."""
    (alpha, drop, factor), (first, count) = NUMBERS[case % len(NUMBERS)], SPANS[case % len(SPANS)]
    base, sft, start = (
        tensor(count, dtype, seed=10 * case + i, kind=kind, specials=True)
        for i, (dtype, kind) in enumerate(zip(dtypes[:3], KINDS[case // 3 % len(KINDS)], strict=True))
    )
    start = start if with_start else base
    out = torch.empty(count, dtype=dtypes[3])
    key = mask_key(NAME, case, 2)
    merge_flat_fused(base, start, sft, out, arithmetic(alpha=alpha, drop=drop, factor=factor), *key, first)
    expected = reference.merge_tensors(
        base,
        sft,
        start,
        out.dtype,
        alpha=alpha,
        drop=drop,
        factor=factor,
        name=NAME,
        seed=case,
        iteration=2,
        first=first,
    )
    assert same_bits(out, expected), (dtypes, alpha, drop, factor, first, count)


def check_values() -> None:
    """Check the random bits: an element is kept if they are below the threshold, not if equal."""
    for first, values in CHECK_VALUES.items():
        count = len(values)
        base, sft, out = torch.zeros(count), torch.ones(count), torch.empty(count)
        for limit in (*values, *(value + 1 for value in values)):
            assert limit < KEEP_ALL
            constants = replace(arithmetic(alpha=0.0, drop=0.5), keep16=limit)
            merge_flat_fused(base, base, sft, out, constants, *mask_key(NAME), first)
            assert (out != 0).tolist() == [value < limit for value in values], (first, limit)


def check_masks() -> None:
    for case, (first, count) in enumerate(SPANS):
        out = torch.zeros(count, dtype=torch.bool)
        keep_flat_fused(out, reference.keep16_of(0.3), *mask_key(NAME, case), first)
        assert out.tolist() == reference.mask(NAME, first, count, 0.3, case).tolist(), (first, count)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy warns of infinities
    assert triton_kernel._agrees(torch.device("cpu"))
    with patch.object(triton_kernel, "merge_flat", lambda *args: merge_flat(*args).nextafter(torch.tensor(0.0))):
        assert not triton_kernel._agrees.__wrapped__(torch.device("cpu"))
    check_values()
    check_masks()
    for case, dtypes in enumerate(product(DTYPES, repeat=4)):
        if (
            sum(map(DTYPES.index, dtypes)) % int(sys.argv[1]) == 0
        ):  # with 3, any three of the four dtypes meet in every combination
            compare(dtypes, case)
    for case, (dtype, _) in enumerate(product(DTYPES, NUMBERS)):
        compare((dtype, dtype, dtype, dtype), case, with_start=False)
    print("equal")
