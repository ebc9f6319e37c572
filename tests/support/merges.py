"""Adapters merged by PEFT, rightly and wrongly, as people find them on their disks."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import State, read_model
from end_to_end import zoo
from models import LAYOUTS, new_model, save

ADAPTER = "adapter_model.safetensors"
Edit = Callable[[dict[str, Any], State], None]  # changes an adapter's config and its tensors, in place


def write_base(folder: Path, layout: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model with a tokenizer."""
    model = new_model(layout).to(dtype)
    model.config.tie_word_embeddings = LAYOUTS[layout].tied
    return save(model, folder, "base")


def write_adapter(base: Path, out: Path, layout: str, *, size: float = 0.05, seed: int = 5, **options: Any) -> Path:
    """Write an adapter of a base with random factors."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=torch.float32)
        given = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **options}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**given))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        wrapped.save_pretrained(out)
    return out


def edited(adapter: Path, out: Path, edit: Edit) -> Path:
    """Copy an adapter with its config and tensors changed."""
    shutil.copytree(adapter, out)
    config, tensors = json.loads((out / "adapter_config.json").read_text()), load_file(out / ADAPTER)
    edit(config, tensors)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    return out


def peft_merge(
    base: Path, adapter: Path, out: Path, layout: str, dtype: torch.dtype = torch.bfloat16, *, stored: Any = None
) -> Path:
    """Merge an adapter with PEFT, in a dtype, and store it in another if given; with the base's tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LAYOUTS[layout].auto.from_pretrained(base, dtype=dtype)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    (merged if stored is None else merged.to(stored)).save_pretrained(out)
    for file in base.glob("*token*"):
        shutil.copy(file, out)
    return out


def rewritten(folder: Path, out: Path, change: Callable[[State], None]) -> Path:
    """Copy a model of one file with some tensors changed."""
    shutil.copytree(folder, out)
    state = read_model(out)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "model.safetensors")
    return out


def halves_exchanged(tensor: Tensor, axis: int) -> Tensor:
    first, second = tensor.chunk(2, axis)
    return torch.cat([second, first], axis)


def write_small(folder: Path, name: str, dtype: torch.dtype) -> None:
    """Write a small model of an architecture, a full fine-tuning of it, and an adapter."""
    base = zoo.new_model(name, tied=False).to(dtype)
    base.save_pretrained(folder / "base")
    zoo.moved(base, seed=3, size=0.01).save_pretrained(folder / "sft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = zoo.auto_of(name).from_pretrained(folder / "base", dtype=dtype)
        settings = peft.LoraConfig(
            task_type=zoo.ARCHITECTURES[name].task,
            r=4,
            lora_alpha=8,
            target_modules=list(zoo.linear_leaves(name)),
            target_parameters=list(zoo.ARCHITECTURES[name].experts) or None,
        )
        wrapped = peft.get_peft_model(model, settings)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_((torch.randn(parameter.shape) * 0.05).to(parameter.dtype))
        wrapped.save_pretrained(folder / "adapter")


def peft_merge_of(name: str, base: Path, adapter: Path, out: Path, dtype: str) -> None:
    """Merge an adapter of an architecture with PEFT."""
    model = zoo.auto_of(name).from_pretrained(base, dtype=getattr(torch, dtype))
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
