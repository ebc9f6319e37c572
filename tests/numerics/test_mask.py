"""The mask: check values that must never drift, and what a mask must be statistically.

Every statistical bound holds with an error rate of at most 1e-9 for a correct mask (Chernoff, union over elements).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import reference
from mergekit_imm import dare, keep_mask
from mergekit_imm.numerics.mask import keep_threshold, mask_key
from mergekit_imm.numerics.reference import uniform16

NAME = "model.layers.0.mlp.up_proj.weight"
ERROR_RATE = 1e-9

CHECK_VALUES = {
    0: [4148, 55136, 42164, 48325, 2085, 30562, 53875, 18801],
    126: [43942, 28078, 28806, 6885],
    510: [51676, 45284, 31269, 6272],
    1022: [27824, 53095, 12735, 63499],
    2**40: [31615, 40465, 35314, 52053],
}


def test_keys_match_the_specification() -> None:
    assert mask_key(NAME) == (0x37734ECD, 0x6FF7E38A)
    assert mask_key(NAME, seed=7, iteration=2) == (0x01476898, 0x5462FD35)


def test_generator_is_philox() -> None:
    words = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    assert reference.philox4x32_10((0, 0, 0, 0), (0, 0)) == words
    # Lane 0 of block 0 has counter 0; its words are 128 elements apart, and the halves of a word 512.
    bits = uniform16(torch.empty(0), 0, 1024, 0, 0).tolist()
    assert [bits[128 * w] | bits[512 + 128 * w] << 16 for w in range(4)] == list(words)


@pytest.mark.parametrize("first", CHECK_VALUES)
def test_random_bits_match_the_specification(first: int) -> None:
    values = CHECK_VALUES[first]
    assert uniform16(torch.empty(0), first, len(values), *mask_key(NAME)).tolist() == values
    assert [reference.u16(NAME, first + i) for i in range(len(values))] == values


def test_number_kept_of_the_first_million() -> None:
    assert int(keep_mask(NAME, (2**20,), drop=0.9).sum()) == 104639


@pytest.mark.parametrize(("drop", "keep16"), [(0.0, 65536), (0.9, 6554), (1 - 1e-12, 1), (0.5, 32768), (1e-9, 65536)])
def test_thresholds(drop: float, keep16: int) -> None:
    assert keep_threshold(drop) == keep16 == reference.keep16_of(drop)


def test_mask_with_offset_is_a_slice_of_the_whole() -> None:
    whole = keep_mask(NAME, (5000,), drop=0.3, seed=3, iteration=1)
    for first, count in ((0, 1), (1, 1023), (1023, 2), (1024, 1024), (777, 3000)):
        piece = keep_mask(NAME, (count,), drop=0.3, seed=3, iteration=1, offset=first)
        assert torch.equal(piece, whole[first : first + count])
    assert torch.equal(keep_mask(NAME, (50, 100), drop=0.3, seed=3, iteration=1).view(-1), whole)


def chernoff(share: float, count: int, rate: float) -> tuple[float, float]:
    """Bounds for the mean of `count` draws of probability `share`, violated with probability at most `rate`."""

    def divergence(x: float) -> float:
        parts = ((x, share), (1 - x, 1 - share))
        return sum(a * math.log(a / b) for a, b in parts if a > 0)

    limit = math.log(2 / rate) / count
    low, high = share, share
    step = 1e-4
    while low > 0 and divergence(max(low, 0)) < limit:
        low -= step
    while high < 1 and divergence(min(high, 1)) < limit:
        high += step
    return low, high


@pytest.mark.parametrize("drop", [0.2, 0.9])
def test_dare_is_unbiased_at_every_element(drop: float) -> None:
    elements, draws = 512, 3000
    total = torch.zeros(elements, dtype=torch.float64)
    ones = torch.ones(elements, dtype=torch.float64)
    for seed in range(draws):
        total += dare(ones, name=NAME, drop=drop, seed=seed)
    share = keep_threshold(drop) / 65536
    low, high = chernoff(share, draws, ERROR_RATE / elements)
    mean = (total / draws).numpy()
    assert mean.min() >= low / share
    assert mean.max() <= high / share
    assert high / share < 1.5  # the bound is not trivial
    # For the mean over all elements the bound is much sharper: any other rescale than 1 / (1 - p) would violate it.
    low, high = chernoff(share, draws * elements, ERROR_RATE)
    assert low / share <= mean.mean() <= high / share
    assert (high - low) / share < 0.04


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"iteration": 1}, {"name": "model.layers.1.mlp.up_proj.weight"}, {"offset": 2**20}]
)
def test_masks_of_other_names_iterations_seeds_and_offsets_are_independent(other: dict[str, object]) -> None:
    count, drop = 2**20, 0.5
    one = keep_mask(NAME, (count,), drop=drop)
    two = keep_mask(**{"name": NAME, "shape": (count,), "drop": drop, **other})  # type: ignore[arg-type]
    low, high = chernoff(0.5, count, ERROR_RATE)
    assert low <= float((one == two).double().mean()) <= high


def test_neighbouring_elements_are_independent() -> None:
    kept = keep_mask(NAME, (2**20,), drop=0.5).numpy()
    low, high = chernoff(0.5, 2**19, ERROR_RATE / 5)
    for distance in (1, 2, 128, 512, 1024):
        pairs = kept[:-distance] == kept[distance:]
        # Pairs of one parity of blocks share no elements, so they are independent draws.
        first = (np.arange(len(pairs)) // distance) % 2 == 0
        assert low <= pairs[first][: 2**19].mean() <= high
