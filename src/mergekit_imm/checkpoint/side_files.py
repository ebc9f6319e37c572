"""Which files of a model, other than weights, are copied into the merged one."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

OWN = ("README.md", "imm_recipe.json", "imm_report.json")

# Folders that hold copies of the weights in other formats, or the state of a training run.
FOLDERS = (
    "original onnx openvino coreml runs wandb swanlog mlruns lightning_logs tensorboard logs checkpoint-* global_step*"
    " optimizer_* pytorch_model_fsdp_* __pycache__"
).split()
_WEIGHTS = (
    ".bin .ckpt .distcp .engine .ggml .gguf .h5 .mlmodel .msgpack .nemo .npy .npz .onnx .onnx_data .ot "
    ".pdparams .pickle .pkl .pt .pth .safetensors .tflite"
).split()
# What training leaves beside a model: arguments (with local paths), states, logs and plots. Optimizer and scheduler
# states are caught by their suffix; a pipeline's `scheduler_config.json` belongs to the model.
_LEFTOVERS = (
    "*.index.json adapter_config.json *.partial *.lock *.log *.out events.out.tfevents.* "
    "args.json args.yaml *_args.json *_args.yaml *_args.yml training_params.json training_config.* train_config.* "
    "hyperparameters.yaml hparams.yaml llamaboard_config.yaml axolotl_config.y*ml torchtune_config.yaml "
    "ds_config*.json deepspeed_config*.json fsdp_config.json accelerate_config.yaml additional_config.json "
    "trainer_state.json tokens_state.json latest latest_checkpointed_iteration.txt zero_to_fp32.py "
    "*_results.json *_results.csv trainer_log.jsonl logging.jsonl running_log.txt generated_predictions.jsonl "
    "completions_*.parquet *_loss.png train_*.png training_*.png eval_*.png"
).split()


def is_side_file(path: str, *, copy_code: bool = False) -> bool:
    """Whether a file of a model folder is copied into a merged one.

    `path` is relative to the folder, with forward slashes. Everything is copied (tokenizer, chat template,
    generation config, processors, sub-folders) except weights of any format, training leftovers, pickles,
    hidden files, code (unless `copy_code`: it would run on the machine of whoever loads the model), links to
    folders (which end in a slash), and the three files that a merge writes itself.

    >>> is_side_file("tokenizer.json"), is_side_file("model.safetensors"), is_side_file("modeling_x.py")
    (True, False, False)
    """
    *folders, name = PurePosixPath(path).parts
    if path.endswith("/") or path in OWN or any(part.startswith(".") for part in (*folders, name)):
        return False
    if any(fnmatchcase(folder, pattern) for folder in folders for pattern in FOLDERS):
        return False
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _WEIGHTS or any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS):
        return False
    return copy_code or suffix not in (".py", ".pyc")
