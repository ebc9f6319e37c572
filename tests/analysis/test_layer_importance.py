"""`layer_importance` against naive formulas: one backward pass per batch or sample, sums in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_imm import layer_importance
from mergekit_imm.options.layer_factors import Importance
from models import new_model

Batch = dict[str, Tensor]
LAYER = {
    "llama": r"^model\.layers\.\d+",
    "qwen2": r"^model\.layers\.\d+",
    "gpt2": r"^transformer\.h\.\d+",
    "qwen3_moe": r"^model\.layers\.\d+",
    "gpt_oss": r"^model\.layers\.\d+",
}
_models: dict[str, Any] = {}


def model_of(layout: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small shared model, with more spread in its weights than at initialisation."""
    key = f"{layout} {dtype}"
    if key not in _models:
        _models[key] = new_model(layout).to(dtype).train()
    return _models[key]


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def batch_of(sequences: list[list[int]], prompt: int = 0) -> Batch:
    """Padded to the longest, on the right; labels leave out padding and the first `prompt` tokens."""
    width = max(map(len, sequences))
    ids = torch.tensor([each + [0] * (width - len(each)) for each in sequences])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in sequences])
    counts = (mask == 1) & (torch.arange(width) >= prompt)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~counts, -100)}


def linear_weights(model: nn.Module, layout: str) -> dict[str, list[nn.Parameter]]:
    """Layer -> its linear weights, by the classes of its modules."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        kind, layer = type(module).__name__, re.match(LAYER[layout], name)
        if layer is None:
            continue
        if isinstance(module, nn.Linear | Conv1D) or "Router" in kind:
            found.setdefault(layer[0], []).append(module.weight)
        elif "Experts" in kind:
            experts = [p for n, p in module.named_parameters() if "bias" not in n]
            found.setdefault(layer[0], []).extend(experts)
    return found


def gradients(model: nn.Module, batch: Batch, weights: list[nn.Parameter]) -> tuple[list[Tensor], int]:
    """Gradients of a batch's mean loss, in float64, and its number of tokens."""
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    wide = logits[:, :-1].float()  # as transformers does, also to float64
    loss = nn.functional.cross_entropy(wide.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    model.train()
    zeros = [torch.zeros_like(weight) if grad is None else grad for weight, grad in zip(weights, grads, strict=True)]
    return [grad.double() for grad in zeros], int((targets != -100).sum())


def rows_of(batches: list[Batch]) -> list[Batch]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"]))]


def by_hand(layout: str, batches: list[Batch], order: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The definitions of `layer_importance`, with all gradients in memory at once."""
    model = model_of(layout, dtype)
    layer_of = {weight: layer for layer, weights in linear_weights(model, layout).items() for weight in weights}
    each = [gradients(model, batch, [*layer_of]) for batch in (batches if order == "first" else rows_of(batches))]
    total = sum(tokens for _, tokens in each)
    result = dict.fromkeys(layer_of.values(), 0.0)
    for k, (weight, layer) in enumerate(layer_of.items()):
        w = weight.detach().double()
        mean = sum(tokens * grads[k] for grads, tokens in each) / total
        fisher = sum(grads[k] ** 2 for grads, _ in each) / len(each)
        if order == "first":
            result[layer] += float((w * mean).abs().sum())
        elif order == "second":
            result[layer] += float((w * fisher * w).abs().sum())
        elif order == "mix":
            result[layer] += float((w * mean - 0.5 * w * fisher * w).abs().sum())
        else:
            result[layer] += sum(tokens / total * float((grads[k] * w).abs().sum()) for grads, tokens in each)
    return result


def assert_close(found: Mapping[str, float], expected: Mapping[str, float], tolerance: float) -> None:
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=tolerance)


BATCHES = [batch_of(texts([9, 5]), prompt=2), batch_of(texts([12], seed=1), prompt=4), batch_of(texts([4, 7, 3], 2))]


@pytest.mark.parametrize("order", ["first", "second", "mix", "per-sample"])
@pytest.mark.parametrize("layout", ["llama", "qwen2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_importance_matches_the_formula(layout: str, order: str) -> None:
    found = layer_importance(model_of(layout), BATCHES, order=order)
    assert_close(found.layers, by_hand(layout, BATCHES, order), 1e-5)
    assert (found.sequences, found.tokens, found.order) == (
        6,
        sum(int((b["labels"][:, 1:] != -100).sum()) for b in BATCHES),
        order,
    )
    assert all(value > 0 for value in found.layers.values())


@pytest.mark.parametrize("order", ["first", "second", "mix", "per-sample"])
def test_float64_and_bfloat16_weights(order: str) -> None:
    """In bfloat16 gradients are coarse, but their sums are not."""
    for dtype in (torch.float64, torch.bfloat16):
        found = layer_importance(model_of("llama", dtype), BATCHES, order=order)
        assert_close(found.layers, by_hand("llama", BATCHES, order, dtype), 1e-9 if dtype == torch.float64 else 1e-5)


def test_one_batch_is_one_backward_pass_as_llm_pruner_does_it() -> None:
    """param_first there: loss.backward() on the whole batch, then (weight * weight.grad).abs().sum()."""
    model = new_model("llama").double().eval()
    batch = batch_of(texts([8, 8, 8, 8]))
    model(**batch).loss.backward()
    expected = {
        f"model.layers.{n}": sum(
            float((m.weight.detach() * m.weight.grad).abs().sum().item())
            for m in layer.modules()
            if isinstance(m, nn.Linear) and m.weight.grad is not None
        )
        for n, layer in enumerate(model.model.layers)
    }
    model.zero_grad()
    assert_close(layer_importance(model, [batch]).layers, expected, 1e-12)


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, 6)), order=st.sampled_from(["first", "second", "mix", "per-sample"]))
def test_batch_size_does_not_matter(cuts: set[int], order: str) -> None:
    """Up to rounding: 1e-5 of the importance, with weights and losses in float32."""
    sequences = texts([5, 9, 3, 12, 6, 4, 8], seed=3)
    edges = [0, *sorted(cuts), len(sequences)]
    batches = [batch_of(sequences[a:b], prompt=1) for a, b in pairwise(edges)]
    model = model_of("qwen2")
    one = layer_importance(model, [batch_of([each], prompt=1) for each in sequences], order=order)
    other = layer_importance(model, batches, order=order)
    assert_close(other.layers, one.layers, 1e-5)
    assert_close(other.outside, one.outside, 1e-5)
    assert (other.sequences, other.tokens) == (one.sequences, one.tokens)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)


def test_samples_of_opposite_sign_cancel_except_per_sample() -> None:
    batches = [batch_of([each]) for each in texts([12] * 8, seed=4)]
    first, each = (layer_importance(model_of("llama"), batches, order=order) for order in ("first", "per-sample"))
    assert all(first.layers[key] < 0.9 * each.layers[key] for key in first.layers)


@pytest.mark.parametrize("order", ["first", "second", "mix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_on_disk_have_the_same_bits(order: str, dtype: torch.dtype, tmp_path: Path) -> None:
    in_memory = layer_importance(model_of("qwen3_moe", dtype), BATCHES, order=order)
    assert layer_importance(model_of("qwen3_moe", dtype), BATCHES, order=order, accumulate=tmp_path) == in_memory
    assert not list(tmp_path.iterdir())


def test_outside_and_modules() -> None:
    """Every weight counts exactly once; a tied embedding is one weight."""
    expected = {
        "llama": {"embeddings", "head", "norms"},
        "qwen2": {"embeddings", "norms", "biases"},
        "gpt2": {"embeddings", "norms", "biases"},
        "gpt_oss": {"embeddings", "head", "norms", "biases", "other"},
    }
    for layout, outside in expected.items():
        model = model_of(layout)
        found = layer_importance(model, BATCHES[:1])
        assert {key for key, value in found.outside.items() if value} == outside
        everything = list(model.parameters())
        grads, _ = gradients(model, BATCHES[0], everything)
        size = sum(float((g * w.detach()).abs().sum()) for g, w in zip(grads, everything, strict=True))
        assert sum(found.layers.values()) + sum(found.outside.values()) == pytest.approx(size, rel=1e-5)
        for layer, value in found.layers.items():
            parts = [of_layers[layer] for of_layers in found.modules.values() if layer in of_layers]
            assert sum(parts) == pytest.approx(value, rel=1e-12)
    assert len(found.modules) == 7  # q, k, v, o, router, gate_up, down


def test_the_loss_is_the_mean_over_tokens() -> None:
    model = new_model("llama").float().eval()
    whole = batch_of(texts([9, 5, 12, 4], seed=6))
    expected = float(model(**whole).loss.detach())
    batches = [batch_of([each]) for each in texts([9, 5, 12, 4], seed=6)]
    assert layer_importance(model, batches).loss == pytest.approx(expected, rel=1e-6)


def test_custom_module_and_loss() -> None:
    """Two layers of one number each: y = a b x, the loss is the mean of y; dy/da * a = dy/db * b = a b x."""
    pair = [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]
    pair[0].weight.data.fill_(3.0)
    pair[1].weight.data.fill_(-2.0)
    model = nn.ModuleDict({"blocks": nn.ModuleList(pair)})

    def loss(module: Any, batch: tuple[Tensor, str]) -> tuple[Tensor, int]:
        first, second = module["blocks"]
        return second(first(batch[0])).mean(), len(batch[0])

    batches = [(torch.tensor([[1.0], [2.0], [3.0]]), "a"), (torch.tensor([[-4.0]]), "b")]
    run: Callable[..., Importance] = layer_importance
    assert run(model, batches, loss=loss).layers == {"blocks.0": 3.0, "blocks.1": 3.0}  # |-6 * (6 - 4) / 4|
    assert run(model, batches, loss=loss, order="per-sample").layers == {"blocks.0": 15.0, "blocks.1": 15.0}
    second = run(model, batches, loss=loss, order="second")
    assert second.layers == {"blocks.0": 270.0, "blocks.1": 270.0}  # 36 * (1 + 4 + 9 + 16) / 4
    assert (second.sequences, second.tokens) == (4, 4)
