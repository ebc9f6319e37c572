"""Formats that are not read, and models in sub-folders: name them, and the cure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from ..common.messages import shown
from .dcp import FSDP_FOLDER, METADATA
from .safetensors_file import ADAPTER, ADAPTER_CONFIG
from .torch_file import ADAPTER_BIN, BIN, FSDP_BIN

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
