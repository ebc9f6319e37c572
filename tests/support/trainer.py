"""User commands for loop tests, `python trainer.py train|evaluate ...`: fast, without torch.

train MODEL OUTPUT ROUND      adds 0.01 * (ROUND + 1) to every weight
evaluate MODEL BASE JSON      writes the largest distance from the base, and what is left of 1
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def main(what: str, *arguments: str) -> None:
    """Run one of the commands."""
    if what == "train":
        model, output, number = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
        output.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(model / name, output / name)
        state = load_file(model / "model.safetensors")
        tuned = {name: (array + np.float32(0.01 * (number + 1))).astype(np.float32) for name, array in state.items()}
        save_file(tuned, output / "model.safetensors")
        print(f"trained round {number}")
    else:
        states = [load_file(Path(folder) / "model.safetensors") for folder in arguments[:2]]
        distance = max(float(np.abs(states[0][name] - states[1][name]).max()) for name in states[1])
        Path(arguments[2]).write_text(json.dumps({"distance": distance, "nested": {"left": 1 - distance}, "x": "y"}))


if __name__ == "__main__":
    main(*sys.argv[1:])
