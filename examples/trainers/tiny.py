import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.utils.logging.disable_progress_bar()
letters = ["<pad>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokens = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|endoftext|>", pad_token="<pad>")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
config = transformers.Qwen2Config(
    vocab_size=len(letters), num_hidden_layers=2, eos_token_id=1, pad_token_id=0, dtype="bfloat16", **sizes
)
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained("base")
tokenizer.save_pretrained("base")
rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
Path("data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
