"""Merge an adapter in memory, PEFT's, into its model, and the model back towards its base, without saving either.

The adapter is the sft of the merge, read from memory by the code that reads adapters on disk; the result is written
into the model's frozen weights. So the bits are those of `merge_checkpoints` with the saved adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Raw, Reads
from ..common.messages import shown
from ..errors import ArgumentError, CheckpointError, MismatchError
from ..numerics.dtypes import DTYPE_BITS
from ..transforms.lora_config import read_settings
from .local_shards import HEADER_DTYPES, InMemory, Live, check_tensor, live
from .merge_into import LiveReport, merge_into, merged_into

_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True, eq=False)
class OfAdapter(InMemory):
    """A tensor of an adapter, whole."""

    tensor: Tensor

    @property
    def is_whole(self) -> bool:
        """Always."""
        return True

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on."""
        count = len(out) * 8 // DTYPE_BITS[self.dtype]
        some = self.tensor.view(-1)[first : first + count].cpu().view(torch.uint8).numpy()
        np.copyto(out, some)


def peft_model(model: nn.Module) -> Any:
    """Return the PeftModel that a model is, or wraps; None if its adapters, if any, are not a PeftModel's."""
    while True:
        if _is_of_peft(model) and hasattr(model, "merge_and_unload"):
            return model
        inner = next((getattr(model, name) for name in _WRAPPERS if name in model._modules), None)
        if inner is None:
            return None
        model = inner


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT wraps a model, or changed its modules."""
    return any(map(_is_of_peft, model.modules()))


def _is_of_peft(module: nn.Module) -> bool:
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)  # fully_shard makes a subclass


def own_tensors(wrapped: Any) -> dict[str, Live]:
    """Return the tensors that stay when the adapter of a PeftModel is unloaded, by their path without it."""
    names = [*wrapped.active_adapters, ""]
    return live({path: tensor for path, tensor, _ in _kept(wrapped.get_base_model(), names[0])})


def merge_adapter(
    model: nn.Module, base: str | Path, *, dry_run: bool = False, **options: Any
) -> tuple[Any, LiveReport]:
    """Merge the adapter of a PeftModel in place, and return the model without it, with a report.

        sft    = start + the adapter's change           (for LoRA, scaling * B A)
        merged = alpha * base + (1 - alpha) * (start + factor * DARE(sft - start))                   (Eq. 6, 7)

    `options`: as in `merge_into`. The bits are those of `merge_checkpoints` with the saved adapter as sft and the
    dtypes of the model. The model's other weights must be those of `start`; they are compared first. Afterwards the
    model holds no adapter: its own weights are the merged ones, in the dtypes they had, and the PeftModel's
    `save_pretrained` saves them, a whole model. An embedding and a head that were trained apart stay apart, and the
    config says so.

    Adapters that are not LoRA, or that changed their base when they were made (PiSSA), are merged by PEFT first,
    rounded to the model's dtype. With `dry_run` everything is checked that can be, and nothing changes. Raises
    MergeError.
    """
    wrapped = peft_model(model)
    assert wrapped is not None
    inner = wrapped.get_base_model()
    if not has_adapters(inner):
        raise MismatchError(
            f"this {type(wrapped).__name__} holds no adapter: it was merged or unloaded; give what peft.get_peft_model"
            " makes of its get_base_model()"
        )
    if any(getattr(module, "merged_adapters", None) for module in wrapped.modules()):
        raise MismatchError("the adapter is merged into its layers; call unmerge_adapter() on the model first")
    name = _active(wrapped)
    settings = wrapped.peft_config[name].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    label = f"the adapter of {type(inner).__name__}"
    try:
        read_settings(config, label)
    except CheckpointError:  # only PEFT can merge it
        return _merged_by_peft(wrapped, inner, base, dry_run=dry_run, options=options)
    kept = [*_kept(inner, name)]
    # PEFT may train copies of modules in float32 where the model has 16 bits.
    narrowed = {path: tensor.detach().to(dtype) for path, tensor, dtype in kept if tensor.dtype != dtype}

    def held() -> tuple[dict[str, Live], Checkpoint]:
        adapter = Checkpoint("sft", label, None, {}, _tensors(wrapped, name), adapter=config)
        return live({path: narrowed.get(path, tensor) for path, tensor, _ in kept}), adapter

    given = {**_defaults(), **options, "base": base, "model": inner, "dry_run": dry_run}
    report = merged_into(given, held)
    if not dry_run:
        wrapped.base_model.unload()
        for path, tensor in narrowed.items():
            module, _, last = path.rpartition(".")
            inner.get_submodule(module).register_parameter(last, nn.Parameter(tensor))
        _untie(inner)
        wrapped.save_pretrained = _SavesMerged(wrapped, inner)
    return inner, report


def _defaults() -> dict[str, Any]:
    assert merge_into.__kwdefaults__ is not None
    return dict(merge_into.__kwdefaults__)


def _active(wrapped: Any) -> str:
    """Return the name of the one active adapter."""
    names = list(wrapped.active_adapters)
    if len(names) != 1:
        raise ArgumentError(
            f"the model has {len(names)} active adapters ({', '.join(map(shown, names))}), and one can be merged:"
            " choose it with set_adapter"
        )
    return str(names[0])


def _merged_by_peft(
    wrapped: Any, inner: nn.Module, base: str | Path, *, dry_run: bool, options: Mapping[str, Any]
) -> tuple[Any, LiveReport]:
    if dry_run:
        for name, parameter in wrapped.named_parameters():
            check_tensor(name, parameter)
        return inner, LiveReport({}, 0, [])
    inner = wrapped.merge_and_unload()
    report = merge_into(inner, base, **options)
    wrapped.save_pretrained = _SavesMerged(wrapped, inner)
    return inner, report


def _tensors(wrapped: Any, name: str) -> dict[str, Any]:
    """Return an adapter's tensors as PEFT saves them, whole. Raises MismatchError for what is trained beside it."""
    from peft import get_peft_model_state_dict

    # The state is given, because PEFT warns of shapes in one that it takes itself.
    state = get_peft_model_state_dict(wrapped, wrapped.state_dict(), name, save_embedding_layers=False)
    held = {tensor.data_ptr() for tensor in state.values() if not isinstance(tensor, DTensor)}
    found: dict[str, Any] = {}
    for key, tensor in state.items():
        check_tensor(key, tensor)
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[key] = OfAdapter(key, tuple(whole.shape), HEADER_DTYPES[whole.dtype], whole.detach().contiguous())
    for key, parameter in wrapped.named_parameters():
        inside = isinstance(parameter, DTensor) or parameter.data_ptr() in held
        if parameter.requires_grad and not inside:
            raise MismatchError(
                f"parameter '{shown(key)}' is trained, but is not part of the adapter '{shown(name)}', so it would not"
                " be merged; freeze it, or name its module in the adapter's modules_to_save"
            )
    return found


def _kept(inner: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield the tensors that stay when an adapter is unloaded: path without it, tensor, dtype that the model has there.

    A module that was trained whole has a copy, which stays, and its original, which goes.
    """
    state = inner.state_dict(keep_vars=True)
    for key, tensor in state.items():
        parts = key.split(".")
        if any(part.startswith(("lora_", "trainable_tokens_")) for part in parts):
            continue
        dtype = tensor.dtype
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            if parts[at + 1] != adapter:
                continue
            original = state.get(".".join([*parts[:at], "original_module", *parts[at + 2 :]]))
            dtype = dtype if original is None else original.dtype
            del parts[at : at + 2]
        elif "original_module" in parts:
            at = parts.index("original_module")
            if ".".join([*parts[:at], "modules_to_save", adapter, *parts[at + 1 :]]) in state:
                continue
            del parts[at]
        yield ".".join(part for part in parts if part not in ("base_layer", "token_adapter")), tensor, dtype


def _untie(inner: Any) -> None:
    """Let the config say untied if embedding and head are two tensors, as one of them was trained apart."""
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
        return
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    if any(weight is None for weight in weights) or weights[0] is weights[1]:
        return
    for config in (inner.config, inner.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


class _SavesMerged:
    """Replacement for a PEFT model's `save_pretrained` after the merge: saves the inner model."""

    def __init__(self, wrapped: Any, merged: Any) -> None:
        self.merged = merged
        self.prefix = next(name for name, each in wrapped.named_modules() if each is merged) + "."

    def __call__(self, folder: str | Path, state_dict: dict[str, Any] | None = None, **options: Any) -> Any:
        """Save the inner model; strip the PEFT model's prefix from the names of a gathered state_dict."""
        if state_dict is not None:
            state_dict = {name.removeprefix(self.prefix): tensor for name, tensor in state_dict.items()}
        return self.merged.save_pretrained(folder, state_dict=state_dict, **options)
