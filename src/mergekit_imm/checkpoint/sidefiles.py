"""Which files of a model travel into a merged one, beside its weights."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

OWN = ("README.md", "imm_recipe.json", "imm_report.json")

# Folders of copies of the weights in other forms, and of a training run.
FOLDERS = (
    "original", "onnx", "openvino", "coreml", "runs", "wandb", "checkpoint-*", "global_step*", "optimizer_*",
    "pytorch_model_fsdp_*", "__pycache__",
)  # fmt: skip
_WEIGHTS = (
    ".bin .ckpt .distcp .engine .ggml .gguf .h5 .mlmodel .msgpack .nemo .npy .npz .onnx .onnx_data .ot "
    ".pdparams .pickle .pkl .pt .pth .safetensors .tflite"
).split()
_LEFTOVERS = (
    "*.index.json adapter_config.json trainer_state.json trainer_log.jsonl optimizer* scheduler* rng_state* "
    "*_results.json events.out.tfevents.* latest *.partial *.lock"
).split()


def is_side_file(path: str, *, copy_code: bool = False) -> bool:
    """Whether a file of a model folder is copied into a merged one.

    `path` is relative to the folder, with forward slashes. Copied is everything (tokenizer, chat template,
    generation config, processors, sub-folders) but weights of any format, training leftovers, pickles,
    hidden files, code (unless `copy_code`: it would run on the machine of whoever loads the model), and the
    three files that a merge writes itself.

    >>> is_side_file("tokenizer.json"), is_side_file("model.safetensors"), is_side_file("modeling_x.py")
    (True, False, False)
    """
    *folders, name = PurePosixPath(path).parts
    if path in OWN or any(part.startswith(".") for part in (*folders, name)):
        return False
    if any(fnmatchcase(folder, pattern) for folder in folders for pattern in FOLDERS):
        return False
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _WEIGHTS or any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS):
        return False
    return copy_code or suffix not in (".py", ".pyc")
