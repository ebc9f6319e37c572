"""Fine-tune with TRL's SFTTrainer, and merge the model back towards its base at the end of the training.

    pip install trl
    python examples/sft_trl.py base data.jsonl merged --alpha 0.5

`data.jsonl` holds lines with `prompt` and `completion`. The callback merges in place, so that what the trainer saves is
the merged model. In the second round give what the first made as START.
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from mergekit_imm import IMMCallback

GPU = torch.cuda.is_available()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("data")
parser.add_argument("output")
parser.add_argument("--start", help="what this round starts from, if not the base")
parser.add_argument("--round", type=int, default=0, help="counted from 0: fixes the mask")
parser.add_argument("--alpha", type=float, default=0.5)
parser.add_argument("--drop", type=float, default=0.2)
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--steps", type=int, default=-1, help="of training; one epoch if not given")
asked = parser.parse_args()

trainer = SFTTrainer(
    asked.start or asked.base,
    args=SFTConfig(
        output_dir=f"{asked.output}-training",
        num_train_epochs=1,
        max_steps=asked.steps,
        save_strategy="no",
        learning_rate=asked.learning_rate,
        report_to=[],
        bf16=GPU,
        use_cpu=not GPU,
    ),
    train_dataset=load_dataset("json", data_files=asked.data, split="train"),
    callbacks=[IMMCallback(asked.base, start=asked.start, iteration=asked.round, alpha=asked.alpha, drop=asked.drop)],
)
trainer.train()
trainer.save_model(asked.output)
