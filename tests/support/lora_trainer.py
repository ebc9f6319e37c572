"""TRL's SFTTrainer on a tiny model, with and without adapters; also `torchrun ... lora_trainer.py FOLDER KIND`.

FOLDER holds `base`. Every rank trains and merges, and writes what it then holds to `KIND-RANK`. What was trained
is in `KIND-sft-0`, what the trainer saves after the merge in `KIND-by-trainer`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpoints import write_model
from mergekit_imm import IMMCallback
from models import save_tokenizer

# What is trained, by the id of the test; None: the whole model.
KINDS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [90, 91]},
    "embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
ALPHA, DROP = 0.3, 0.5


class Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """Save what was trained, before the merge: a model, or an adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Save it."""
        kwargs["model"].save_pretrained(self.folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model in a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def sft_trainer(model: Any, folder: Path, kind: str, *callbacks: Any, **arguments: Any) -> Any:
    """Return an SFTTrainer for two steps with a large learning rate."""
    options = KINDS[kind]
    save_tokenizer(folder / "tokenizer")
    rows = [{"input_ids": [(place * (row + 3)) % 90 for place in range(12)] + [90, 91]} for row in range(8)]
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trained"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "seed": 3,
        **arguments,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
            peft_config=None if options is None else peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options),
            callbacks=list(callbacks),
        )


def sharded(folder: Path, callback: IMMCallback) -> None:
    """Call a callback at the end of a training with FSDP2; accelerate lets a Trainer shard on accelerators only."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(3)
    options = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **(KINDS["lora"] or {}))
    model = peft.get_peft_model(load(folder / "base", torch.float32), options)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder / "fsdp2-sft-0")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    callback.on_train_begin(None, None, None, model=model)
    callback.on_train_end(None, None, None, model=model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(folder: Path, kind: str) -> None:
    """Train as one of several ranks, with a callback that merges."""
    warnings.simplefilter("ignore")
    rank = os.environ["RANK"]
    callback = IMMCallback(folder / "base", merge_adapter=True, alpha=ALPHA, drop=DROP, workers=1)
    if kind == "fsdp2":
        sharded(folder, callback)
    else:
        seen = Seen(folder / f"{kind}-sft-{rank}")
        trainer = sft_trainer(load(folder / "base", torch.float32), folder / rank, kind, seen, callback)
        trainer.train()
        trainer.save_model(str(folder / f"{kind}-by-trainer"))  # by rank 0
    assert callback.merges == 1
    write_model(folder / f"{kind}-{rank}", {n: whole(tensor) for n, tensor in callback.model.state_dict().items()})
    torch.distributed.barrier()  # a rank must not exit while another needs it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # threads of gloo may outlive the interpreter
