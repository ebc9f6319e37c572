"""Forms of a model other than safetensors files: which files they are, and what to do about those that are not read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import shown
from .dcp import METADATA
from .hub import ADAPTER, ADAPTER_CONFIG
from .tensorfile import INDEX

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FSDP_BIN = "pytorch_model_fsdp.bin"  # what accelerate calls a whole model that FSDP trained
ADAPTER_BIN = "adapter_model.bin"
FSDP_FOLDER = "pytorch_model_fsdp_0/"  # where accelerate has a trainer's checkpoint in pieces

# Forms that are recognised and not read: names of files and folders, what they are, and what to do about it. {here}
# is the folder, as it was typed; the first that is found is told.
_OTHERS = (
    ((ADAPTER_CONFIG, ADAPTER, ADAPTER_BIN), "an adapter",
     f"give the model it was trained on; an adapter is given as SFT, in a folder with its {ADAPTER_CONFIG} and its"
     f" {ADAPTER}"),
    (("latest_checkpointed_iteration.txt", "iter_*/", "mp_rank_*/", "common.pt"), "a Megatron checkpoint",
     "convert it to the Hugging Face form, as Megatron Bridge's `AutoBridge.export_ckpt` does"),
    (("zero_to_fp32.py", "latest", "global_step*/"), "a DeepSpeed checkpoint",
     "convert: `cd {here} && python zero_to_fp32.py . OUT --safe_serialization`"),
    (("*_model_states.pt", "*_optim_states.pt"), "a part of a DeepSpeed checkpoint", "give the folder that it is in"),
    (("model_world_size_*_rank_*.pt",), "what each rank of verl stored",
     "convert: `python -m verl.model_merger merge --backend fsdp --local_dir {here} --target_dir OUT`"),
    (("pytorch_model_fsdp*_rank*.bin",), "what each rank of FSDP stored",
     "load it in accelerate and save it with the state dict type SHARDED_STATE_DICT or FULL_STATE_DICT"),
    (("*.gguf",), "GGUF weights", "use the original safetensors checkpoint"),
    (("*.bin", "*.pt", "*.pth", "*.ckpt"), "PyTorch pickles",
     "load with transformers and `save_pretrained` (it writes safetensors)"),
    (("*.distcp",), "a torch.distributed checkpoint without its .metadata",
     "it was not finished, or not copied whole; use another"),
    (("*.h5", "*.msgpack", "*.onnx", "*.tflite", "*.ot"), "TensorFlow, Flax or ONNX weights",
     "use the safetensors checkpoint of this model"),
)  # fmt: skip


def bin_files(top: Sequence[str]) -> list[str]:
    """Return the file of torch.save that a folder holds in place of safetensors files, or the index of several.

    >>> bin_files(["config.json", "pytorch_model.bin"]), bin_files(["model.safetensors", "pytorch_model.bin"])
    (['pytorch_model.bin'], [])
    """
    if INDEX in top or any(name.endswith(".safetensors") and name != ADAPTER for name in top):
        return []
    return [name for name in (BIN, BIN_INDEX, FSDP_BIN) if name in top][:1]


def dcp_prefix(files: Sequence[str]) -> str | None:
    """Return where in a folder a torch.distributed checkpoint is that is all it holds of a model: "" or "name/".

    >>> dcp_prefix(["config.json", "pytorch_model_fsdp_0/.metadata"]), dcp_prefix(["config.json"])
    ('pytorch_model_fsdp_0/', None)
    """
    top = [name for name in files if "/" not in name]
    others = any(name.endswith(".safetensors") and name != ADAPTER for name in top) or INDEX in top or bin_files(top)
    if others or "common.pt" in top:  # the latter is Megatron's
        return None
    return next((prefix for prefix in ("", FSDP_FOLDER) if f"{prefix}{METADATA}" in files), None)


def other_form(files: Sequence[str], folders: Sequence[str], ref: str) -> str | None:
    """Say which form that is not read a folder holds, and what to do about it; None if none is found.

    >>> other_form(["model_world_size_1_rank_0.pt"], [], "run/actor")[:48]
    'what each rank of verl stored; it is not read: c'
    """
    names = [*files, *(f"{name}/" for name in folders)]
    for patterns, form, cure in _OTHERS:
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return f"{form}; it is not read: {cure.format(here=shown(shlex.quote(ref), 400))}"
    return None
