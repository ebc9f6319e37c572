"""The tensors of a LoRA adapter, sorted by what they change: factors, experts, trained rows, whole tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lazy_tensor import Tensor
from ..checkpoint.model_files import leave_out_option
from ..checkpoint.safetensors_file import TensorInfo
from ..common.messages import shown
from ..errors import CheckpointError
from ..model.tensor_names import unwrapped
from .lora_config import MERGE_FIRST

_FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?"
)
_ROWS = ".token_adapter.trainable_tokens_delta"
_TOKEN_ADAPTER = re.compile(r"\.token_adapter(?=\.(weight|bias)$)")  # of a module with a resized vocabulary


@dataclass
class Parts:
    """The tensors of an adapter by the kind of change. Names are the adapter's own, unwrapped."""

    factors: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)  # (module, kind) -> A, B, vector
    experts: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)  # module -> depth -> A, B
    rows: dict[str, Tensor] = field(default_factory=dict)  # module -> trained tokens
    whole: dict[str, Tensor] = field(default_factory=dict)
    copies: list[Tensor] = field(default_factory=list)  # duplicates, not read


def sort_parts(adapter: Checkpoint) -> Parts:
    """Sort an adapter's tensors. Raises CheckpointError for names that are unknown or stored twice."""
    parts = Parts()
    for key, tensor in adapter.tensors.items():
        plain = re.sub(r"\.(modules_to_save|original_module)\.", ".", key)
        if plain != key and plain in adapter.tensors:
            parts.copies.append(tensor)
            continue  # PEFT stores a resized, trained embedding twice, and its original too
        path = without_wrappers(key)
        found = _FACTOR.fullmatch(path)
        if found is not None:
            module, factor, part = found.groups()
            which = factor.rpartition("_")[2]
            if parameters_of(module, adapter):
                depth = key.split(".").count("base_layer")
                parts.experts.setdefault(module, {}).setdefault(depth, {})[which] = tensor
                continue
            kind = "bias" if part == "bias" else "embedding" if "embedding" in factor else "weight"
            parts.factors.setdefault((module, kind), {})[which] = tensor
        elif path.endswith(_ROWS):
            parts.rows[path.removesuffix(_ROWS)] = tensor
        elif _TOKEN_ADAPTER.search(path):
            parts.whole[_TOKEN_ADAPTER.sub("", path)] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise CheckpointError(f"{adapter.label} stores '{shown(key)}', an unknown kind of tensor; {MERGE_FIRST}")
        else:
            if path in parts.whole:
                one, other = file_of(parts.whole[path]), file_of(tensor)
                raise CheckpointError(
                    f"{adapter.label} stores tensor '{shown(path)}' twice, in {shown(one)} and in {shown(other)}; leave"
                    f" one of the files out: {leave_out_option(other)}"
                )
            parts.whole[path] = tensor
    return parts


def module_of(key: str) -> str:
    """Return the module that a factor belongs to, as PEFT names it."""
    found = _FACTOR.fullmatch(without_wrappers(key))
    assert found is not None
    return found.group(1)


def file_of(tensor: Tensor) -> str:
    """Return the file that holds a tensor; "" for a computed one."""
    return tensor.file if isinstance(tensor, TensorInfo) else ""


def parameters_of(module: str, adapter: Checkpoint) -> list[str]:
    """Return the parameters of a module, except weight and bias, that have factors (PEFT's target_parameters)."""
    assert adapter.adapter is not None
    targets = (target.rpartition(".") for target in adapter.adapter["target_parameters"])
    # A target without a path belongs to the experts: PEFT drops paths when targets are given by module name.
    of_experts = module.rpartition(".")[2].endswith("experts")
    inside = {n for path, _, n in targets if (f".{module}".endswith(f".{path}") if path else of_experts)}
    return sorted(inside - {"weight", "bias"})


def without_wrappers(key: str) -> str:
    """Return a tensor's name without module wrappers, PEFT's included."""
    parts = unwrapped(key.removeprefix("base_model.model.")).split(".")
    path = ".".join(part for part in parts if part != "base_layer")
    return path.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
