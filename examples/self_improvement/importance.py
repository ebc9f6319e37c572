"""Measure each layer's importance: the sum of |gradient * weight| over its linear weights (the paper's Eq. 3).

The gradient is that of the mean loss on right answers to additions. `imm-loop --importance` takes the file (IIMM).
"""

import argparse
import json
import random
from pathlib import Path

from toy import IN_DOMAIN, distinct, encode, load

from mergekit_imm import layer_importance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    questions = distinct(IN_DOMAIN, arguments.questions, random.Random(arguments.seed), test=False)
    ids, labels = encode(tokenizer, questions)
    layers = layer_importance(model, [{"input_ids": ids, "labels": labels}]).layers
    Path(arguments.output).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
