"""Write the mergekit configuration that comes nearest to a merge of ours, as people write it, or with the same formula.

Nearest: the base goes in as a model and as base_model, merged = base + (1 - alpha) * DARE(sft - base), and mergekit
rescales by the L1 norm. The same formula: `rescale: false`, and the weight divided by 1 - drop. Run it with
`mergekit-yaml FILE OUT --no-copy-tokenizer`.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_config(path: Path, base: Path, sft: Path, *, alpha: float, drop: float, same: bool = False) -> None:
    """Write it to a file; JSON is YAML."""
    density, weight = round(1 - drop, 12), round(1 - alpha, 12)
    nearest = [
        {"model": str(base), "parameters": {"weight": alpha, "density": 1.0}},
        {"model": str(sft), "parameters": {"weight": weight, "density": density}},
    ]
    exact = [{"model": str(sft), "parameters": {"weight": round(weight / density, 12), "density": density}}]
    content = {
        "merge_method": "dare_linear",
        "base_model": str(base),
        "models": exact if same else nearest,
        **({"parameters": {"rescale": False}} if same else {}),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path.write_text(json.dumps(content, indent=2))
