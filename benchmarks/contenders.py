"""What is measured: the command of each contender for one pair of models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from floor import READS
from measure import measured, memory
from pair import SHARD, parameter_count
from peers.mergekit_dare import write_config

HERE = Path(__file__).parent
ALPHA, DROP = 0.5, 0.9
PEERS = ("mergekit", "mergekit-same", "sd-mecha", "by-hand")
# The floors, by how they read and write.
FLOORS = {f"floor {reads}/{writes}": (reads, writes) for reads in READS for writes in ("direct", "dontcache")}
OURS = ("imm-merge", "imm-merge --start", *FLOORS)

# Peers get no network: mergekit would ask the hub about the names of folders.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """One size on the disk, and where its outputs go."""

    size: str
    folder: Path
    workers: int
    peers_python: Path

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self.folder / "base"

    @property
    def sft(self) -> Path:
        """Folder of the fine-tuned model."""
        return self.folder / "sft"

    @property
    def start(self) -> Path:
        """Folder of the model in between; it need not be there."""
        return self.folder / "start"

    @property
    def out(self) -> Path:
        """Folder that every contender writes."""
        return self.folder / "out"

    def inputs(self, contender: str) -> list[Path]:
        """Files that a contender reads."""
        folders = [self.base, self.sft, *([self.start] if contender == "imm-merge --start" else [])]
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def imm_merge() -> str:
    """The command of this environment."""
    return str(Path(sys.executable).with_name("imm-merge"))


def make_models(size: str, folder: Path, *, start: bool = False) -> None:
    """Make base and sft, and perhaps start, in a process of its own: see `measured`."""
    command = [sys.executable, f"{HERE}/pair.py", size, str(folder), *(["--start"] if start else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def command(contender: str, job: Job) -> list[str]:
    """What is run for a contender."""
    pair, out = [str(job.base), str(job.sft)], str(job.out)
    numbers = [str(ALPHA), str(DROP)]
    match contender:
        case "imm-merge" | "imm-merge --start":
            start = ["--start", str(job.start), "--iteration", "1"] if contender.endswith("--start") else []
            options = ["--alpha", numbers[0], "--drop", numbers[1], "--json", "-o", out]
            return [imm_merge(), *pair, *start, *options]
        case floor if floor in FLOORS:
            reads, writes = FLOORS[floor]
            options = ["--workers", str(job.workers), "--reads", reads, "--writes", writes]
            return [sys.executable, f"{HERE}/floor.py", *pair, out, *options]
        case "mergekit" | "mergekit-same":
            config = job.folder / "mergekit.yml"
            write_config(config, job.base, job.sft, alpha=ALPHA, drop=DROP, same=contender == "mergekit-same")
            options = ["--no-copy-tokenizer", "--no-write-model-card"]
            return [str(job.peers_python.with_name("mergekit-yaml")), str(config), out, *options]
        case "sd-mecha":
            return [str(job.peers_python), f"{HERE}/peers/sd_mecha_dare.py", *pair, out, *numbers]
        case "by-hand":
            return [str(job.peers_python), f"{HERE}/peers/by_hand.py", *pair, out, *numbers]
    raise ValueError(contender)


def why_not(contender: str, size: str) -> str | None:
    """Return why a contender cannot take a size on this machine, if so."""
    model = 2 * parameter_count(size)
    if contender == "sd-mecha" and model > SHARD:
        return "reads single files only; this model has several"
    need = {"by-hand": 3 * model, "sd-mecha": 1.5 * model}.get(contender, min(model, 5e9) * 3.5)
    if need > memory()["MemAvailable"]:
        return f"would need about {need / 1e9:.0f} GB of memory; {memory()['MemAvailable'] / 1e9:.0f} GB are free"
    return None


def run(contender: str, job: Job) -> dict[str, float]:
    """Run a contender once; return what it took. Those that time their streaming have `stream` too."""
    peer = contender in PEERS
    took, printed = measured(command(contender, job), environment=OFFLINE if peer else None, out=job.out)
    if contender.startswith("imm-merge"):
        report = json.loads(printed)
        took |= {
            "stream": report["seconds"]["stream"],
            "read": report["bytes_read"],
            "written": report["bytes_written"],
        }
    elif contender.startswith("floor"):
        report = json.loads(printed)
        took |= {"stream": report["seconds"], "read": report["bytes_read"], "written": report["bytes_written"]}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in took.items()}
