"""Run the whole experiment: for each seed a base, and from it every arm by `imm-loop`; or only the quick part of it.

    python experiment.py --quick                    one seed, IMM against STaR
    python experiment.py --seeds 0 1 2 3            everything

What is done is not done again: run the same command again to resume. Seeds may run at the same time. The
results of all seeds that are there are collected in OUTPUT/results.json.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from warm import serving

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from experiments import machine, run  # noqa: E402

ROUNDS, POOL, SAMPLES = 3, 600, 8
QUESTIONS = "--questions 400 100"  # to test with: in domain, and of each other skill


@dataclass(frozen=True)
class Arm:
    """A way to train from the base: options of the loop and of training, the number of questions, and a name."""

    label: str
    loop: str = "--alpha 0.5 --drop 0.2"
    sft: str = ""
    questions: int = POOL
    accumulate: bool = False  # train on the right answers of all rounds so far
    evaluate: str = ""  # parts of the questions to score in each round; the last model of every arm is tested anyhow
    own_start: bool = False  # its first round is not that of the arm imm, which all others share


PLAIN = "--alpha 0 --drop 0"  # nothing is dropped and nothing pulled back: each round starts from the SFT
ARMS = {
    "imm": Arm("IMM, alpha .5, drop .2", "--alpha 0.5 --drop 0.2 --baseline", evaluate="test", own_start=True),
    "low-lr": Arm("STaR, lr / 5", PLAIN, "--lr 1e-4", own_start=True),
    "early-stop": Arm("STaR, steps / 5", PLAIN, "--steps 20", own_start=True),
    "held-out": Arm(
        "IMM, alpha by held-out score",
        "--alpha 0.2 --drop 0.2 --gate held-out --retry 0.4,0.6,0.8",
        evaluate="held-out",
    ),
    "stopped": Arm(
        "STaR, lr / 5, stopped by held-out score",
        f"{PLAIN} --gate held-out",
        "--lr 1e-4",
        evaluate="held-out",
        own_start=True,
    ),
    "previous": Arm("IMM, anchor previous", "--alpha 0.5 --drop 0.2 --anchor previous"),
    "ema": Arm("IMM, anchor ema:0.5", "--alpha 0.5 --drop 0.2 --anchor ema:0.5"),
    "rising": Arm("IMM, alpha .3 to .7", "--alpha linear:0.3,0.7 --drop 0.2"),
    "importance": Arm("IIMM, by layer importance", "--alpha 0.5 --drop 0.2 --importance importance.json"),
    "drop-0.9": Arm("IMM, drop .9", "--alpha 0.5 --drop 0.9"),
    "accumulation": Arm("STaR, data of all rounds", PLAIN, accumulate=True),
    "mixture": Arm("STaR, a quarter of old data", PLAIN, "--mixture 0.25", own_start=True),
    "imm-250": Arm("IMM, alpha .5, drop .2", "--alpha 0.5 --drop 0.2 --baseline", questions=250, own_start=True),
    "low-lr-250": Arm("STaR, lr / 5", PLAIN, "--lr 1e-4", questions=250, own_start=True),
    "imm-2400": Arm("IMM, alpha .5, drop .2", "--alpha 0.5 --drop 0.2 --baseline", questions=2400, own_start=True),
    "low-lr-2400": Arm("STaR, lr / 5", PLAIN, "--lr 1e-4", questions=2400, own_start=True),
}
STAR = "STaR"  # of an arm with --baseline: the same rounds without merges


def script(name: str, arguments: str) -> str:
    """Make a command that runs a script of this folder, by the process that has its imports loaded."""
    return f"{shlex.quote(sys.executable)} {HERE / 'warm.py'} warm.socket {HERE / name} {arguments}"


def loop_command(name: str, arm: Arm, seed: int) -> list[str]:
    """Make the command of an arm, to be run in the folder of its seed."""
    data = f"{{data}} {name}/round-*/data" if arm.accumulate else "{data}"
    of, chosen = f"--questions {arm.questions}", f"--seed {seed} --round {{round}}"
    generate = script("sample.py", f"--model {{model}} --output {{output}} {of} {chosen}")
    train = script("sft.py", f"--model {{model}} --data {data} --output {{output}} {chosen} {arm.sft}".strip())
    if not arm.own_start:
        generate = f"if [ {{round}} = 0 ]; then cp imm/round-0/data {{output}}; else {generate}; fi"
        train = f"if [ {{round}} = 0 ]; then cp -r imm/round-0/sft {{output}}; else {train}; fi"
    command = ["imm-loop", "base", "-o", name, "--rounds", str(ROUNDS), "--seed", str(seed), *arm.loop.split()]
    command += ["--generate", generate, "--train", train]
    if arm.evaluate:
        scores = script(
            "evaluate.py", f"--model {{model}} --base {{base}} --json {{json}} --part {arm.evaluate} {QUESTIONS}"
        )
        command += ["--evaluate", scores]
    return command


def final(model: str, place: str, folder: Path) -> dict[str, Any]:
    """Test a model at length, with pass@k and each skill, unless that was done."""
    path = folder / place
    if not path.exists():
        arguments = f"--model {model} --base base --json {place}.part --samples {SAMPLES} {QUESTIONS}"
        run(shlex.split(script("evaluate.py", arguments)), folder)
        path.with_name(f"{path.name}.part").rename(path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def run_seed(seed: int, names: list[str], folder: Path, pretrain: str) -> None:
    """Run arms of a seed, and write its results after each."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] seed {seed}: {text}", flush=True)

    with serving(folder / "warm.socket"):
        if not (folder / "base/tokenizer.json").exists():
            say("train the base")
            run(shlex.split(script("pretrain.py", f"--output base --seed {seed} {pretrain}")), folder)
        if not (folder / "importance.json").exists():
            run(shlex.split(script("importance.py", f"--model base --output importance.json --seed {seed}")), folder)
        path = folder / "results.json"
        before = json.loads(path.read_text())["arms"] if path.exists() else {}  # arms that are not asked for now stay
        results: dict[str, Any] = {
            "base": final("base", "final-base.json", folder),
            "importance": json.loads((folder / "importance.json").read_text()),
            "arms": before,
        }
        for name in names:
            arm = ARMS[name]
            say(f"{arm.label}, {arm.questions} questions")
            if not (folder / name / "final.json").exists():
                run(loop_command(name, arm, seed), folder)
            state = json.loads((folder / name / "loop.json").read_text())
            found = {key: state[key] for key in ("metrics", "alphas", "stopped")}
            found["final"] = final(state["model"], f"{name}/final.json", folder)
            if "--baseline" in arm.loop:
                last = f"{name}/baseline/round-{ROUNDS - 1}/sft"
                found["final " + STAR] = final(last, f"{name}/baseline/final.json", folder)
                found["layers"] = json.loads((folder / name / "round-0/imm_report.json").read_text())["layers"]
            results["arms"][name] = found
            say("  in {in:.1f}, out of domain {out:.1f}".format(**found["final"]))
            path.write_text(json.dumps(results, indent=1) + "\n")


def collect(output: Path) -> Path:
    """Write the results of all seeds that are there into one file."""
    paths = sorted(output.glob("seed-*/results.json"), key=lambda path: int(path.parent.name[5:]))
    seeds = {path.parent.name[5:]: json.loads(path.read_text()) for path in paths}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("mergekit-imm", "torch", "transformers")},
        "rounds": ROUNDS,
        "questions": POOL,
        "samples": SAMPLES,
        "arms": {
            name: {"label": arm.label, "questions": arm.questions, "options": f"{arm.loop} {arm.sft}".strip()}
            for name, arm in ARMS.items()
            if any(name in seed["arms"] for seed in seeds.values())
        },
        "seeds": seeds,
    }
    path = output / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("self-improvement"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="only the arm imm, with its comparison without merges")
    parser.add_argument("--pretrain", default="", help="options of pretrain.py, such as '--steps 500'")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        names = ["imm"] if arguments.quick else arguments.arms
        run_seed(seed, names, arguments.output.resolve() / f"seed-{seed}", arguments.pretrain)
        print(f"all numbers so far: {collect(arguments.output)}")


if __name__ == "__main__":
    main()
