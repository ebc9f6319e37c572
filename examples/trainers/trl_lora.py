"""A round of LoRA with TRL: train an adapter on START, merge it back towards BASE, save the whole model in OUT.

python trl_lora.py BASE START DATA OUT ROUND
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from mergekit_imm import IMMCallback

base, start, data, out, iteration = sys.argv[1:]
on_cpu = not torch.cuda.is_available()
trainer = SFTTrainer(
    start,
    args=SFTConfig(f"{out}-training", num_train_epochs=1, learning_rate=1e-3, report_to=[], use_cpu=on_cpu),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
    callbacks=[IMMCallback(base, start=start, iteration=int(iteration), alpha=0.5, drop=0.2, merge_adapter=True)],
)
trainer.train()
trainer.save_model(out)
