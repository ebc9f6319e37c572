"""Run the whole experiment: from one base, for each seed, every arm by `imm-loop`.

    python arms.py --base base --word-problems FOLDER --text book.txt --mix speeches.txt --seeds 0 1 2

What is done is not done again: run the same command again to resume. Seeds may run at the same time, in processes of
their own. The results of all seeds that are there are collected in OUTPUT/results.json.

Tasks are those of tasks.py. --text is ordinary text to measure perplexity on, --mix other ordinary text, a quarter of
the rows in one of the arms.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from experiments import machine, run  # noqa: E402

ROUNDS, POOL, EPOCHS, BATCH, LR = 3, 400, 3, 32, 1e-4
SAMPLES, SAMPLED = 8, 100  # for pass@8: answers to so many questions
LONGEST = 12  # tokens of an answer
TASKS = "sums times before smallest digits last capitals json words problems choices".split()  # the first is in domain
HELD_OUT = "sums times before smallest digits last capitals json".split()
KL_QUESTIONS = 60
PLAIN = "--alpha 0 --drop 0"  # nothing is dropped and nothing pulled back: each round starts from the SFT


@dataclass(frozen=True)
class Arm:
    """A way to train from the base: options of the loop and of training, and a name."""

    label: str
    loop: str = PLAIN
    sft: str = ""
    own_start: bool = True  # its first training is not that of STaR
    every_round: bool = False  # also score the models of earlier rounds, on the held-out questions


def named(folder: str, names: list[str]) -> str:
    """Name files of questions, as score.py takes them."""
    return " ".join(f"{name}={folder}/{name}.jsonl" for name in names)


BEST = f"--keep-best {named('../questions/held-out', HELD_OUT)} --longest-answer {LONGEST}"
ARMS = {
    "star": Arm("STaR", every_round=True),
    "imm": Arm("IMM, alpha .5, drop .2", "--alpha 0.5 --drop 0.2", own_start=False, every_round=True),
    "no-drop": Arm("IMM, alpha .5, drop 0", "--alpha 0.5 --drop 0", own_start=False),
    "chosen": Arm(
        "IMM, alpha by held-out score",
        "--alpha choose:0.2,0.4,0.6,0.8 --drop 0.2 --metric mean.both",
        own_start=False,
    ),
    "importance": Arm(
        "IIMM, by layer importance", "--alpha 0.5 --drop 0.2 --importance importance-answers.json", own_start=False
    ),
    "low-lr": Arm("STaR, lr / 5", sft=f"--lr {LR / 5:g}"),
    "half-lr": Arm("STaR, lr / 2", sft=f"--lr {LR / 2:g}"),  # added after the first results
    "pull": Arm("STaR, pulled to each round's start", sft="--pull"),
    "best": Arm("STaR, stopped by held-out score", sft=BEST),
    "mixture": Arm("STaR, a quarter of ordinary text", sft="--text ../mix.txt"),
    "from-base": Arm("STaR, each round from the base", sft="--model ../base", own_start=False),
}


def script(name: str, arguments: str) -> str:
    """Make a command that runs a script of this folder."""
    return f"{shlex.quote(sys.executable)} {HERE / name} {arguments}"


def loop_command(name: str, arm: Arm, seed: int) -> list[str]:
    """Make the command of an arm, to be run in the folder of its seed."""
    chosen = f"--seed {1000 * seed + 1}{{round}}"
    answer = f"--questions train.jsonl --limit {POOL} --longest {LONGEST // 2} --batch 128"
    generate = script("generate.py", f"--model {{model}} --output {{output}} {answer} {chosen}")
    rate = "" if "--lr" in arm.sft else f"--lr {LR:g} "
    steps = f"--epochs {EPOCHS} --batch {BATCH} --accumulation 1 {rate}{arm.sft}"
    train = script("finetune.py", f"--model {{model}} --data {{data}} --output {{output}} {chosen} {steps}".strip())
    if name != "star":
        generate = f"if [ {{round}} = 0 ]; then cp star/round-0/data {{output}}; else {generate}; fi"
    if not arm.own_start:
        train = f"if [ {{round}} = 0 ]; then cp -r star/round-0/sft {{output}}; else {train}; fi"
    command = ["imm-loop", "../base", "-o", name, "--rounds", str(ROUNDS), "--seed", str(seed), *arm.loop.split()]
    command += ["--dtype", "float32", "--generate", generate, "--train", train]
    if "--metric" in arm.loop:
        files = named("../questions/held-out", HELD_OUT)
        scores = f"--model {{model}} --json {{json}} --questions {files} --inside sums --longest {LONGEST} --batch 128"
        command += ["--evaluate", script("score.py", scores)]
    return command


def score(model: str, place: str, options: str, folder: Path) -> None:
    """Score a model on questions, of which `sums` are in domain."""
    shared = f"--model {model} --json {place} --inside sums --longest {LONGEST} --batch 128"
    run(shlex.split(script("score.py", f"{shared} {options}")), folder)


def held_out(model: str, place: str, folder: Path) -> dict[str, Any]:
    """Score a model on the held-out questions, unless that was done."""
    if not (folder / place).exists():
        score(model, place, f"--questions {named('../questions/held-out', HELD_OUT)}", folder)
    result: dict[str, Any] = json.loads((folder / place).read_text())
    return result


def final(model: str, place: str, folder: Path, shared: str = "..") -> dict[str, Any]:
    """Test a model on everything, unless that was done; what all share lies in `shared`."""
    path = folder / place
    if not path.exists():
        files = f"{named(f'{shared}/questions', TASKS)} text={shared}/questions/text.txt"
        sampled = f"--samples {SAMPLES} --sampled sums --sampled-limit {SAMPLED}"
        if not path.with_name(f"{path.name}.part").exists():
            score(model, f"{place}.part", f"--questions {files} --base {shared}/base {sampled}", folder)
        compared = ["imm-analyze", "kl", f"{shared}/base", model, "--data", f"{shared}/kl.jsonl"]
        run([*compared, "--add-to", f"{place}.part"], folder)
        path.with_name(f"{path.name}.part").rename(path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def prepare(arguments: argparse.Namespace) -> None:
    """Write what all seeds share: the base, the questions, texts, and the base's own answers."""
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "base").exists():
        (output / "base").symlink_to(arguments.base.resolve())
    if not (output / "mix.txt").exists():
        files = f"--word-problems {arguments.word_problems.resolve()} --text {arguments.text.resolve()}"
        run(shlex.split(script("tasks.py", f"--output questions {files}")), output)
        shutil.copy(arguments.mix, output / "mix.txt")
    if not (output / "kl.jsonl").exists():
        answer = f"--questions questions/sums.jsonl --limit {KL_QUESTIONS} --longest {LONGEST} --all-at 1"
        run(shlex.split(script("generate.py", f"--model base --output answers.jsonl {answer} --seed 0")), output)
        # As in the tests: after the examples, and up to the end of the answer.
        lines = (output / "questions" / "sums.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [row for row in map(json.loads, lines) if row.get("example")]
        before = "".join(f"Q: {each['question']}\nA: {each['answer']}\n" for each in examples)
        rows = [json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{"prompt": before + row["prompt"], "completion": row["completion"].rstrip("\n")} for row in rows]
        (output / "kl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def prepare_seed(folder: Path, seed: int) -> None:
    """Write a seed's training questions: the examples, and the pool in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (folder.parent / "questions" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    examples = [line for line in lines if '"example"' in line]
    rest = [line for line in lines if '"example"' not in line]
    random.Random(seed).shuffle(rest)
    (folder / "train.jsonl").write_text("".join([*examples, *rest[:POOL]]), encoding="utf-8")


ORDINARY = ("right-answers", "text")  # what the controls of the diagnosis were trained on, for as many steps as a round


def diagnosis(folder: Path, seed: int) -> dict[str, Any]:
    """Compare where weights changed with where they matter: after self-improvement, and after ordinary fine-tuning.

    The controls are one round's training from the base, on the right answers to all questions of the pool as their
    authors wrote them, and on ordinary text. Importance is measured on the base's own right answers and on text.
    """
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if not line.get("example")]
    rows = {"right-answers": [(f"Q: {each['question']}\nA:", f" {each['answer']}\n") for each in asked]}
    pieces = textwrap.wrap((folder.parent / "mix.txt").read_text(encoding="utf-8"), 200)
    rows["text"] = [("", piece) for piece in random.Random(seed).sample(pieces, len(asked))]
    importances = {}
    for name in ORDINARY:
        data, model = folder / f"{name}.jsonl", f"ordinary-{name}"
        written = [{"prompt": prompt, "completion": completion} for prompt, completion in rows[name]]
        data.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
        if not (folder / model / "config.json").exists():
            steps = f"--epochs {EPOCHS} --batch {BATCH} --accumulation 1 --lr {LR:g} --seed {seed}"
            run(
                shlex.split(script("finetune.py", f"--model ../base --data {data.name} --output {model} {steps}")),
                folder,
            )
    texts = folder / "text-importance.jsonl"
    texts.write_text("".join(json.dumps({"text": piece}) + "\n" for _, piece in rows["text"]), encoding="utf-8")
    models = ["star/round-0/sft", f"star/round-{ROUNDS - 1}/merged", *(f"ordinary-{name}" for name in ORDINARY)]
    changes: dict[str, Any] = {}
    for name, source in (("answers", "star/round-0/data"), ("text", texts.name)):
        file = f"importance-{name}.json"
        if not (folder / file).exists():
            run(["imm-analyze", "importance", "../base", "--data", source, "-o", file], folder)
        importances[name] = json.loads((folder / file).read_text())["layers"]
        run(["imm-analyze", "change", "../base", *models, "--importance", file, "-o", f"change-{name}"], folder)
        found = json.loads((folder / f"change-{name}" / "change.json").read_text())["changes"]
        changes[name] = {each["model"]: {key: each[key] for key in ("layers", "mismatch")} for each in found}
    return {"importance": importances, "change": changes}


def keep(path: Path, found: dict[str, Any]) -> None:
    """Add results to those in a file, where other processes put theirs."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    results["arms"] |= found.pop("arms", {})
    path.with_suffix(".part").write_text(json.dumps(results | found, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def run_seed(seed: int, names: list[str], folder: Path) -> None:
    """Run arms of a seed, and write its results after each."""
    prepare_seed(folder, seed)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] seed {seed}: {text}", flush=True)

    path = folder / "results.json"
    for name in names:
        arm = ARMS[name]
        say(arm.label)
        if name == "importance" and not (folder / "importance-answers.json").exists():
            data = ["--data", "star/round-0/data", "-o", "importance-answers.json"]
            run(["imm-analyze", "importance", "../base", *data], folder)
        if not (folder / name / f"round-{ROUNDS - 1}" / "test.json").exists():
            run(loop_command(name, arm, seed), folder)
        state = json.loads((folder / name / "loop.json").read_text())
        found = {"alphas": state["alphas"], "stopped": state["stopped"], "held-out": state["metrics"], "rounds": {}}
        for number in range(ROUNDS if arm.every_round else 0):
            here = f"{name}/round-{number}"
            found["rounds"][number] = held_out(f"{here}/merged", f"{here}/held-out.json", folder)
        last = f"{name}/round-{ROUNDS - 1}"
        found["test"] = final(f"{last}/merged", f"{last}/test.json", folder)
        say("  in {in:.1f}, out of domain {out:.1f}".format(**found["test"]["mean"]))
        keep(path, {"arms": {name: found}})
        for number in range(ROUNDS):  # what no one needs any more; STaR's first training is that of other arms too
            for model in ("sft", "merged") if number < ROUNDS - 1 else ("sft",):
                if name != "star" or number > 0:
                    shutil.rmtree(folder / name / f"round-{number}" / model, ignore_errors=True)
    if "star" in names and "diagnosis" not in json.loads(path.read_text()):
        say("where weights changed")
        keep(path, {"diagnosis": diagnosis(folder, seed)})


def collect(output: Path) -> Path:
    """Write the results of all seeds that are there into one file."""
    paths = sorted(output.glob("seed-*/results.json"), key=lambda path: int(path.parent.name[5:]))
    seeds = {path.parent.name[5:]: json.loads(path.read_text()) for path in paths}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("mergekit-imm", "torch", "transformers", "trl")},
        "rounds": ROUNDS,
        "questions": POOL,
        "training": {"epochs": EPOCHS, "batch": BATCH, "learning rate": LR},
        "arms": {name: {"label": arm.label, "options": f"{arm.loop} {arm.sft}".strip()} for name, arm in ARMS.items()},
        "base": final("base", "base.json", output, "."),
        "seeds": seeds,
    }
    path = output / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base, as base_model.py makes it")
    parser.add_argument("--word-problems", type=Path, required=True, help="folder with both files of tasks.py")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--mix", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("real-model"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="none: only prepare")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    prepare(arguments)
    for seed in arguments.seeds:
        run_seed(seed, arguments.arms, arguments.output / f"seed-{seed}")
        print(f"all numbers so far: {collect(arguments.output)}")


if __name__ == "__main__":
    main()
