"""The loader for vLLM, against its base class where vLLM is installed, else against the interface that 0.33.0 has."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import random_state, same_bits, write_model
from mergekit_imm import ArgumentError, MismatchError, NonFiniteError, dare_merge
from mergekit_imm.live.vllm_loader import register

SHAPES = {
    "lm_head.weight": (40, 8),
    "model.layers.1.mlp.w": (9, 8),
    "model.layers.0.mlp.w": (9, 8),
    "model.embed_tokens.weight": (40, 8),
    "model.norm.weight": (8,),
}
RECORDED = "vllm.model_executor.model_loader"


class BaseModelLoader(ABC):
    """`vllm/model_executor/model_loader/base_loader.py` of vLLM 0.33.0, without the bodies."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: Any) -> None: ...

    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: Any) -> None: ...


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Return vLLM's `get_model_loader`, or one as it is in 0.33.0."""
    if importlib.util.find_spec("vllm") is not None:
        yield importlib.import_module(RECORDED).get_model_loader
        return
    known: dict[str, Any] = {}

    def register_model_loader(load_format: str) -> Callable[[Any], Any]:
        def wrapper(loader: Any) -> Any:
            if not issubclass(loader, BaseModelLoader):
                raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
            known[load_format] = loader
            return loader

        return wrapper

    module: Any = ModuleType(RECORDED)
    module.BaseModelLoader, module.register_model_loader = BaseModelLoader, register_model_loader
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, RECORDED, module)
    yield lambda load_config: known[load_config.load_format](load_config)


class Model(nn.Module):
    """A model of vLLM: it takes what is its own of the tensors of a whole checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            self.loaded[name] = tensor.clone()
        return {*self.loaded}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for seed, role in enumerate(("base", "sft")):
        write_model(tmp_path / role, random_state(SHAPES, seed=seed))
    return str(tmp_path / "base"), str(tmp_path / "sft")


def loader_of(get_model_loader: Any, extra: Any) -> Any:
    register()
    register()  # a process may load plugins twice
    return get_model_loader(SimpleNamespace(load_format="mergekit_imm", model_loader_extra_config=extra))


def config_of(base: str) -> Any:
    return SimpleNamespace(model=base, revision=None)


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_it_loads_the_merged_model_layer_by_layer(alpha: float, loaders: Any, pair: tuple[str, str]) -> None:
    base, sft = pair
    loader = loader_of(loaders, {"sft": sft, "alpha": alpha, "drop": 0.5, "seed": 3, "keep": ["norm"]})
    loader.download_model(config_of(base))
    model = Model()
    loader.load_weights(model, config_of(base))
    states = [random_state(SHAPES, seed=seed) for seed in range(2)]
    expected = dare_merge(*states, alpha=alpha, drop=0.5, seed=3) | {
        "model.norm.weight": states[0]["model.norm.weight"]
    }
    assert all(same_bits(model.loaded[name], tensor) for name, tensor in expected.items())
    names = [*model.loaded]
    assert names[:3] == ["model.embed_tokens.weight", "model.layers.0.mlp.w", "model.layers.1.mlp.w"]
    assert sorted(names[3:]) == ["lm_head.weight", "model.norm.weight"]
    again = dict(loader.get_all_weights(config_of(base), model))  # as `reload_weights` calls it
    assert all(same_bits(again[name], tensor) for name, tensor in model.loaded.items())


def test_the_end_is_checked_though_the_model_stops_before(loaders: Any, pair: tuple[str, str]) -> None:
    base, sft = pair
    state = random_state(SHAPES, seed=1)
    state["model.norm.weight"][3] = torch.nan
    write_model(Path(sft), state)
    model: Any = SimpleNamespace(load_weights=next)
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' of sft .* has 1 NaN"):
        loader_of(loaders, {"sft": sft}).load_weights(model, config_of(base))


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({}, "takes the fine-tuned model from model_loader_extra_config, which is without sft"),
        ([], 'which is a list of 0; give --model-loader-extra-config \'{"sft"'),
        (
            {"sft": "SFT", "aplha": 0.5},
            "has 'aplha', which load format mergekit_imm does not know; it takes sft, start,",
        ),
        ({"sft": "SFT", "order": "files"}, "has 'order', which"),
        ({"sft": "SFT", "alpha": 2}, "alpha is 2; it is the weight of the base"),
    ],
)
def test_extra_configs_that_are_refused(extra: Any, match: str, loaders: Any, pair: tuple[str, str]) -> None:
    extra = {**extra, "sft": pair[1]} if "sft" in extra else extra
    with pytest.raises(ArgumentError, match=match):
        loader_of(loaders, extra).download_model(config_of(pair[0]))


def test_models_that_do_not_belong_together(loaders: Any, pair: tuple[str, str], tmp_path: Path) -> None:
    write_model(tmp_path / "other", random_state({**SHAPES, "model.norm.weight": (9,)}))
    with pytest.raises(MismatchError, match=r"'model.norm.weight' is BF16 \[8\] in base"):
        loader_of(loaders, {"sft": str(tmp_path / "other")}).load_weights(Model(), config_of(pair[0]))


def test_the_entry_point_leads_to_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["mergekit_imm"].partition(":")
    assert getattr(importlib.import_module(module), function) is register
