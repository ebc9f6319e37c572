"""Train, fine-tune, merge and measure a real but tiny model: `make demo`, one to four minutes on two cores.

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
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # every model here is a local folder

sys.path.append(str(Path(__file__).with_name("self_improvement")))

import torch
import transformers
from matplotlib import style
from matplotlib.figure import Figure
from torch.nn.utils import parameters_to_vector
from toy import (
    IN_DOMAIN,
    OUT_OF_DOMAIN,
    Example,
    build_model,
    build_tokenizer,
    distinct,
    encode,
    respond,
    same_result,
    train,
    training_mix,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SEED = 0
START = time.perf_counter()

N_IN, N_OUT = 1000, 300  # test questions in domain, and for each skill out of domain
LR, LOW_LR = 1e-3, 3e-4  # the low one ends about as far from the base as the merge at alpha 0.5
MERGES = {"merged-0.3": 0.3, "merged": 0.5, "merged-0.7": 0.7}  # folder: alpha
ROWS = {  # folder: label and colour
    "base": ("base", "0.5"),
    "sft": ("SFT", "C1"),
    "sft-low-lr": ("SFT, low learning rate", "C2"),
    **{name: (f"merged, alpha {alpha}", "C0") for name, alpha in MERGES.items()},
}

READING = """
± is one standard error from the choice of test questions; another seed gives another base and other rows.
The low learning rate is the control: it has no merge. Compare a merge with it at about the same distance
from the base. Where the two agree, what the merge did is move the model less; only a difference beyond the
errors speaks for or against merging itself.
This is one round of one toy model, and the other skills are those of its own pretraining.
"""


class Score(NamedTuple):
    """Percentages of right answers with their standard errors, and the distance from the base."""

    inside: float
    inside_error: float
    outside: float
    outside_error: float
    moved: float


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


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
    figure = Figure(figsize=(8, 4.6))
    axes = figure.add_subplot()
    line = [scores[name] for name in ("base", *reversed(MERGES), "sft")]  # alpha falls
    axes.plot([s.inside for s in line], [s.outside for s in line], color="C0", alpha=0.4, zorder=1)
    for name, s in scores.items():
        label, color = ROWS[name]
        axes.errorbar(s.inside, s.outside, s.outside_error, s.inside_error, fmt="o", color=color, lw=1)
        # A line that falls to the right leaves the lower left and the upper right of its points free.
        place = ("right", "top", (-6, -4)) if name in MERGES else ("left", "bottom", (6, 4))
        ha, va, offset = place
        axes.annotate(label, (s.inside, s.outside), offset, textcoords="offset points", color=color, ha=ha, va=va)
    axes.set_xlabel(f"in domain: addition, % right (n = {N_IN})")
    axes.set_ylabel(f"out of domain: other skills, % right (n = {len(OUT_OF_DOMAIN)} x {N_OUT})")
    axes.set_title("One round of self-improvement on a toy model (bars: one standard error)")
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
    base = build_model(tokenizer, layers=2, seed=SEED)
    train(base, *encode(tokenizer, training_mix(128_000, rng)), steps=1000, batch=128, lr=4e-3, seed=SEED, tell=say)
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
        train(sft, ids, labels, steps=150, batch=64, lr=lr, seed=SEED, tell=say)
        save(sft, tokenizer, name)

    say("merge")
    for name, alpha in MERGES.items():
        imm_merge(name, alpha)

    say("load and test every model")
    scores = {name: evaluate(name, tests) for name in ROWS}
    with style.context(ROOT / "docs" / "scripts" / "pictures.mplstyle"):
        draw_picture(scores, DEMO / "demo.png")
    say(f"  picture: {DEMO.name}/demo.png")
    print_table(scores)


if __name__ == "__main__":
    main()
