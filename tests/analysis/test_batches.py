"""Batches of texts: all of them, in order, short ones together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm.analysis.calibration import TOGETHER, Tokens, batches


def tokens(length: int, value: int = 1, prompt: int = 0) -> Tokens:
    return Tokens((value,) * length, prompt, 0)


@given(st.lists(st.integers(2, 700), min_size=1, max_size=20), st.one_of(st.none(), st.integers(1, 7)))
def test_every_sequence_comes_once_and_in_order(lengths: list[int], size: int | None) -> None:
    sequences = [tokens(length, number, prompt=1) for number, length in enumerate(lengths)]
    made = list(batches(sequences, size, padding=99))
    rows = [
        (ids[mask == 1].tolist(), labels[labels != -100].tolist())
        for batch in made
        for ids, mask, labels in zip(*batch.values(), strict=True)
    ]
    assert rows == [([number] * length, [number] * (length - 1)) for number, length in enumerate(lengths)]
    if size:
        assert all(len(batch["labels"]) == size for batch in made[:-1])
    else:
        assert all(batch["labels"].numel() <= TOGETHER or len(batch["labels"]) == 1 for batch in made)


def test_short_texts_share_a_batch() -> None:
    made = list(batches([tokens(16)] * 200, None))
    assert [len(batch["labels"]) for batch in made] == [64, 64, 64, 8]
    longer = [tokens(length) for length in (16, 16, 1024, 2000, 16)]
    assert [len(batch["labels"]) for batch in batches(longer, None)] == [2, 1, 1, 1]
