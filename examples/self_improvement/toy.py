"""The toy that `make demo` and the loop share: eight skills on strings, their tokenizer, model, training and test."""

import json
import math
import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

SKILLS = "ASROMDCT"  # add, subtract, reverse, order, maximum, divide (remainder), copy, total
IN_DOMAIN, OUT_OF_DOMAIN = SKILLS[0], SKILLS[1:]
NAMES = dict(zip(SKILLS, "add subtract reverse order maximum remainder copy total".split(), strict=True))
VOCABULARY = "_.0123456789+-=,>%" + SKILLS  # _ pads, . ends an answer


class Example(NamedTuple):
    prompt: str
    answer: str


def columns(a: int, b: int, sign: int) -> str:
    """Answer a + sign*b as in school: column by column from the right, then the result."""
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        step = int(x) + sign * int(y) + carry
        carry = step // 10
        steps.append(str(step))
    return ",".join(steps) + f">{a + sign * b}."


def draw(skill: str, rng: random.Random) -> Example:
    """Draw a random question of a skill and its right answer."""
    if skill in "AS":
        size = 10 ** rng.randint(1, 2)
        a, b = rng.randrange(size, 10 * size), rng.randrange(size, 10 * size)
        if skill == "A":
            return Example(f"A{a}+{b}=", columns(a, b, 1))
        a, b = max(a, b), min(a, b)
        return Example(f"S{a}-{b}=", columns(a, b, -1))
    if skill == "M":
        numbers = [rng.randint(10, 99) for _ in range(rng.randint(2, 4))]
        return Example(f"M{','.join(map(str, numbers))}=", f"{max(numbers)}.")
    if skill == "D":
        a, b = rng.randint(0, 99), rng.randint(2, 9)
        return Example(f"D{a}%{b}=", f"{a % b}.")
    if skill == "T":
        terms = rng.choices(range(10), k=rng.randint(3, 5))
        return Example(f"T{'+'.join(map(str, terms))}=", f"{sum(terms)}.")
    digits = "".join(rng.choices("0123456789", k=rng.randint(3, 7)))
    answer = {"R": digits[::-1], "O": "".join(sorted(digits)), "C": digits + digits[-1]}[skill]
    return Example(f"{skill}{digits}=", f"{answer}.")


def usable(prompt: str, *, test: bool) -> bool:
    """Tell whether a question may be used: by its hash one in ten is for testing, and never trained on.

    The remainders are the exception: there are 800 in all, to be learnt by heart, so they serve for both.
    """
    return prompt[0] == "D" or (zlib.crc32(prompt.encode()) % 10 == 0) == test


def training_mix(count: int, rng: random.Random) -> list[Example]:
    """Draw questions of all skills; some repeat."""
    mix: list[Example] = []
    while len(mix) < count:
        example = draw(rng.choice(SKILLS), rng)
        if usable(example.prompt, test=False):
            mix.append(example)
    return mix


def distinct(skill: str, count: int, rng: random.Random, *, test: bool) -> list[Example]:
    """Draw different questions of one skill."""
    found: set[Example] = set()
    while len(found) < count:
        example = draw(skill, rng)
        if usable(example.prompt, test=test):
            found.add(example)
    return sorted(found)


def same_result(a: str, b: str) -> bool:
    """Compare what comes after the working, if there is any."""
    return a.rpartition(">")[2] == b.rpartition(">")[2]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One character is one token."""
    ids = {character: i for i, character in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token=".")


def build_model(tokenizer: PreTrainedTokenizerFast, *, layers: int, seed: int) -> Qwen2ForCausalLM:
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,  # a few more than the tokenizer has, as in many models
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Turn examples into token ids and labels; labels are the ids with all but the answers masked out."""
    encoded = tokenizer([prompt + answer for prompt, answer in examples], padding=True, return_tensors="pt")
    position = torch.arange(encoded.input_ids.shape[1])
    is_prompt = position < torch.tensor([[len(prompt)] for prompt, _ in examples])
    labels = encoded.input_ids.masked_fill(is_prompt | (encoded.attention_mask == 0), -100)
    return encoded.input_ids, labels


def train(
    model: Qwen2ForCausalLM,
    ids: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    tell: Callable[[str], None] = print,
) -> None:
    """Train in place on the answers; the learning rate ends at zero.

    Otherwise the base would be left half-way, and better for any gentle step or averaging that follows.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(
        optimizer, lambda step: min(20 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step, rows in enumerate(order[: steps * batch].view(steps, batch), start=1):
        loss = model(ids[rows], labels=labels[rows], use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps:
            tell(f"  step {step} of {steps}, loss {loss.item():.3f}")
    model.eval()


def respond(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float = 0.0
) -> list[str]:
    """Answer each prompt, greedily at temperature 0; an answer that does not end keeps no full stop."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = model.generate(
        input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=28, **sampling
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, encoded.input_ids.shape[1] :])
    return [text.rstrip("_") for text in texts]


def load(folder: str) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer; one thread, so that results do not depend on the machine's cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_examples(examples: Iterable[Example], path: str) -> None:
    """Write a JSON object a line."""
    Path(path).write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples), encoding="utf-8")


def read_examples(path: str) -> list[Example]:
    return [Example(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
