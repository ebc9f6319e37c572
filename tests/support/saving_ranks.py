"""One of two training ranks that save a sharded model: `python saving_ranks.py RANK FOLDER`.

FOLDER holds `state.pt`, a state dict. Beside it both together write what torch.distributed.checkpoint makes of it, in
some layouts.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from modules import Model


def main(rank: int, folder: Path) -> None:
    """Save the model in every layout."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, Tensor] = torch.load(folder / "state.pt")

    def split(dim: int) -> dict[str, DTensor]:
        return {
            name: distribute_tensor(tensor, mesh, [Shard(dim) if tensor.ndim > dim else Replicate()])
            for name, tensor in state.items()
        }

    for dim in (0, 1):
        save({"model": split(dim)}, checkpoint_id=folder / f"shard{dim}")
    save(split(0), checkpoint_id=folder / "flat")

    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    model = Model(floats)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 3, "rng_state": torch.get_rng_state()}
    save(saved, checkpoint_id=folder / "fsdp2")

    PartialState(cpu=True)  # required by accelerate's loggers
    accelerator = SimpleNamespace(process_index=rank, num_processes=2)
    for kind in (StateDictType.SHARDED_STATE_DICT, StateDictType.FULL_STATE_DICT):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        save_fsdp_model(plugin, accelerator, model, str(folder / f"accelerate {kind.name}"))

    for dim in (0, 1):
        for name, whole in (("hf", False), ("consolidated", True)):
            pieces = {
                key: piece for key, piece in split(dim).items() if not whole or key in floats
            }  # it can consolidate these
            writer = HuggingFaceStorageWriter(
                str(folder / f"{name}{dim}"),
                save_distributed=True,
                enable_consolidation=whole,
                fqn_to_index_mapping={key: 1 + number % 2 for number, key in enumerate(pieces)},
            )
            save(pieces, storage_writer=writer)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # threads of gloo may outlive the interpreter
