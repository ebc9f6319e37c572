"""`mean_kl` against a plain computation over all logits of transformers models, and its contracts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_imm import ArgumentError, MismatchError, NonFiniteError
from mergekit_imm.analysis import divergence as module
from mergekit_imm.analysis import mean_kl
from models import fine_tuned, new_model

LENGTHS, PROMPTS = [9, 4, 12, 7, 3, 10, 6], [3, 1, 5, 0, 2, 0, 4]


class Bigrams(nn.Module):
    """A model whose next token depends on the last alone: its logits are the rows of a table."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def texts(rows: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(rows, (length,), generator=generator) for length in LENGTHS]


def batches(found: Sequence[Tensor], size: int, side: str = "right") -> list[dict[str, Tensor]]:
    """Batches of padded texts whose prompts do not count."""
    result = []
    for begin in range(0, len(found), size):
        group = found[begin : begin + size]
        width = max(map(len, group)) + 2
        ids, mask = torch.full((len(group), width), 7), torch.zeros(len(group), width, dtype=torch.int64)
        labels = torch.full((len(group), width), -100)
        for row, text in enumerate(group):
            at = width - len(text) if side == "left" else 0
            ids[row, at : at + len(text)] = text
            mask[row, at : at + len(text)] = 1
            prompt = PROMPTS[begin + row]
            labels[row, at + prompt : at + len(text)] = text[prompt:]
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def naive(base: Any, model: Any, found: Sequence[Tensor]) -> tuple[list[float], list[int]]:
    """The KL of each text, from all logits of one unpadded text at a time, and the number of tokens that count."""
    sums, tokens = [], []
    with torch.no_grad():
        for text, prompt in zip(found, PROMPTS, strict=True):
            one, other = (each.eval()(input_ids=text[None]).logits[0].double() for each in (base, model))
            positions = range(max(prompt, 1), len(text))
            kls = []
            for t in positions:
                p, q = (torch.softmax(each[t - 1], 0) for each in (one, other))
                kls.append(sum(float(a * (a.log() - b.log())) for a, b in zip(p, q, strict=True)))
            sums.append(sum(kls))
            tokens.append(len(kls))
    return sums, tokens


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    found = {}
    for layout in ("llama", "gpt2"):
        base = new_model(layout).float()
        found[layout] = (base, fine_tuned(base, seed=5))
    return found


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize(("size", "side"), [(1, "right"), (3, "right"), (7, "right"), (3, "left"), (7, "left")])
def test_a_naive_computation_agrees_whatever_the_batches(
    pairs: dict[str, tuple[Any, Any]], layout: str, size: int, side: str
) -> None:
    """Also with absolute positions (gpt2) and padding on the left, where positions begin after it."""
    base, model = pairs[layout]
    sums, tokens = naive(base, model, texts())
    found = mean_kl(base, model, batches(texts(), size, side))
    assert found.tokens == tuple(tokens)
    assert found.sums == pytest.approx(sums, rel=1e-4)
    assert found.kl.value == pytest.approx(sum(sums) / sum(tokens), rel=1e-4)
    assert found.kl.n == len(LENGTHS)


def test_torch_agrees(pairs: dict[str, tuple[Any, Any]]) -> None:
    base, model = pairs["llama"]
    (batch,) = batches(texts(), 7)
    with torch.no_grad():
        logs = [each(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1] for each in (base, model)]
    p, q = (each.double().log_softmax(-1) for each in logs)
    each = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    counts = batch["labels"][:, 1:] != -100
    assert mean_kl(base, model, [batch]).kl.value == pytest.approx(float(each[counts].mean()), rel=1e-6)


def test_the_interval_resamples_texts(pairs: dict[str, tuple[Any, Any]]) -> None:
    found = mean_kl(*pairs["llama"], batches(texts(), 7))
    sums, tokens = np.array(found.sums), np.array(found.tokens)
    drawn = np.random.default_rng(1).integers(0, 7, (4000, 7))
    means = sums[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low  # two sets of draws: quantiles of 2000 differ by a few hundredths of the width
    assert found.kl.low == pytest.approx(low, abs=0.15 * width)
    assert found.kl.high == pytest.approx(high, abs=0.15 * width)


def test_few_texts_have_no_interval(pairs: dict[str, tuple[Any, Any]]) -> None:
    five = mean_kl(*pairs["llama"], batches(texts()[:5], 5)).kl
    assert math.isnan(five.low)
    assert math.isnan(five.high)
    assert not math.isnan(mean_kl(*pairs["llama"], batches(texts()[:6], 6)).kl.low)


logits = st.lists(st.lists(st.floats(-80, 80, width=32), min_size=5, max_size=5), min_size=5, max_size=5)


@given(logits, logits, st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=6), min_size=1, max_size=4))
def test_contracts(p: Any, q: Any, sequences: list[list[int]]) -> None:
    """Never negative; zero for the same model, and for logits shifted by a constant."""
    base, model = Bigrams(p), Bigrams(q)
    found = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])} for ids in sequences]
    apart = mean_kl(base, model, found)
    assert min(apart.sums) >= 0
    assert set(mean_kl(base, base, found).sums) == {0.0}
    logs = [each.table.detach().double().log_softmax(1) for each in (base, model)]
    each = nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(1)
    wanted = [float(each[ids[:-1]].sum()) for ids in sequences]
    assert apart.sums == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_almost_equal_models() -> None:
    """Rounding may not make a KL negative."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 50, generator=generator) / 100
    other = table.clone()
    other[:, 0] += 1e-9
    assert not torch.equal(table, other)
    rows = [torch.tensor([[row, 0]]) for row in range(50)]
    sums = mean_kl(Bigrams(table), Bigrams(other), [{"input_ids": ids, "labels": ids} for ids in rows]).sums
    assert min(sums) >= 0
    assert max(sums) < 1e-15


def test_pieces_do_not_matter(pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mean_kl(*pairs["llama"], batches(texts(), 7))
    monkeypatch.setattr(module, "_PIECE", 2 * 96)
    assert mean_kl(*pairs["llama"], batches(texts(), 7)).sums == pytest.approx(whole.sums, rel=1e-12)


def test_tokens_that_only_the_model_has_take_probability() -> None:
    """Base gives them none, so that the KL is over base's tokens, and not renormalised."""
    base, model = Bigrams(torch.zeros(3, 2)), Bigrams(torch.zeros(3, 4))
    batch = {"input_ids": torch.tensor([[0, 1, 0]]), "labels": torch.tensor([[0, 1, 0]])}
    assert mean_kl(base, model, [batch]).kl.value == pytest.approx(math.log(2))
    assert mean_kl(base, model, [batch], vocabulary=2).kl.value == 0.0
    with pytest.raises(MismatchError, match=r"base has 4 tokens and the model 2, .* give the number of the others"):
        mean_kl(model, base, [batch])
    assert mean_kl(model, base, [batch], vocabulary=2).kl.value == 0.0


def test_tokens_ruled_out() -> None:
    """A token without probability in base adds nothing; one that only the model rules out makes the KL infinite."""
    ruled, free = Bigrams([[0.0, 0.0, -math.inf]] * 3), Bigrams(torch.zeros(3, 3))
    batch = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[0, 1]])}
    assert mean_kl(ruled, ruled, [batch]).kl.value == 0.0
    assert mean_kl(ruled, free, [batch]).kl.value == pytest.approx(math.log(1.5))
    with pytest.raises(NonFiniteError, match="KL of text 1 is inf: the model rules out a token that base predicts"):
        mean_kl(free, ruled, [batch])
    with pytest.raises(NonFiniteError, match="KL of text 2 is nan: base predicts NaN"):
        mean_kl(
            Bigrams([[0.0, 1.0], [math.nan, 0.0]]),
            Bigrams(torch.zeros(2, 2)),
            [batch, {"input_ids": torch.tensor([[1, 1]]), "labels": torch.tensor([[1, 1]])}],
        )


def test_the_models_are_left_as_they_were(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Dropout is off while they run, so that the result does not vary; modes are restored."""
    base, model = pairs["gpt2"]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    model.train()
    base.eval()
    first, second = (mean_kl(base, model, batches(texts(), 7)).sums for _ in range(2))
    assert first == second
    assert model.training
    assert all(each.training for each in model.modules())
    assert not base.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


def test_progress(pairs: dict[str, tuple[Any, Any]]) -> None:
    done: list[int] = []
    mean_kl(*pairs["llama"], batches(texts(), 3), progress=done.append)
    assert done == [3, 6, 7]


IDS = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "batches is empty"),
        ([IDS], "batch 1 is a Tensor; give mappings with the tensors 'input_ids' and 'labels'"),
        ([{"input_ids": IDS}], "batch 1 has input_ids; give mappings"),
        ([{"input_ids": IDS, "labels": IDS[0]}], r"have shapes \[2, 2\] and \[2\]; give both \(texts, tokens\)"),
        (
            [{"input_ids": IDS, "labels": torch.tensor([[0, 1], [1, -100]])}],
            "text 2 of batch 1 has no token that counts",
        ),
        ([{"input_ids": IDS[:, :1], "labels": IDS[:, :1]}], "text 1 of batch 1 has no token that counts"),
    ],
)
def test_batches_that_are_refused(found: Any, message: str) -> None:
    model = Bigrams(torch.zeros(2, 2))
    with pytest.raises(ArgumentError, match=message):
        mean_kl(model, model, found)


def test_a_folder_is_no_model() -> None:
    with pytest.raises(ArgumentError, match="model is a str; give a loaded model"):
        mean_kl(Bigrams(torch.zeros(2, 2)), "sft", [])  # type: ignore[arg-type]
