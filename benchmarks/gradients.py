"""Time and memory of `layer_importance` on a random model of 110 million parameters, beside a plain backward pass.

    python benchmarks/gradients.py [--sequences 4] [--length 64]

Each row is a process of its own, with one thread. Time is that of the processor. Memory is the process's own (RssAnon:
not what is mapped from files), sampled every 10 ms, above that of the model alone; in bytes for each parameter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "backward of one batch": {"plain": True, "batches": 1},
    "backward of a batch each": {"plain": True},
    "first, one batch": {"order": "first", "batches": 1},
    "first, a batch each": {"order": "first"},
    "first, a batch each, on disk": {"order": "first", "accumulate": "disk"},
    "per-sample": {"order": "per-sample"},
    "second": {"order": "second"},
    "mix": {"order": "mix"},
}


def own_memory() -> int:
    """Bytes of this process that are not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The largest memory seen while it is open."""

    def __enter__(self) -> Peak:
        self.bytes, self.open = own_memory(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.bytes = max(self.bytes, own_memory())
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()


def measure(row: dict[str, Any], sequences: int, length: int) -> dict[str, float]:
    import torch
    import transformers

    from mergekit_imm import layer_importance

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 32_000, (sequences, length))
    size = sequences if row.get("batches") == 1 else 1
    batches = [{"input_ids": part, "labels": part} for part in torch.split(ids, size)]
    before = own_memory()
    with Peak() as peak, tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        if row.get("plain"):
            for batch in batches:
                model(**batch).loss.backward()
        else:
            place = folder if row.get("accumulate") == "disk" else "memory"
            layer_importance(model, batches, order=row["order"], accumulate=place)
        seconds = time.process_time() - began
    return {"parameters": count, "seconds": seconds, "bytes": (peak.bytes - before) / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(ROWS[arguments.row], arguments.sequences, arguments.length)))
        return
    print("| | s per sequence | bytes per parameter |\n|---|---|---|")
    for name in ROWS:
        own = ["--row", name, "--sequences", str(arguments.sequences), "--length", str(arguments.length)]
        done = subprocess.run([sys.executable, __file__, *own], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        print(f"| {name} | {found['seconds'] / arguments.sequences:.2f} | {found['bytes']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
