"""Time a merge of each form of input, and with each sparsifier, against a plain merge of the same model.

    python benchmarks/forms.py [--size qwen2.5-0.5b] [--runs 3] [--only LoRA,trim] [--json]

The fine-tuned model is the one of `pair.py`: as a PyTorch file, and as a checkpoint of torch.distributed that two ranks
saved, each tensor split along its first dimension. The adapters are of rank 16 on every linear layer, float32 as PEFT
stores them. All run once in every round, warm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import ALPHA, DROP, imm_merge, make_models
from measure import measured, warm
from pair import shapes

if TYPE_CHECKING:  # imported where it is used: who measures memory must not have it loaded
    from torch import Tensor

SIZE = "qwen2.5-0.5b"
RANK, PROCESSES = 16, 2
PLAIN = "plain"
# The folder of each form's sft, and its options.
FORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    PLAIN: ("sft", ()),
    "LoRA": ("lora", ()),
    "DoRA": ("dora", ()),
    "torch DCP": ("dcp", ()),
    ".bin": ("bin", ()),
    "trim": ("sft", ("--sparsify", "trim")),
    "della": ("sft", ("--sparsify", "della:0.05")),
}


def state_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def make(size: str, folder: Path) -> None:
    """Make every form of the sft, beside it."""
    import torch
    from safetensors.torch import save_file
    from torch.multiprocessing.spawn import spawn

    for form in ("bin", "dcp", "lora", "dora"):
        (folder / form).mkdir()
    for form in ("bin", "dcp"):
        shutil.copy(folder / "sft" / "config.json", folder / form)
    torch.save(state_of(folder / "sft"), folder / "bin" / "pytorch_model.bin")
    spawn(save_share, (folder,), PROCESSES)  # type: ignore[no-untyped-call]
    factors = dict(factors_of(size))
    base = state_of(folder / "base")
    norms = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector.weight": base[name].float().norm(dim=1)
        for name in linear(size)
    }
    for form, state in (("lora", factors), ("dora", {**factors, **norms})):
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": form == "dora"}
        (folder / form / "adapter_config.json").write_text(json.dumps(config))
        save_file(state, folder / form / "adapter_model.safetensors")


def save_share(rank: int, folder: Path) -> None:
    """Save the sft with torch.distributed.checkpoint, as one of the ranks that hold it in pieces."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    pieces = {
        name: DTensor.from_local(
            tensor.chunk(PROCESSES)[rank], mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride()
        )
        for name, tensor in state_of(folder / "sft").items()
    }
    save({"model": pieces}, checkpoint_id=folder / "dcp")
    dist.barrier()
    dist.destroy_process_group()


def linear(size: str) -> dict[str, tuple[int, int]]:
    """Names and shapes of the linear layers' weights."""
    return {name: (shape[0], shape[1]) for name, shape in shapes(size) if name.endswith("proj.weight")}


def factors_of(size: str) -> Iterator[tuple[str, Tensor]]:
    """The two factors of each linear layer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, (rows, columns) in linear(size).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        yield f"{module}.lora_A.weight", torch.randn(RANK, columns, generator=generator) * 0.01
        yield f"{module}.lora_B.weight", torch.randn(rows, RANK, generator=generator) * 0.01


def command(form: str, folder: Path) -> list[str]:
    """What is run for a form."""
    sft, options = FORMS[form]
    numbers = ["--alpha", str(ALPHA), "--drop", str(DROP)]
    return [imm_merge(), f"{folder}/base", f"{folder}/{sft}", *numbers, *options, "--json", "-o", f"{folder}/out"]


def measure(size: str, folder: Path, rounds: int, forms: Collection[str] = FORMS) -> dict[str, list[dict[str, float]]]:
    """Merge every form once in each round; return what each took."""
    make_models(size, folder)
    subprocess.run([sys.executable, __file__, "--make", size, str(folder)], check=True)
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS if form == PLAIN or form in forms}
    for number in range(rounds + 1):
        for form in list(runs) if number % 2 == 0 else reversed(list(runs)):
            for role in ("base", FORMS[form][0]):
                warm([file for file in sorted((folder / role).iterdir()) if file.is_file()])
            took, printed = measured(command(form, folder))
            shutil.rmtree(folder / "out")
            if number:  # the first round compiles
                took["stream"] = json.loads(printed)["seconds"]["stream"]
                runs[form].append(took)
    return runs


def against_plain(runs: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Medians of each form, and how many times those of the plain merge they are."""
    medians = {
        form: {key: statistics.median(each[key] for each in found) for key in found[0]} for form, found in runs.items()
    }
    plain = medians[PLAIN]
    return {
        form: {**it, "ratio": it["wall"] / plain["wall"], "cpu_ratio": it["cpu"] / plain["cpu"], "n": len(runs[form])}
        for form, it in medians.items()
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=SIZE)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--only", default=",".join(FORMS), help="forms, at commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # SIZE FOLDER, in a process of its own
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make[0], Path(arguments.make[1]))
        return
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        runs = measure(arguments.size, Path(folder).absolute() / "models", arguments.runs, arguments.only.split(","))
    found = against_plain(runs)
    if arguments.json:
        print(json.dumps(found))
        return
    for form, it in found.items():
        print(
            f"{form:10} {it['wall']:6.2f} s ({it['ratio']:.2f}x), CPU {it['cpu']:6.2f} s ({it['cpu_ratio']:.2f}x),"
            f" streaming {it['stream']:.2f} s, {it['peak'] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
