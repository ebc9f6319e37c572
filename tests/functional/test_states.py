"""Merging state dicts: names, ties, layer factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checkpoints import random_state, same_bits
from mergekit_imm import dare_merge, importance_factors
from mergekit_imm.errors import ArgumentError, MismatchError

SHAPES = {"embed.weight": (7, 4), "h.0.w": (40, 50), "h.0.b": (50,), "h.1.w": (40, 50), "h.1.b": (50,), "norm.w": (4,)}
BASE, SFT, START = (random_state(SHAPES, seed=i) for i in range(3))


def test_mapping_equals_single_tensors_with_their_names() -> None:
    merged = dare_merge(BASE, SFT, start=START, alpha=0.3, drop=0.5, seed=4, iteration=2)
    assert list(merged) == list(BASE)
    for name, tensor in merged.items():
        alone = dare_merge(
            BASE[name], SFT[name], start=START[name], alpha=0.3, drop=0.5, seed=4, iteration=2, name=name
        )
        assert same_bits(tensor, alone)


def test_layer_factors_apply_to_their_layers_only() -> None:
    factors = importance_factors({"h.0": 1.0, "h.1": 3.0})
    assert factors == {"h.0": 0.5, "h.1": 1.5}
    for given in (factors, {"0": 0.5, "1": 1.5}):
        merged = dare_merge(BASE, SFT, drop=0.5, layer_factors=given)
        for name, factor in (("h.0.w", 0.5), ("h.0.b", 0.5), ("h.1.w", 1.5), ("embed.weight", 1.0), ("norm.w", 1.0)):
            assert same_bits(merged[name], dare_merge(BASE[name], SFT[name], drop=0.5, name=name, factor=factor))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"h.0": 1.0}, r"layers h\.\* are given for 1 of 2: missing h\.1"),
        ({"h.0": 1.0, "h.1": 1.0, "h.2": 1.0}, r"no tensor of the model lies in layer 'h\.2'"),
        ({"0": 1.0}, r"missing h\.1"),
        ({"h.0": -1.0, "h.1": 1.0}, "factor is -1.0"),
    ],
)
def test_invalid_layer_factors_are_refused(factors: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dare_merge(BASE, SFT, drop=0.5, layer_factors=factors)


def test_plain_indices_need_one_stack() -> None:
    two = {"a.0.w": torch.ones(1), "b.0.w": torch.ones(1)}
    with pytest.raises(ArgumentError, match=r"plain indices, but the model has 2 stacks of layers \(a, b\)"):
        dare_merge(two, two, drop=0.5, layer_factors={"0": 1.0})


def test_different_names_are_refused() -> None:
    fewer = {name: tensor for name, tensor in SFT.items() if name != "h.1.w"}
    with pytest.raises(MismatchError, match=r"1 tensor is in base only, not in sft: 'h\.1\.w'"):
        dare_merge(BASE, fewer, drop=0.5)
    with pytest.raises(MismatchError, match=r"1 tensor is in sft only, not in base: 'h\.2\.w' \(closest there"):
        dare_merge(BASE, {**SFT, "h.2.w": SFT["h.1.w"]}, drop=0.5)
    with pytest.raises(MismatchError, match="in base only, not in start"):
        dare_merge(BASE, SFT, start=fewer, drop=0.5)


class Tied(nn.Module):
    """An embedding and a head that may share their weight."""

    def __init__(self, seed: int, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lm_head = nn.Linear(4, 300, bias=False)
        self.embed_tokens = nn.Embedding(300, 4)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("order", [[EMBED, HEAD], [HEAD, EMBED]])
def test_names_that_share_storage_are_one_tensor_keyed_by_the_embedding(order: list[str]) -> None:
    base, sft = ({name: Tied(seed).state_dict()[name] for name in order} for seed in (0, 1))
    base[HEAD] = base[EMBED]
    merged = dare_merge(base, sft, drop=0.5)
    assert same_bits(merged[EMBED], dare_merge(base[EMBED], sft[EMBED], drop=0.5, name=EMBED))
    assert merged[HEAD].data_ptr() == merged[EMBED].data_ptr()


@pytest.mark.parametrize("stored", [[EMBED], [HEAD], [EMBED, HEAD]])
def test_the_sft_may_store_a_tied_tensor_under_any_of_its_names(stored: list[str]) -> None:
    base, sft = Tied(0).state_dict(), Tied(1).state_dict()
    expected = dare_merge(base, sft, drop=0.5)
    merged = dare_merge(base, {name: sft[name].clone() for name in stored}, drop=0.5)
    assert set(merged) == {EMBED, HEAD}
    assert same_bits(merged[EMBED], expected[EMBED])


@pytest.mark.parametrize("breaks", ["sft", "start"])
def test_an_input_that_breaks_the_tie_gives_two_tensors(breaks: str) -> None:
    sides = {"sft": Tied(1, tied=breaks != "sft").state_dict(), "start": Tied(2, tied=breaks != "start").state_dict()}
    base = Tied(0).state_dict()
    merged = dare_merge(base, sides["sft"], start=sides["start"], drop=0.5)
    for name in (EMBED, HEAD):
        alone = dare_merge(base[name], sides["sft"][name], start=sides["start"][name], drop=0.5, name=name)
        assert same_bits(merged[name], alone)
    assert merged[HEAD].data_ptr() != merged[EMBED].data_ptr()


def test_equal_values_that_are_not_shared_are_two_tensors() -> None:
    base = {EMBED: torch.zeros(900), HEAD: torch.zeros(900)}
    merged = dare_merge(base, {name: torch.ones(900) for name in base}, drop=0.5)
    assert not torch.equal(merged[EMBED], merged[HEAD])
