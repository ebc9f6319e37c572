"""Patterns for names in messages: each matches its names, and no other."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_imm.model.tensor_names import exact_pattern, ready_option

WORDS = st.sampled_from(
    ["model", "layers", "mlp", "up_proj", "weight", "a.b", "x(1)+", "it's", "$", "*", "\n", "ü", "²"]
)
NUMBERS = st.integers(0, 12).map(str)
NAMES = st.lists(st.one_of(WORDS, NUMBERS), min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=30, unique=True), st.lists(NAMES, max_size=30))
def test_a_pattern_matches_its_names_only(names: list[str], others: list[str]) -> None:
    pattern = exact_pattern(names, others)
    if pattern:
        assert {name for name in {*names, *others} if re.search(pattern, name)} == set(names)
    else:  # too long, or ends in a newline, which `$` allows
        assert len("|".join(map(re.escape, names))) > 160 or any("\n" in name for name in {*names, *others})


LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(28) for part in ("q_proj", "up_proj", "norm")]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["lm_head.weight"], r"^lm_head\.weight$"),
        ([n for n in LAYERS if "norm" in n], r"^model\.layers\.\d+\.norm\.weight$"),
        ([n for n in LAYERS if re.search(r"\.(3|27)\.norm", n)], r"^model\.layers\.(3|27)\.norm\.weight$"),
        ([f"tower.{i}.{n}" for n in LAYERS[:3] for i in (1, 2)] + ["tower.a_long_name.weight"], r"^tower\."),
        ([f"model.blk_{i:03}_of_a_tower" for i in range(99)], r"^model\.blk_0"),
        ([f"{word}.w" for word in "abc"], r"^a\.w$|^b\.w$|^c\.w$"),
    ],
)
def test_the_pattern_is_the_most_readable(names: list[str], pattern: str) -> None:
    assert exact_pattern(names, [*LAYERS, *names]) == pattern


def test_no_option_without_a_short_pattern() -> None:
    names = [f"{chr(97 + i % 26)}{i}{'name' * 5}" for i in range(200)]
    assert ready_option("--keep", *names, every=[name.upper() for name in names] + [f"{n}2" for n in names]) == ""
    assert shlex.split(ready_option("--keep", *names[:2], every=names)) == [
        "--keep",
        "|".join(f"^{name}$" for name in names[:2]),
    ]
