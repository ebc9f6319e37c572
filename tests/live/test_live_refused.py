"""Models in memory that are refused, before the first write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import State, write_model
from mergekit_imm import NonFiniteError, merge_into
from modules import BASE, SFT, SHAPES, START, Model, fresh, put, refused, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and start on disk."""
    return write_models(tmp_path_factory.mktemp("live"))


def change(name: str, value: Callable[[Tensor], Tensor]) -> Model:
    return fresh({**SFT, name: value(SFT[name].clone())})


def marked(mark: str) -> Model:
    model = fresh()
    setattr(model.get_parameter("h.0.w"), mark, 1)
    return model


class Params4bit(nn.Parameter):
    """Has the name of a bitsandbytes class."""


def quantised() -> Model:
    model = fresh()
    model.get_submodule("norm").w = Params4bit(SFT["norm.w"])
    return model


def sharing() -> Model:
    model = fresh()
    memory = torch.zeros(12)
    for name, part in (("h.0.b", memory[:2]), ("norm.w", memory[1:9])):
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name[-1], nn.Parameter(part))
    return model


class WithScales(Model):
    """Has extra state besides tensors, like modules of TransformerEngine."""

    def get_extra_state(self) -> dict[str, int]:
        return {"fp8": 1}


def hooked(change: Callable[[Any], object]) -> Model:
    def hook(_module: nn.Module, state: State, _prefix: str, _metadata: object) -> None:
        change(state)

    model = fresh()
    model.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return model


def inference() -> Model:
    with torch.inference_mode():
        return fresh()


def deepspeed() -> nn.Module:
    kind = type("DeepSpeedEngine", (Model,), {"__module__": "deepspeed.runtime.engine"})
    engine: nn.Module = kind(SFT)
    return engine


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (dict, "model is a dict; give a torch nn.Module"),
    "missing": (lambda: fresh({n: t for n, t in SFT.items() if n != "norm.w"}), r"1 tensor is in base .* only"),
    "surplus": (lambda: fresh({**SFT, "h.1.v": torch.ones(3)}), r"1 tensor is in sft model Model only.*take="),
    "shape": (lambda: change("norm.w", lambda t: t[:5]), r"'norm.w' is BF16 \[8\] in base .* F32 \[5\] in sft model"),
    "vocabulary": (lambda: change("embed_tokens.weight", lambda t: t[:5]), r"is \[7, 44\] in base .* vocab='base' or"),
    "integers": (lambda: change("norm.w", lambda t: t.int()), "integers can be merged neither"),
    "float8": (lambda: change("norm.w", lambda t: t.to(torch.float8_e4m3fn)), "'norm.w' of the model is torch.float8"),
    "complex": (lambda: change("norm.w", lambda t: t.to(torch.complex64)), "'norm.w' of the model is torch.complex64"),
    "quantised": (quantised, "'norm.w' of the model is Params4bit; quantised"),
    "meta": (lambda: fresh().to("meta"), "'embed_tokens.weight' of the model is on the meta device"),
    "zero3": (lambda: marked("ds_id"), "parameter 'h.0.w' has `ds_id`: DeepSpeed ZeRO-3 keeps master weights"),
    "zero2": (lambda: marked("_hp_mapping"), "`_hp_mapping`: DeepSpeed keeps master weights"),
    "megatron": (lambda: marked("main_param"), "Megatron's mixed-precision optimizer keeps master weights"),
    "deepspeed": (deepspeed, r"the model is DeepSpeed's \(DeepSpeedEngine\)"),
    "shared": (sharing, "'h.0.b' and 'norm.w' of the model share part of their memory"),
    "expanded": (lambda: put(fresh(), lambda n, t: t[:1].expand(8) if n == "norm.w" else t), "repeats elements"),
    "no tensor": (lambda: WithScales(SFT), "the model's state holds '_extra_state', a dict, not a tensor"),
    "copies": (lambda: hooked(lambda s: s.update({"norm.w": s["norm.w"].clone()})), "'norm.w' is made by a hook of"),
    "hidden": (lambda: hooked(lambda s: s.pop("norm.w")), "'norm.w' is left out of the model's state_dict"),
    "inference": (inference, "'embed_tokens.weight' of the model was made in inference mode"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_refused(folder: Path, case: str) -> None:
    make, match = CASES[case]
    refused(make(), folder / "base", match)


@pytest.mark.parametrize("name", list(SHAPES))
def test_values_are_checked_before_the_first_write(folder: Path, tmp_path: Path, name: str) -> None:
    def broken(tensor: Tensor, value: float) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    last = BASE[name].numel() - 1
    model = change(name, lambda tensor: broken(tensor, torch.nan))
    match = rf"'{name}' of sft model Model is NaN or infinite at index {last} \(1 such"
    refused(model, folder / "base", match, NonFiniteError)
    merge_into(model, folder / "base", take=[name])
    merge_into(model, folder / "base", allow_nonfinite=True, drop=0)
    assert model.get_parameter(name).view(-1)[-1].isnan()
    for role, state in (("base", BASE), ("start", START)):
        there = write_model(tmp_path / role, {**state, name: broken(state[name], torch.inf)})
        paths = {"base": folder / "base", "start": folder / "start", role: there}
        match = rf"'{name}' of {role} .* is NaN or infinite at index {last} "
        refused(fresh(), match=match, error=NonFiniteError, iteration=1, **paths)


def test_a_value_that_is_too_large_for_its_dtype(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {**BASE, "h.0.b": torch.tensor([0.0, 1e38], dtype=torch.bfloat16)})
    match = "'h.0.b': the merged value of element 1 is too large for the model's dtype F16"
    refused(fresh(), tmp_path / "base", match, NonFiniteError, drop=0)


def test_what_cannot_hold_the_base_s(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {**BASE, "steps": torch.arange(5)})
    model = fresh({**SFT, "steps": torch.arange(5, dtype=torch.int32)})
    match = r"'steps' is I64 \[5\] in the base and I32 \[5\] in sft model Model, which cannot hold.*take="
    refused(model, tmp_path / "base", match, keep=["steps"])
    merge_into(model, tmp_path / "base", take=["steps"])
