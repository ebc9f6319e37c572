"""Train, fine-tune, merge and measure a real but tiny model: `make demo`, about a minute on two cores.

1. A Qwen2 model of 109 thousand parameters is trained from scratch on eight skills, such as addition
   (`A482+119=` is answered `11,10,6>601.`) and reversal (`R7631=` is answered `1367.`).
2. One round of self-improvement on addition: it answers questions, and is fine-tuned on those of its own
   answers that are right (STaR).
3. `imm-merge` merges the result with the base at three values of alpha, the weight of the base.
4. Every model is loaded from its folder and tested on addition (in domain) and on the other seven skills
   (out of domain). A second fine-tuning, the same but for a lower learning rate, is the control: it too
   ends nearer to the base, without a merge.

Training, merges and scores are real. The toy is the rest: the size of the model, skills on strings of
characters, one round, one seed, and "out of domain", which here means the other skills of the same
pretraining. It shows how the pieces fit together and what to measure, not what a language model would gain.

The models and a picture of the scores, `demo.png`, are written to the folder `demo`.
"""

import copy
import math
import os
import random
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # every model here is a local folder

import torch
import transformers
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SEED = 0
START = time.perf_counter()

SKILLS = "ASROMDCT"  # add, subtract, reverse, order, maximum, divide (remainder), copy, total
IN_DOMAIN, OUT_OF_DOMAIN = SKILLS[0], SKILLS[1:]
N_IN, N_OUT = 1000, 300  # test questions in domain, and for each skill out of domain
VOCABULARY = "_.0123456789+-=,>%" + SKILLS  # _ pads, . ends an answer
LR, LOW_LR = 1e-3, 3e-4  # the low one ends about as far from the base as the merge at alpha 0.5
MERGES = {"merged-0.3": 0.3, "merged": 0.5, "merged-0.7": 0.7}  # folder: alpha
ROWS = {  # folder: label and colour
    "base": ("base", "#222222"),
    "sft": ("SFT", "#c0392b"),
    "sft-low-lr": ("SFT, low learning rate", "#b9770e"),
    **{name: (f"merged, alpha {alpha}", "#1f6fb4") for name, alpha in MERGES.items()},
}

READING = """
± is one standard error from the choice of test questions; another seed gives another base and other rows.
The low learning rate is the control: it has no merge. Compare a merge with it at about the same distance
from the base. Where the two agree, what the merge did is move the model less; only a difference beyond the
errors speaks for or against merging itself.
This is one round of one toy model, and the other skills are those of its own pretraining.
"""


class Example(NamedTuple):
    prompt: str
    answer: str


class Score(NamedTuple):
    """Percentages of right answers with their standard errors, and the distance from the base."""

    inside: float
    inside_error: float
    outside: float
    outside_error: float
    moved: float


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One character is one token."""
    ids = {character: i for i, character in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token=".")


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,  # a few more than the tokenizer has, as in many models
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Turn examples into token ids and labels; labels are the ids with all but the answers masked out."""
    encoded = tokenizer([prompt + answer for prompt, answer in examples], padding=True, return_tensors="pt")
    position = torch.arange(encoded.input_ids.shape[1])
    is_prompt = position < torch.tensor([[len(prompt)] for prompt, _ in examples])
    labels = encoded.input_ids.masked_fill(is_prompt | (encoded.attention_mask == 0), -100)
    return encoded.input_ids, labels


def train(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor, *, steps: int, batch: int, lr: float) -> None:
    """Train in place on the answers; the learning rate ends at zero.

    Otherwise the base would be left half-way, and better for any gentle step or averaging that follows.
    """
    generator = torch.Generator().manual_seed(SEED)
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
            say(f"  step {step} of {steps}, loss {loss.item():.3f}")
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


def same_result(a: str, b: str) -> bool:
    """Compare what comes after the working, if there is any."""
    return a.rpartition(">")[2] == b.rpartition(">")[2]


def self_improvement_data(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Example]
) -> list[Example]:
    """Sample three answers to each question and keep those whose result is right, each once."""
    prompts = [question.prompt for question in questions]
    torch.manual_seed(SEED)
    right: dict[Example, None] = {}
    for temperature in (0.4, 0.7, 1.0):
        answers = respond(model, tokenizer, prompts, temperature)
        for question, answer in zip(questions, answers, strict=True):
            if same_result(answer, question.answer):
                right[Example(question.prompt, answer)] = None
    return list(right)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    model.save_pretrained(DEMO / name)
    tokenizer.save_pretrained(DEMO / name)
    say(f"  saved to {DEMO.name}/{name}")


def imm_merge(name: str, alpha: float) -> None:
    """Run the command as a user would."""
    command = ["imm-merge", "demo/base", "demo/sft", "--alpha", str(alpha), "--drop", "0.2"]
    command += ["--overwrite", "-o", f"demo/{name}"]
    executable = Path(sys.executable).with_name("imm-merge")
    if not executable.exists():
        sys.exit(f"error: there is no {executable}; `make demo` installs it, or `pip install -e .` does")
    print(f"$ {shlex.join(command)}", flush=True)
    status = subprocess.run([executable, *command[1:]], cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(f"error: imm-merge failed with exit status {status}; the demo ends here")


def evaluate(name: str, tests: dict[str, list[Example]]) -> Score:
    """Load a model from its folder; measure greedy exact match, and the distance from the base."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / name)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    percent, variance = {}, {}
    for skill, examples in tests.items():
        answers = respond(model, tokenizer, [example.prompt for example in examples])
        right = sum(map(same_result, answers, (example.answer for example in examples)))
        percent[skill] = 100 * right / len(examples)
        p = (right + 1) / (len(examples) + 2)  # keeps the error of a perfect score above zero
        variance[skill] = 100**2 * p * (1 - p) / len(examples)
    with torch.no_grad():
        theta = parameters_to_vector(base.parameters())
        moved = parameters_to_vector(model.parameters()) - theta
    return Score(
        inside=percent[IN_DOMAIN],
        inside_error=math.sqrt(variance[IN_DOMAIN]),
        outside=sum(percent[skill] for skill in OUT_OF_DOMAIN) / len(OUT_OF_DOMAIN),
        outside_error=math.sqrt(sum(variance[skill] for skill in OUT_OF_DOMAIN)) / len(OUT_OF_DOMAIN),
        moved=float(moved.norm() / theta.norm()),
    )


def draw_picture(scores: dict[str, Score], path: Path) -> None:
    """Plot in-domain against out-of-domain accuracy, with a line from the base through the merges to SFT."""
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    line = [scores[name] for name in ("base", *reversed(MERGES), "sft")]  # alpha falls
    axes.plot([s.inside for s in line], [s.outside for s in line], color="#a9c6e3", zorder=1)
    for name, s in scores.items():
        label, color = ROWS[name]
        axes.errorbar(s.inside, s.outside, s.outside_error, s.inside_error, fmt="o", color=color, lw=1)
        # A line that falls to the right leaves the lower left and the upper right of its points free.
        place = ("right", "top", (-6, -4)) if name in MERGES else ("left", "bottom", (6, 4))
        ha, va, offset = place
        axes.annotate(label, (s.inside, s.outside), offset, textcoords="offset points", color=color, ha=ha, va=va)
    axes.set_xlabel(f"in domain: addition, % right (n = {N_IN})")
    axes.set_ylabel(f"out of domain: other skills, % right (n = {len(OUT_OF_DOMAIN)} x {N_OUT})")
    axes.set_title("One round of self-improvement on a toy model (bars: one standard error)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.1)
    figure.savefig(path)


def print_table(scores: dict[str, Score]) -> None:
    print(f"\n{'':24}{'in domain':16}{'out of domain':18}distance from base")
    print(f"{'':24}{f'n = {N_IN}':16}{f'n = {len(OUT_OF_DOMAIN)} x {N_OUT}':18}||w - base|| / ||base||")
    for name, s in scores.items():
        inside, outside = f"{s.inside:.1f} ± {s.inside_error:.1f}", f"{s.outside:.1f} ± {s.outside_error:.1f}"
        print(f"{ROWS[name][0]:24}{inside:16}{outside:18}{s.moved:.3f}")
    print(READING)


def main() -> None:
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rng = random.Random(SEED)
    tests = {skill: distinct(skill, N_OUT, rng, test=True) for skill in OUT_OF_DOMAIN}
    tests[IN_DOMAIN] = distinct(IN_DOMAIN, N_IN, rng, test=True)
    tokenizer = build_tokenizer()

    say("train the base model on eight skills")
    base = build_model(tokenizer)
    train(base, *encode(tokenizer, training_mix(128_000, rng)), steps=1000, batch=128, lr=4e-3)
    save(base, tokenizer, "base")

    questions = distinct(IN_DOMAIN, 3000, rng, test=False)
    say(f"let it answer {len(questions)} additions, three times each")
    right = self_improvement_data(base, tokenizer, questions)
    solved = len({prompt for prompt, _ in right})
    say(f"  {solved} solved at least once, with {len(right)} different answers")
    ids, labels = encode(tokenizer, right)

    for name, lr in (("sft", LR), ("sft-low-lr", LOW_LR)):
        say(f"fine-tune the base on these, learning rate {lr}")
        sft = copy.deepcopy(base)
        train(sft, ids, labels, steps=150, batch=64, lr=lr)
        save(sft, tokenizer, name)

    say("merge")
    for name, alpha in MERGES.items():
        imm_merge(name, alpha)

    say("load and test every model")
    scores = {name: evaluate(name, tests) for name in ROWS}
    draw_picture(scores, DEMO / "demo.png")
    say(f"  picture: {DEMO.name}/demo.png")
    print_table(scores)


if __name__ == "__main__":
    main()
