"""Forms of a model other than safetensors files: which files they are, and what to do about those that are not read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from ..common.messages import shown
from .dcp import METADATA
from .hub import ADAPTER, ADAPTER_CONFIG
from .safetensors_file import INDEX, MODEL

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
     "convert it to the Hugging Face form, as Megatron Bridge's `AutoBridge.export_ckpt` does; or, of"
     " verl, `python -m verl.model_merger merge --backend megatron --local_dir ACTOR --target_dir OUT`, ACTOR being"
     " the folder that its dist_ckpt is in (with --tie-word-embedding if the head is tied)"),
    # Without --safe_serialization, which fails on tied models.
    (("zero_to_fp32.py", "latest", "global_step*/"), "a DeepSpeed checkpoint",
     "convert: `cd {here} && python zero_to_fp32.py . OUT`, and give {here}/OUT"),
    (("*_model_states.pt", "*_optim_states.pt"), "a part of a DeepSpeed checkpoint", "give the folder that it is in"),
    (("model_world_size_*_rank_*.pt",), "what each rank of verl stored",
     "convert: `python -m verl.model_merger merge --backend fsdp --local_dir {here} --target_dir OUT`"),
    (("pytorch_model_fsdp*_rank*.bin",), "what each rank of FSDP stored",
     "load it in accelerate and save it with the state dict type SHARDED_STATE_DICT or FULL_STATE_DICT"),
    (("lit_model.pth", "lit_model.pth.lora", "lit_model.pth.adapter*"), "a LitGPT checkpoint",
     "convert: `litgpt convert_from_litgpt {here} OUT && mv OUT/model.pth OUT/pytorch_model.bin`, and give OUT (of"
     " LoRA, run `litgpt merge_lora {here}` first)"),
    (("model.pth",), "a file of torch.save under a name that is not looked for",
     "if it holds the model under the names of transformers, as LitGPT converts it, `mv {here}/model.pth"
     " {here}/pytorch_model.bin`"),
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
    if any(map(_is_model, top)):
        return []
    return [name for name in (BIN, BIN_INDEX, FSDP_BIN) if name in top][:1]


def _is_model(name: str) -> bool:
    """Whether a name is of a model in safetensors files; any other file of that kind may lie beside a model."""
    return name in (MODEL, INDEX) or re.fullmatch(r"(model|shard)-\d+-.*\.safetensors", name) is not None


def dcp_prefix(files: Sequence[str]) -> str | None:
    """Return where in a folder a torch.distributed checkpoint is that is all it holds of a model: "" or "name/".

    >>> dcp_prefix(["config.json", "pytorch_model_fsdp_0/.metadata"]), dcp_prefix(["config.json"])
    ('pytorch_model_fsdp_0/', None)
    """
    top = [name for name in files if "/" not in name]
    if any(map(_is_model, top)) or bin_files(top) or "common.pt" in top:  # the latter is Megatron's
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


_MODELS = ("*.safetensors", BIN, "pytorch_model-*-of-*.bin", FSDP_BIN, ADAPTER_BIN)
_NO_MODELS = ("original", "onnx", "optimizer*", "global_step*", "wandb", "runs")  # folders of other files
_TO_CONVERT = ("model_world_size_*_rank_*.pt", "zero_to_fp32.py", "lit_model.pth*")  # in folders of other forms
_NEWEST = ("final", "last", "latest")


def models_below(files: Sequence[str]) -> list[str]:
    """Return the folders of models and adapters below one that holds none itself, the latest first.

    `files` are the paths of all files below it. Numbers in names of folders say which is later; `final` is the last.

    >>> models_below(["v0-2025/checkpoint-9/model.safetensors", "v0-2025/checkpoint-10/adapter_model.safetensors"])
    ['v0-2025/checkpoint-10', 'v0-2025/checkpoint-9']
    """
    found = set()
    for path in map(PurePosixPath, files):
        folder = path.parent
        if path.name == METADATA and str(folder) not in (".", *_NO_MODELS):
            folder = folder.parent if folder.name == FSDP_FOLDER.rstrip("/") else folder
        elif not any(fnmatchcase(path.name, pattern) for pattern in _MODELS):
            continue
        named = [part for part in folder.parts if not re.fullmatch(r"global_step_?\d+", part)]
        if folder.parts and not any(fnmatchcase(part, pattern) for part in named for pattern in _NO_MODELS):
            found.add(folder)
    return [str(folder) for folder in sorted(found, key=_age, reverse=True)]


def _age(folder: PurePosixPath) -> list[tuple[bool, list[int], str]]:
    """What folders are sorted by, the latest last."""
    return [(part in _NEWEST, [int(number) for number in re.findall(r"\d+", part)], part) for part in folder.parts]


def no_model(files: Sequence[str], ref: str) -> str:
    """Say where below a folder that holds no model there is one, or what else it holds, and what to do about it.

    >>> no_model(["final/model.safetensors"], "run")
    "holds no model at its top; there is one in 'run/final': give that"
    """
    top = [name for name in files if "/" not in name]
    folders = list(dict.fromkeys(name.partition("/")[0] for name in files if "/" in name))
    below = [] if ADAPTER_CONFIG in top else models_below(files)
    if below:
        latest = f"'{shown(str(PurePath(ref) / below[0]), 400)}'"
        if len(below) == 1:
            return f"holds no model at its top; there is one in {latest}: give that"
        others = ", ".join(f"'{shown(place)}'" for place in below[1:4]) + (", …" if len(below) > 4 else "")
        return f"holds no model at its top, and {len(below)} below it; the latest is {latest}: give that (or {others})"
    told = {
        path.parent: path.name
        for path in map(PurePosixPath, files)
        if path.parent.parts and any(fnmatchcase(path.name, pattern) for pattern in _TO_CONVERT)
    }
    if told:
        newest = max(told, key=_age)
        return f"holds in '{shown(str(newest))}' {other_form([told[newest]], [], str(PurePath(ref) / newest))}"
    form = other_form(top, folders, ref)
    return f"holds {form}" if form else "holds no *.safetensors file; is it a model folder?"
