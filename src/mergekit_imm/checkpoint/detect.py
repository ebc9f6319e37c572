"""Which files of a folder hold the model, and the cure for formats that are not read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath
from typing import Any

from ..common.messages import shown
from ..errors import CheckpointError
from .dcp import METADATA
from .hub import ADAPTER, ADAPTER_CONFIG
from .parts import holds_parts, index_files
from .safetensors_file import INDEX, MODEL
from .sharded import are_shards

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FSDP_BIN = "pytorch_model_fsdp.bin"  # accelerate's name for a whole model that FSDP trained
ADAPTER_BIN = "adapter_model.bin"
FSDP_FOLDER = "pytorch_model_fsdp_0/"  # where accelerate keeps a sharded checkpoint

# Formats that are recognised but not read: file and folder patterns, what they are, the cure. {here} is the folder as
# typed; the first match is reported.
_OTHERS = (
    (
        (ADAPTER_CONFIG, ADAPTER, ADAPTER_BIN),
        "an adapter",
        f"give the model it was trained on; an adapter is given as SFT, in a folder with its {ADAPTER_CONFIG} and its"
        f" {ADAPTER}",
    ),
    (
        ("latest_checkpointed_iteration.txt", "iter_*/", "mp_rank_*/", "common.pt"),
        "a Megatron checkpoint",
        "convert it to the Hugging Face format, for example with Megatron Bridge's `AutoBridge.export_ckpt`; from verl:"
        " `python -m verl.model_merger merge --backend megatron --local_dir ACTOR --target_dir OUT`, where ACTOR is the"
        " folder that contains dist_ckpt (add --tie-word-embedding if the head is tied)",
    ),
    (
        ("zero_to_fp32.py", "latest", "global_step*/"),
        "a DeepSpeed checkpoint",
        # Without --safe_serialization, which fails on tied models.
        "convert: `cd {here} && python zero_to_fp32.py . OUT`, and give {here}/OUT",
    ),
    (
        ("*_model_states.pt", "*_optim_states.pt"),
        "a part of a DeepSpeed checkpoint",
        "give the folder that contains it",
    ),
    (
        ("model_world_size_*_rank_*.pt",),
        "shards of verl ranks",
        "convert: `python -m verl.model_merger merge --backend fsdp --local_dir {here} --target_dir OUT`",
    ),
    (
        ("pytorch_model_fsdp*_rank*.bin",),
        "shards of FSDP ranks",
        "load it in accelerate and save it with the state dict type SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    (
        ("lit_model.pth", "lit_model.pth.lora", "lit_model.pth.adapter*"),
        "a LitGPT checkpoint",
        "convert: `litgpt convert_from_litgpt {here} OUT && mv OUT/model.pth OUT/pytorch_model.bin`, and give OUT (for"
        " LoRA, run `litgpt merge_lora {here}` first)",
    ),
    (
        ("model.pth",),
        "a torch.save file under an unknown name",
        "if it holds the model under transformers' names, as LitGPT converts it, `mv {here}/model.pth"
        " {here}/pytorch_model.bin`",
    ),
    (("*.gguf",), "GGUF weights", "use the original safetensors checkpoint"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "PyTorch pickles",
        "load it with transformers and `save_pretrained` (it writes safetensors)",
    ),
    (
        ("*.distcp",),
        "a torch.distributed checkpoint without its .metadata",
        "it was not finished, or not copied completely; use another",
    ),
    (
        ("*.h5", "*.msgpack", "*.onnx", "*.tflite", "*.ot"),
        "TensorFlow, Flax or ONNX weights",
        "use the safetensors checkpoint of this model",
    ),
)


def bin_files(top: Sequence[str]) -> list[str]:
    """Return the torch.save file, or the index of several, that a folder holds instead of safetensors files.

    >>> bin_files(["config.json", "pytorch_model.bin"]), bin_files(["model.safetensors", "pytorch_model.bin"])
    (['pytorch_model.bin'], [])
    """
    if any(map(_is_model, top)):
        return []
    return [name for name in (BIN, BIN_INDEX, FSDP_BIN) if name in top][:1]


def _is_model(name: str) -> bool:
    """Whether a file name is that of a model in safetensors form; others may merely lie beside one."""
    return name in (MODEL, INDEX) or re.fullmatch(r"(model|shard)-\d+-.*\.safetensors", name) is not None


def dcp_prefix(files: Sequence[str]) -> str | None:
    """Return where the only model of a folder is as a torch.distributed checkpoint ("" or "name/"); None if it is not.

    >>> dcp_prefix(["config.json", "pytorch_model_fsdp_0/.metadata"]), dcp_prefix(["config.json"])
    ('pytorch_model_fsdp_0/', None)
    """
    top = [name for name in files if "/" not in name]
    if any(map(_is_model, top)) or bin_files(top) or "common.pt" in top:  # common.pt: Megatron
        return None
    return next((prefix for prefix in ("", FSDP_FOLDER) if f"{prefix}{METADATA}" in files), None)


def other_form(files: Sequence[str], folders: Sequence[str], ref: str) -> str | None:
    """Name the unsupported format that a folder holds, and the cure; None if there is none.

    >>> other_form(["model_world_size_1_rank_0.pt"], [], "run/actor")[:48]
    'shards of verl ranks; not supported: convert: `p'
    """
    names = [*files, *(f"{name}/" for name in folders)]
    for patterns, form, cure in _OTHERS:
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return f"{form}; not supported: {cure.format(here=shown(shlex.quote(ref), 400))}"
    return None


_MODELS = ("*.safetensors", BIN, "pytorch_model-*-of-*.bin", FSDP_BIN, ADAPTER_BIN)
_NO_MODELS = ("original", "onnx", "optimizer*", "global_step*", "wandb", "runs")  # folders that hold no model
_TO_CONVERT = ("model_world_size_*_rank_*.pt", "zero_to_fp32.py", "lit_model.pth*")
_NEWEST = ("final", "last", "latest")


def models_below(files: Sequence[str]) -> list[str]:
    """Return the sub-folders that hold models or adapters, latest first.

    `files` are relative paths. Numbers in folder names give the order; `final`, `last` and `latest` come last.

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
    """Sort key: the latest folder last."""
    return [(part in _NEWEST, [int(number) for number in re.findall(r"\d+", part)], part) for part in folder.parts]


def no_model(files: Sequence[str], ref: str) -> str:
    """Say what a folder without a model holds instead: a model in a sub-folder, or another format.

    >>> no_model(["final/model.safetensors"], "run")
    "holds no model at its top level; there is one in 'run/final': give that"
    """
    top = [name for name in files if "/" not in name]
    folders = list(dict.fromkeys(name.partition("/")[0] for name in files if "/" in name))
    below = [] if ADAPTER_CONFIG in top else models_below(files)
    if below:
        latest = f"'{shown(str(PurePath(ref) / below[0]), 400)}'"
        if len(below) == 1:
            return f"holds no model at its top level; there is one in {latest}: give that"
        others = ", ".join(f"'{shown(place)}'" for place in below[1:4]) + (", …" if len(below) > 4 else "")
        return (
            f"holds no model at its top level, but {len(below)} in sub-folders; the latest is {latest}: give that"
            f" (or {others})"
        )
    convertible = {
        path.parent: path.name
        for path in map(PurePosixPath, files)
        if path.parent.parts and any(fnmatchcase(path.name, pattern) for pattern in _TO_CONVERT)
    }
    if convertible:
        newest = max(convertible, key=_age)
        form = other_form([convertible[newest]], [], str(PurePath(ref) / newest))
        return f"holds in '{shown(str(newest))}' {form}"
    form = other_form(top, folders, ref)
    return f"holds {form}" if form else "holds no *.safetensors file; is it a model folder?"


def adapter_file(top: list[str]) -> str | None:
    """Return the weights file of an adapter folder; None if it is not one."""
    if ADAPTER_CONFIG not in top or MODEL in top or INDEX in top:
        return None
    return ADAPTER if ADAPTER in top else ADAPTER_BIN if ADAPTER_BIN in top and not bin_files(top) else None


def model_files(top: list[str], index: dict[str, Any] | None, role: str, ref: str, everything: list[str]) -> list[str]:
    """Return the files that are the model, in the order they are read and written.

    Raises CheckpointError if there are none, or several candidates.
    """
    bins = bin_files(top)
    if bins and bins != [BIN_INDEX]:
        return bins
    if index is not None:
        named = index_files(index, f"{ref}/{BIN_INDEX if bins else INDEX}", ".bin" if bins else ".safetensors")
        if MODEL not in top:
            return named
    if MODEL in top:
        return [MODEL]
    if holds_parts(top):
        return []  # all weights are in parts
    found = [n for n in top if n.endswith(".safetensors") and n != ADAPTER]
    if len(found) == 1 or are_shards(found):
        return found
    if found:
        raise CheckpointError(
            f"{role} {shown(ref)} holds neither {MODEL} nor {INDEX}, but {len(found)} other safetensors files"
            f" ({', '.join(map(shown, found[:4]))}{', …' if len(found) > 4 else ''}); give the one to use by its path"
        )
    raise CheckpointError(f"{role} {shown(ref)} {no_model(everything, ref)}")
