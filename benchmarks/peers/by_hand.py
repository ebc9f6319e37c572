"""The script that people write: load both models with transformers, loop over the tensors, save.

python benchmarks/peers/by_hand.py BASE SFT OUT ALPHA DROP
"""

import sys

import torch
from transformers import AutoModelForCausalLM

base_path, sft_path, out = sys.argv[1:4]
alpha, drop = float(sys.argv[4]), float(sys.argv[5])
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
sft = AutoModelForCausalLM.from_pretrained(sft_path, dtype=torch.bfloat16)
with torch.no_grad():
    for (_, b), (_, s) in zip(base.named_parameters(), sft.named_parameters(), strict=True):
        delta = s.float() - b.float()
        mask = torch.bernoulli(torch.full_like(delta, 1 - drop))
        s.copy_(b.float() + (1 - alpha) * delta * mask / (1 - drop))
sft.save_pretrained(out)
