"""Formats that are not read, and models in sub-folders: name them, and the cure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath

from ..common.messages import shown
from .dcp import FSDP_FOLDER, METADATA
from .safetensors_file import ADAPTER, ADAPTER_CONFIG, INDEX, MODEL
from .torch_file import ADAPTER_BIN, BIN, FSDP_BIN

# Formats that are recognised but not read: file and folder patterns, what they are, the cure. {here} is the folder as
# typed; the first match is reported.
_OTHERS = (
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
            return f"{form}; not supported: {cure.format(here=_here(ref))}"
    return None


def _here(ref: str) -> str:
    """Return a path as a word of a command."""
    return shown(shlex.quote(ref), 400)


_MODELS = ("*.safetensors", BIN, "pytorch_model-*-of-*.bin", FSDP_BIN, ADAPTER_BIN)
_READ = f"safetensors, {BIN} or torch.distributed"
_NO_MODELS = ("original", "onnx", "optimizer*", "global_step*", "wandb", "runs")  # folders that hold no model
_TO_CONVERT = ("model_world_size_*_rank_*.pt", "zero_to_fp32.py", "lit_model.pth*")
_NEWEST = ("final", "last", "latest")
# How trainers number the folders of one training, and ms-swift those around them.
_STEP = re.compile(r"(?<![a-z])(checkpoint|ckpt|epoch|step|iter|iteration|round)s?[-_=.]?\d+|^v\d+-\d+-\d+$", re.I)
_LISTED = 6  # sub-folders that a message names


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


def _are_one_training(folders: Sequence[str]) -> bool:
    """Whether folders are the checkpoints of one training, so that one is the latest.

    >>> _are_one_training(["epoch_1", "epoch_2", "final"]), _are_one_training(["base", "sft-0", "sft-1"])
    (True, False)
    """
    kinds = {tuple(_STEP.sub(r"\1#", part) for part in PurePosixPath(each).parts) for each in folders}
    ends = {each for each in kinds if each[-1] in _NEWEST}
    steps = kinds - ends
    return len(steps or ends) == 1 and {each[:-1] for each in ends} <= {each[:-1] for each in steps or ends}


def _as_counted(folder: str) -> list[int | str]:
    """Sort key: by name, but 2 before 10."""
    return [int(each) if each.isdecimal() else each for each in re.split(r"(\d+)", folder)]


def _adapter_form(top: Sequence[str], role: str, ref: str) -> str | None:
    """Say what is wrong with a folder that holds an adapter or a part of one; None for others."""
    weights = next((name for name in (ADAPTER, ADAPTER_BIN) if name in top), None)
    has_config = ADAPTER_CONFIG in top
    if (weights is None and not has_config) or (weights and has_config and role in ("sft", "model")):
        return None
    if role == "merged":
        return "holds an adapter: nothing is merged there; give the folder of the merged model"
    if role == "base":
        return "holds an adapter; give the model it was trained on (an adapter is given as SFT)"
    if weights is None:
        return f"holds {ADAPTER_CONFIG} without the adapter's weights, {ADAPTER}; copy or download that too"
    if not has_config:
        return (
            f"holds an adapter's weights, {weights}, without {ADAPTER_CONFIG}, which says how they are applied; copy or"
            " download that too"
        )
    return (
        "holds an adapter, not a whole model: merge it into the model it was trained on,"
        f" `imm-merge MODEL {_here(ref)} --alpha 0 --drop 0 -o MERGED`, and give MERGED"
    )


def no_model(files: Sequence[str], role: str, ref: str) -> str:
    """Say what a folder without a model holds instead: a model in a sub-folder, or another format.

    >>> no_model(["final/model.safetensors"], "sft", "run")
    "holds no model at its top level; there is one in 'run/final': give that"
    """
    top = [name for name in files if "/" not in name]
    folders = list(dict.fromkeys(name.partition("/")[0] for name in files if "/" in name))
    adapter = _adapter_form(top, role, ref)
    if adapter is not None:
        return adapter
    below = models_below(files)
    if below:
        return f"holds no model at its top level{_places_below(below, ref)}"
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
    return f"holds {form}" if form else f"holds no weights ({_READ}); give the folder that holds them"


def _places_below(below: Sequence[str], ref: str) -> str:
    """Name the models in sub-folders, the latest first if there is one."""
    one_training = _are_one_training(below)
    ordered = below if one_training else sorted(below, key=_as_counted)
    places = [f"'{shown(str(PurePath(ref) / place), 400)}'" for place in ordered]
    if len(places) == 1:
        return f"; there is one in {places[0]}: give that"
    if one_training:
        others = ", ".join(places[1:4]) + (", …" if len(places) > 4 else "")
        return f", but {len(places)} in sub-folders; the latest is {places[0]}: give that (or {others})"
    listed = ", ".join(places[:_LISTED]) + (", …" if len(places) > _LISTED else "")
    return f", but {len(places)} in sub-folders: give one, {listed}"


def adapter_file(beside: Sequence[str], role: str, folder: str) -> str:
    """Say what to give instead of a file of an adapter; `beside` are the names in its folder.

    >>> adapter_file(["adapter_config.json", "adapter_model.safetensors"], "sft", "lora")
    "is a file of an adapter; give its folder, 'lora'"
    """
    place = f"'{shown(folder, 400)}'"
    if MODEL in beside or INDEX in beside:
        return (
            f"is a file of an adapter beside a model, in {place}; move it and its {ADAPTER_CONFIG} to a folder of their"
            " own, and give that"
        )
    form = _adapter_form(beside, role, folder)
    return f"is a file of an adapter; {f'its folder, {place}, {form}' if form else f'give its folder, {place}'}"
