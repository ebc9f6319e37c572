"""The ranks of training runs that merge their model in place: `python live_ranks.py FOLDER`, for each size of WORLDS.

FOLDER holds `base`, `start` and `sft.pt`, a state dict of float tensors. For each layout of the model each rank stores
what it became, as whole tensors, in WORLD-LAYOUT-RANK.pt; merged as a stream, in WORLD-LAYOUT stream-RANK.pt; and the
errors of refused merges.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mergekit_imm import MergeError, merge_into, merged_stream
from mergekit_imm.checkpoint.reader import Files
from mergekit_imm.live.local_shards import is_distributed
from modules import OPTIONS, Model, put

WORLDS = (2, 3, 4)


def layouts(world: int, state: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Yield each way of distributing the model over ranks."""

    def model() -> Model:
        return Model({name: tensor.clone() for name, tensor in state.items()})

    mesh = init_device_mesh("cpu", (world,))
    yield "fsdp2", fully_shard(model(), mesh=mesh)
    gathered: Any = fully_shard(model(), mesh=mesh)
    gathered.unshard()  # as after a forward pass without resharding
    assert is_distributed(gathered)  # though no parameter shows it
    yield "gathered", gathered
    for dim in (0, 1):
        yield f"shard{dim}", put(model(), partial(_cut, mesh, dim))
    yield "replicate", put(model(), lambda _, t: distribute_tensor(t, mesh, [Replicate()]))
    yield "some", put(model(), lambda n, t: distribute_tensor(t, mesh, [Shard(0)]) if "layers" in n else t)
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        yield "hsdp", fully_shard(model(), mesh=square)
        even = [name for name, t in state.items() if t.shape[0] % 4 == 0]  # required by FSDP2 for tensors sharded twice
        tensor_parallel = put(
            model(), lambda n, t: distribute_tensor(t, square["tp"], [Shard(0) if n in even else Replicate()])
        )
        yield "fsdp2 and tensor parallel", fully_shard(tensor_parallel, mesh=square["dp"])
        yield "two", put(model(), lambda _, t: distribute_tensor(t, square, [Shard(t.ndim - 1), Shard(0)]))


def _cut(mesh: Any, dim: int, _: str, tensor: Tensor) -> Tensor:
    return distribute_tensor(tensor, mesh, [Shard(dim % tensor.ndim)])


def placed(tensor: Tensor) -> object:
    """How a tensor lies on the ranks; None for a plain one."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def merge_all(rank: int, world: int, folder: Path) -> None:
    """Act as one rank: merge a model in each layout, and try refused calls."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    state: dict[str, Tensor] = torch.load(folder / "sft.pt")
    for name, model in layouts(world, state):
        given: dict[str, Tensor] = model.state_dict()
        options = {"start": folder / "start", "workers": 1 + rank, **OPTIONS}
        streamed = dict(merged_stream(given.items(), folder / "base", **options))
        assert [placed(given[key]) for key in given] == [placed(streamed[key]) for key in given]
        torch.save(whole(streamed), folder / f"{world}-{name} stream-{rank}.pt")
        merge_into(model, folder / "base", **options)
        torch.save(whole(model.state_dict()), folder / f"{world}-{name}-{rank}.pt")
    torch.save(refusals(rank, world, folder, state), folder / f"{world}-refused-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusals(rank: int, world: int, folder: Path, state: dict[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """Fail on one rank only; return the error message and whether this rank's bits are unchanged."""
    mesh = init_device_mesh("cpu", (world,))
    last = rank == world - 1
    read = Files.read
    seen: list[Any] = []

    def failing(files: Files, role: str, tensor: Any, first: int, buffer: Any) -> None:
        if last and (tensor.name, first) in seen[1:]:  # after the first reading, when a piece has been written
            raise OSError("the disk is gone")
        seen.append((tensor.name, first))
        read(files, role, tensor, first, buffer)

    found = {}
    for case in ("nan", "alpha", "base", "disk"):
        model = put(Model(state), lambda _, t: distribute_tensor(t.clone(), mesh, [Shard(0)]))
        state_dict: dict[str, Any] = model.state_dict()
        local = {name: tensor.to_local() for name, tensor in state_dict.items()}
        if case == "nan" and last:
            next(tensor for tensor in local.values() if tensor.numel()).view(-1)[0] = torch.nan
        before = {name: tensor.clone() for name, tensor in local.items()}
        options = OPTIONS | ({"alpha": 0.7} if case == "alpha" and last else {})
        base = folder / ("nowhere" if case == "base" and last else "base")
        try:
            with patch.object(Files, "read", failing if case == "disk" else read):
                merge_into(model, base, workers=1, **options)
            message = "nothing"
        except MergeError as error:
            message = f"{type(error).__name__}: {error}"
        same = all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in local.items())
        found[case] = (message, same)
    return found


def main(folder: Path) -> int:
    """Run all ranks of all world sizes, with shared imports."""
    import mergekit_imm.numerics.cpu  # noqa: F401

    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=merge_all, args=(rank, world, folder)) for world in WORLDS for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
