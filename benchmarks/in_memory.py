"""Time merges into models in memory: `merge_into` by how a model is sharded, `iter_merged` against a merge to the disk.

    python benchmarks/in_memory.py [--size qwen2.5-0.5b] [--runs 3] [--json]

Two processes hold the model in halves, by rows (`Shard(0)`) or by columns (`Shard(1)`), and merge at once; the time is
that of the slower. `iter_merged` yields every tensor; the merge to the disk has the same inputs. Warm, without the
start of Python or the import of torch; each case runs once in every round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import ALPHA, DROP, make_models
from measure import warm

SIZE = "qwen2.5-0.5b"
PROCESSES = 2
# Each case, and the one that it is held against.
CASES: Mapping[str, str] = {
    "merge_into, Shard(0)": "merge_into, Shard(0)",
    "merge_into, Shard(1)": "merge_into, Shard(0)",
    "merge to the disk": "merge to the disk",
    "iter_merged": "merge to the disk",
    'iter_merged, order="layers"': "merge to the disk",
}


def seconds_of(case: str, folder: Path) -> float:
    """Run a case once in this process; return its seconds."""
    if case.startswith("merge_into"):
        from torch.multiprocessing.spawn import spawn

        dimension = int(case[-2])
        spawn(merge_share, (folder, dimension), PROCESSES)  # type: ignore[no-untyped-call]
        return max(float((folder / f"seconds-{rank}").read_text()) for rank in range(PROCESSES))
    import torch  # noqa: F401 - `iter_merged` needs it, and its import takes longer than a merge

    from mergekit_imm import iter_merged, merge_checkpoints

    pair = folder / "base", folder / "sft"
    began = time.perf_counter()
    if case.startswith("iter_merged"):
        for _ in iter_merged(*pair, alpha=ALPHA, drop=DROP, order="layers" if "layers" in case else "files"):
            pass
    else:
        merge_checkpoints(*pair, folder / "out", alpha=ALPHA, drop=DROP)
    took = time.perf_counter() - began
    shutil.rmtree(folder / "out", ignore_errors=True)
    return took


def merge_share(rank: int, folder: Path, dimension: int) -> None:
    """Merge this rank's half of the model; write the seconds that it took to a file."""
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from mergekit_imm import merge_into

    store = folder / f"store-{dimension}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = nn.Module()
    for name, tensor in load_file(folder / "sft" / "model.safetensors").items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        cut = [Shard(min(dimension, tensor.ndim - 1))]
        whole = distribute_tensor(tensor, mesh, cut, src_data_rank=None)
        module.register_parameter(last, nn.Parameter(whole, requires_grad=False))
    dist.barrier()
    began = time.perf_counter()
    merge_into(model, folder / "base", alpha=ALPHA, drop=DROP)
    (folder / f"seconds-{rank}").write_text(str(time.perf_counter() - began))
    dist.barrier()
    dist.destroy_process_group()
    store.unlink(missing_ok=True)


def measure(size: str, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Run every case once in each round, in a process of its own; return medians, and what each is against."""
    make_models(size, folder)
    runs: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(rounds + 1):
        for case in list(CASES) if number % 2 == 0 else reversed(list(CASES)):
            warm([file for role in ("base", "sft") for file in sorted((folder / role).glob("*.safetensors"))])
            command = [sys.executable, __file__, "--case", case, str(folder)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if number:  # the first round compiles
                runs[case].append(float(printed.split()[-1]))
    medians = {case: statistics.median(found) for case, found in runs.items()}
    return {
        case: {"seconds": medians[case], "against": other, "ratio": medians[case] / medians[other], "n": rounds}
        for case, other in CASES.items()
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=SIZE)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # CASE FOLDER, in a process of its own
    arguments = parser.parse_args()
    if arguments.case:
        print(seconds_of(arguments.case[0], Path(arguments.case[1])))
        return
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        found = measure(arguments.size, Path(folder).absolute() / "models", arguments.runs)
    if arguments.json:
        print(json.dumps(found))
        return
    for case, it in found.items():
        print(f"{case:28} {it['seconds']:6.2f} s, {it['ratio']:.2f} times {it['against']}")


if __name__ == "__main__":
    main()
