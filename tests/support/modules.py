"""Models in memory made only of tensors, and the expected results of their merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from checkpoints import State, random_state, same_bits, write_model
from mergekit_imm import MergeError, MismatchError, merge_into
from mergekit_imm.live.local_shards import Held, boxes

OPTIONS: dict[str, Any] = {"alpha": 0.3, "drop": 0.5, "seed": 3, "iteration": 2}


class Model(torch.nn.Module):
    """A module with a given state dict, whose names may contain dots."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))

    def total(self) -> Tensor:
        """Return a loss to which every parameter contributes."""
        return torch.stack([parameter.float().sum() for parameter in self.parameters()]).sum()


def put(model: torch.nn.Module, change: Callable[[str, Tensor], Tensor]) -> torch.nn.Module:
    """Replace a model's parameters by other tensors."""
    for name, parameter in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        changed = torch.nn.Parameter(change(name, parameter.detach()), requires_grad=parameter.requires_grad)
        model.get_submodule(path).register_parameter(last, changed)
    return model


def state_of(model: nn.Module) -> State:
    state = model.state_dict().items()
    return {name: tensor.detach().clone() for name, tensor in state if isinstance(tensor, Tensor)}


def values_of(each: Held) -> dict[int, float]:
    """Return held elements by their index in the whole tensor."""
    views = boxes(each.tensor, each.inside, each.inside + each.count)
    values = [value for _, view in views for value in view.flatten().tolist()]
    runs = zip(each.firsts.tolist(), each.counts.tolist(), strict=True)
    return dict(zip([first + i for first, count in runs for i in range(count)], values, strict=True))


def assert_is(model: nn.Module, expected: State) -> None:
    state = model.state_dict()
    assert sorted(state) == sorted(expected)
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []


SHAPES = {"embed_tokens.weight": (7, 44), "h.0.w": (70, 45), "h.0.b": (2,), "h.1.w": (4, 30, 20), "norm.w": (8,)}
DTYPES = {
    "embed_tokens.weight": torch.bfloat16,
    "h.0.w": torch.float32,
    "h.0.b": torch.float16,
    "h.1.w": torch.bfloat16,
    "norm.w": torch.float32,
}


def states() -> tuple[State, State, State]:
    base, start = random_state(SHAPES, seed=0), random_state(SHAPES, seed=1)
    sft = random_state(SHAPES, seed=2, dtype=torch.float32)
    return base, start, {name: tensor.to(DTYPES[name]) for name, tensor in sft.items()}


BASE, START, SFT = states()


def naive(state: State, start: bool = True) -> State:
    """Merge by the formulas, element by element."""
    return {
        name: reference.merge_tensors(
            BASE[name], tensor, START[name] if start else None, tensor.dtype, **OPTIONS, name=name
        )
        for name, tensor in state.items()
    }


def fresh(state: State = SFT) -> Model:
    return Model({name: tensor.clone() for name, tensor in state.items()})


def write_models(folder: Path) -> Path:
    """Write base and start; return an sft's state in float32."""
    write_model(folder / "base", BASE, shards=[list(SHAPES)[:2], list(SHAPES)[2:]])
    write_model(folder / "start", START)
    torch.save({name: tensor.float() for name, tensor in SFT.items()}, folder / "sft.pt")
    return folder


def refused(model: Any, base: Path, match: str, error: type[MergeError] = MismatchError, **options: Any) -> None:
    """Merge, expecting an error and a model as before."""
    before = state_of(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=match) as caught:
        merge_into(model, base, **{"drop": 0.5, **options})
    assert str(caught.value).isprintable()
    after = state_of(model) if isinstance(model, nn.Module) else {}
    assert [n for n, t in before.items() if not t.is_meta and not same_bits(t, after[n])] == []
