"""The callback on several ranks: `torchrun ... trainer_ranks.py FOLDER KIND`.

KIND is ddp, a Trainer; or fsdp2: accelerate lets a Trainer shard on accelerators only, so a loop by hand calls the
callback as a Trainer does.

FOLDER holds `base`. Every rank writes the merged weights that it has, whole, to `KIND-RANK`, and what it had trained
before to `KIND-sft-RANK`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpoints import write_model
from loop.test_callback import Data, trainer
from mergekit_imm import IMMCallback


class Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """Save the trained weights before the merge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Save the weights."""
        write(kwargs["model"], self.folder)


def write(model: Any, folder: Path) -> None:
    """Save a model's weights, gathering sharded ones."""
    state = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in model.named_parameters()
    }
    write_model(folder, state)


def by_hand(model: Any, folder: Path, *callbacks: Any) -> None:
    """Train a sharded model for two steps, calling callbacks as a Trainer does."""
    arguments = trainer(torch.nn.Linear(1, 1), folder, num_train_epochs=1).args
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for each in callbacks:
        each.on_train_begin(arguments, None, None, model=model)
    rank = torch.distributed.get_rank()
    for step in range(2):
        tokens = torch.stack([Data()[4 * step + 2 * rank + row]["input_ids"] for row in range(2)])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in callbacks:
        each.on_train_end(arguments, None, None, model=model)


def main(folder: Path, kind: str) -> None:
    """Train, with a callback that merges."""
    warnings.simplefilter("ignore")
    rank = os.environ["RANK"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    seen = Seen(folder / f"{kind}-sft-{rank}")
    callback = IMMCallback(folder / "base", alpha=0.3, drop=0.5, workers=1)
    if kind == "ddp":
        trainer(model, folder, seen, callback, num_train_epochs=1, per_device_train_batch_size=4).train()
    else:
        torch.distributed.init_process_group("gloo")
        by_hand(model, folder, seen, callback)
    assert callback.merges == 1
    assert any(isinstance(tensor, DTensor) for tensor in callback.model.parameters()) == (kind == "fsdp2")
    write(callback.model, folder / f"{kind}-{rank}")
    torch.distributed.barrier()  # a rank must not exit while another needs it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # threads of gloo may outlive the interpreter
