"""`layer_importance` restores the model, holds one gradient at a time, and refuses unsuitable inputs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.test_layer_importance import BATCHES, batch_of, model_of, texts
from checkpoints import same_bits
from mergekit_imm import (
    ArgumentError,
    MergeError,
    MismatchError,
    NonFiniteError,
    OutputError,
    layer_importance,
)
from models import new_model

LOSS = RuntimeError("the loss of a user")


class Chain(nn.Module):
    """Layers of 2x2 weights, with dropout between."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x))
        return x


def mean_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().mean(), len(x)


def state_of(model: nn.Module) -> list[Any]:
    return [
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, id(p.grad)) for name, p in model.named_parameters()],
        [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()],
    ]


def raising(after: int) -> Iterator[Tensor]:
    yield from [torch.ones(1, 2)] * after
    raise LOSS


@pytest.mark.parametrize("order", ["first", "mix", "per-sample"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(order: str, fails: bool) -> None:
    model = Chain().train()
    model.layers[0].eval()
    model.layers[1].weight.requires_grad_(False)
    model.layers[0].weight.grad = torch.full((2, 2), 7.0)
    weights, before = copy.deepcopy(model.state_dict()), state_of(model)
    batches = raising(3) if fails else [torch.ones(2, 2)] * 3
    if fails:
        with pytest.raises(RuntimeError, match="the loss of a user"):
            layer_importance(model, batches, loss=mean_loss, order=order)
    else:
        found = layer_importance(model, batches, loss=mean_loss, order=order)
        assert found.layers["layers.1"] > 0  # though it is frozen
    assert state_of(model) == before
    assert [float(x) for x in model.layers[0].weight.grad.view(-1)] == [7.0] * 4
    assert all(same_bits(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_there_is_no_dropout_and_no_random_state() -> None:
    model = Chain().train()
    run = [torch.ones(4, 2)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert layer_importance(model, run, loss=mean_loss) == layer_importance(model, run, loss=mean_loss)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_works_under_no_grad_and_not_in_inference_mode() -> None:
    expected = layer_importance(model_of("llama"), BATCHES)
    with torch.no_grad():
        assert layer_importance(model_of("llama"), BATCHES) == expected
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode is on"):
        layer_importance(model_of("llama"), BATCHES)


@pytest.mark.parametrize(("order", "batches"), [("first", 1), ("first", 3), ("per-sample", 3), ("mix", 2)])
def test_one_gradient_is_alive_at_a_time(order: str, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama").float()
    alive: list[int] = []
    register = torch.Tensor.register_post_accumulate_grad_hook

    def counted(self: Tensor, hook: Callable[[Tensor], None]) -> Any:
        def count(weight: Tensor) -> None:
            alive.append(sum(p.grad is not None for p in model.parameters()))
            hook(weight)
            alive.append(-sum(p.grad is not None for p in model.parameters()))

        return register(self, count)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", counted)
    layer_importance(model, [batch_of(texts([6, 6]))] * batches, order=order)
    assert set(alive) == {1, 0}


def test_sums_are_allocated_only_for_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_imm.analysis import gradients

    asked: list[int] = []
    room = gradients._allocate_sums

    def noted(weights: Any, *rest: Any) -> Any:
        asked.append(len(weights))
        return room(weights, *rest)

    monkeypatch.setattr(gradients, "_allocate_sums", noted)
    layer_importance(model_of("llama"), iter(BATCHES[:1]))
    layer_importance(model_of("llama"), iter(BATCHES), order="per-sample")
    assert asked == []
    layer_importance(model_of("llama"), iter(BATCHES))
    assert len(asked) == 1


def test_batches_are_read_once_and_one_ahead() -> None:
    read: list[int] = []
    done: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(BATCHES):
            read.append(number)
            yield batch

    def progress(sequences: int) -> None:
        done.append(sequences)
        assert len(read) == min(len(done) + 1, len(BATCHES))

    layer_importance(model_of("llama"), batches(), progress=progress)
    assert done == [2, 3, 6]


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in BATCHES[0].items() if k != key}


UNCOUNTED = {**BATCHES[1], "labels": torch.full((1, 12), -100)}
ONLY_FIRST = {**BATCHES[1], "labels": torch.tensor([[5] + [-100] * 11])}


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches is empty"),
        ([without("labels")], {}, "a batch has input_ids, attention_mask; give mappings with a tensor 'labels'"),
        ([torch.ones(1, 3)], {}, "a batch is a Tensor; give mappings"),
        ([BATCHES[0], UNCOUNTED], {}, "batch 2 has no token that counts"),
        ([ONLY_FIRST], {}, "batch 1 has no token that counts"),
        ([batch_of(texts([9, 2]), 2)], {"order": "mix"}, "sample 2 of batch 1 has no token that counts"),
        (BATCHES, {"order": "third"}, "order is 'third'; it must be one of first, second, mix, per-sample"),
        ([{**BATCHES[0], "position_ids": torch.zeros(3, 2, 9)}], {"order": "second"}, "'position_ids' [3, 2, 9] does"),
        (BATCHES, {"loss": lambda *_: 1.0}, "the loss of batch 1 is not a pair"),
        (BATCHES, {"loss": lambda *_: (torch.ones(()), "1")}, "the loss of batch 1 is not a pair"),
        (BATCHES, {"loss": lambda *_: (torch.ones(()), 1)}, "the loss of batch 1 has no gradient"),
    ],
)
def test_refused_arguments(batches: list[Any], options: dict[str, Any], message: str) -> None:
    before = state_of(model_of("llama"))
    with pytest.raises(ArgumentError, match=re.escape(message)):
        layer_importance(model_of("llama"), batches, **options)
    assert state_of(model_of("llama")) == before


def hooked() -> nn.Module:
    model = Chain()
    weight: Any = model.layers[0].weight
    weight.register_post_accumulate_grad_hook(lambda _: None)
    return model


def quantised() -> nn.Module:
    model = Chain()
    model.layers[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    return model


def inference() -> nn.Module:
    with torch.inference_mode():
        return Chain()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (quantised, "weight 'layers.0.weight' is torch.uint8; load the model unquantised"),
        (lambda: Chain().to("meta"), "weight 'layers.0.weight' is on the device 'meta'"),
        (inference, "weight 'layers.0.weight' was created in torch.inference_mode"),
        (hooked, "weight 'layers.0.weight' has a hook on its gradient"),
        (lambda: nn.Linear(2, 2), "none of the model's 2 weights is linear and in a layer"),
    ],
)
def test_unsuitable_models_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(message)):
        layer_importance(make(), [torch.ones(1, 2)], loss=mean_loss)


def test_gradients_in_parts_are_refused() -> None:
    """Reentrant checkpointing of a weight used twice would sum |a| + |b| instead of |a + b|."""
    from torch.utils.checkpoint import checkpoint

    model = Chain(1)

    def twice(model: Any, x: Tensor) -> tuple[Tensor, int]:
        x = checkpoint(model.layers[0], x.clone().requires_grad_(), use_reentrant=True)
        return checkpoint(model.layers[0], x, use_reentrant=True).sum(), 1

    with pytest.raises(MismatchError, match="arrives in parts"):
        layer_importance(model, [torch.ones(1, 2)], loss=twice)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        ([1.0, float("nan")], 1.0, "the loss of batch 2 is nan"),
        ([1.0, 2.0], float("inf"), r"the gradient of 'layers.1.\w+' for batch 2 holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("order", ["first", "second", "per-sample"])
def test_nan_and_infinity_are_named(x: list[float], scale: float, message: str, order: str) -> None:
    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        value = model(batch).mean()
        value.register_hook(lambda grad: grad * (scale if float(batch[0, 0]) == 2 else 1.0))
        return value, 1

    with pytest.raises(NonFiniteError, match=message):
        layer_importance(Chain(), [torch.full((1, 2), each) for each in x], loss=loss, order=order)


def test_all_zero_gradients_are_refused() -> None:
    model = Chain(1).half()
    with pytest.raises(NonFiniteError, match="as when float16 underflows"):
        layer_importance(model, [torch.ones(1, 2).half()], loss=lambda m, x: (m(x).float().mean() * 1e-9, 1))


def test_unused_stacks_are_left_out() -> None:
    """Otherwise they would count as layers of importance 0 and raise the factors of the others."""
    model = nn.ModuleDict({"text": Chain(), "vision": Chain()})
    found = layer_importance(model, [torch.ones(1, 2)], loss=lambda m, x: (m["text"](x).sum(), 1))  # type: ignore[index]
    assert list(found.layers) == ["text.layers.0", "text.layers.1"]
    assert found.unused == ("vision.layers",)


def test_a_tied_weight_is_the_embedding_whichever_name_comes_first() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 3, bias=False), "layers": nn.ModuleList([nn.Linear(2, 2)])})
    model["embed_tokens"] = nn.Embedding(3, 2)
    model["embed_tokens"].weight = model["lm_head"].weight

    def loss(module: Any, ids: Tensor) -> tuple[Tensor, int]:
        return module["lm_head"](module["layers"][0](module["embed_tokens"](ids))).mean(), 1

    found = layer_importance(model, [torch.tensor([[0, 2]])], loss=loss)
    assert found.outside["embeddings"] > 0
    assert found.outside["head"] == 0


@pytest.mark.parametrize("place", ["not there", "file"])
def test_too_little_space_for_sums(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="the sums of gradients need a file of"):
        layer_importance(Chain(), [torch.ones(1, 2)] * 2, loss=mean_loss, accumulate=tmp_path / place)


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_imm.analysis import gradients

    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gradients, "allocate", full)
    with pytest.raises(MergeError, match=r"need a file of 48 bytes in .*: No space left on device; give a folder"):
        layer_importance(Chain(), [torch.ones(1, 2)] * 2, loss=mean_loss, accumulate=tmp_path)
    assert not list(tmp_path.iterdir())
