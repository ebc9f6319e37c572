"""Write the mergekit configuration that comes nearest to a merge of ours.

The base goes in as a model and as base_model: merged = base + (1 - alpha) * DARE(sft - base). Run it with
`mergekit-yaml FILE OUT --no-copy-tokenizer`. What differs: mergekit rescales by the L1 norm, not by 1 / (1 - drop).
"""

from __future__ import annotations

import json
from pathlib import Path


def write_config(path: Path, base: Path, sft: Path, *, alpha: float, drop: float) -> None:
    """Write it to a file; JSON is YAML."""
    content = {
        "merge_method": "dare_linear",
        "base_model": str(base),
        "models": [
            {"model": str(base), "parameters": {"weight": alpha, "density": 1.0}},
            {"model": str(sft), "parameters": {"weight": round(1 - alpha, 12), "density": round(1 - drop, 12)}},
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path.write_text(json.dumps(content, indent=2))
