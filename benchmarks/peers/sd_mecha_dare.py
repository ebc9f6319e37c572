"""The same merge as a recipe of sd-mecha, which reads and writes single files: `base/model.safetensors`.

    python benchmarks/peers/sd_mecha_dare.py BASE SFT OUT ALPHA DROP

base + (1 - alpha) * dropout(sft - base), in float32, written as bfloat16; threads and buffers as it chooses.
"""

import sys
from pathlib import Path

import sd_mecha
import torch

base, sft, out = (Path(each) for each in sys.argv[1:4])
alpha, drop = float(sys.argv[4]), float(sys.argv[5])
models = [sd_mecha.model((folder / "model.safetensors").resolve()) for folder in (base, sft)]
recipe = sd_mecha.dropout(*models, probability=drop, alpha=1 - alpha, seed=0)
out.mkdir()
file = (out / "model.safetensors").resolve()
sd_mecha.merge(recipe, merge_device="cpu", merge_dtype=torch.float32, output_dtype=torch.bfloat16, output=file)
