"""Measure a merge against the I/O floor and against other tools: `make bench`.

    python benchmarks/run.py --sizes qwen2.5-0.5b,qwen2.5-1.5b --runs 3 --peer-sizes qwen2.5-0.5b

Makes the models in a temporary folder of the current one (four times the largest model on disk), runs every contender
once in every round, and writes benchmarks/results/DATE-CPU.json. Removes what it made.

imm-merge and the floor run with their inputs in the page cache (warm) and not (cold); a pair that does not fit into
memory is only measured cold. Peers run once a round, as warm as can be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import forms
import in_memory
import plans
import startup
from contenders import ALPHA, DROP, HERE, OURS, PEERS, Job, command, make_models, run, why_not
from goals import goals
from measure import FailedError, cpu_name, evict, git_version, machine, measured, memory, versions, warm
from pair import SIZES, parameter_count

PARTS = ("startup", "plans", "kernel", "forms", "live", "sizes")
Runs = dict[str, dict[str, list[dict[str, float]]]]  # contender, warm or cold, round


def say(text: str) -> None:
    """Show progress at once."""
    print(text, file=sys.stderr, flush=True)


def summary(runs: Runs) -> dict[str, Any]:
    """Median, least, largest and number of every measure."""
    return {
        contender: {
            cache: {
                key: {
                    "median": round(statistics.median(values), 4),
                    "min": min(values),
                    "max": max(values),
                    "n": len(values),
                }
                for key in each[0]
                for values in [[run[key] for run in each]]
            }
            for cache, each in caches.items()
        }
        for contender, caches in runs.items()
    }


def measure_size(size: str, root: Path, peers: Sequence[str], workers: int, arguments: argparse.Namespace) -> Any:
    """Measure all contenders on one size, in rounds."""
    model = 2 * parameter_count(size)
    skipped: dict[str, str] = {}
    free = shutil.disk_usage(root).free
    if free < 3.1 * model:
        say(f"{size}: skipped, needs {3.1 * model / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
        return None
    start = free >= 4.1 * model
    if not start:
        skipped["imm-merge --start"] = f"would need {4.1 * model / 1e9:.0f} GB of disk"
    folder = root / size
    say(f"{size}: making the models")
    make_models(size, folder, start=start)
    job = Job(size, folder, workers, arguments.peers_python)
    fits = 3 * model < 0.8 * memory()["MemTotal"]
    states = ("warm", "cold") if fits else ("cold",)
    turns = [(each, state) for state in states for each in OURS if each != "imm-merge --start"]
    turns += [(each, states[0]) for each in (*(["imm-merge --start"] if start else []), *peers)]
    for peer in peers:
        reason = why_not(peer, size)
        if reason:
            skipped[peer] = reason
            say(f"{size}: {peer} skipped: {reason}")
    runs: Runs = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.runs):
        # To and fro: what runs before a contender, and leaves the machine in its state, changes.
        for contender, state in turns if number % 2 == 0 else reversed(turns):
            if contender in skipped:
                continue
            files = job.inputs(contender)
            os.sync()  # nobody waits for what another has left to write
            evict(files) if state == "cold" else warm(files)
            try:
                took = run(contender, job)
            except FailedError as error:
                skipped[contender] = re.sub(r"(?<!\S)/\S+/", ".../", f"failed: {error}")
                say(f"{size}: {contender} {skipped[contender]}")
                continue
            finally:
                shutil.rmtree(job.out, ignore_errors=True)
                shutil.rmtree(f"{job.out}.partial", ignore_errors=True)
            runs[contender][state].append(took)
            stream = f", streaming {took['stream']:.2f} s" if "stream" in took else ""
            say(
                f"{size}: round {number + 1} of {arguments.runs}, {contender} ({state}): {took['wall']:.2f} s{stream},"
                f" {took['peak'] / 1e6:.0f} MB"
            )
    shutil.rmtree(folder)
    return {
        "parameters": parameter_count(size),
        "bytes_of_a_model": model,
        "fits_in_memory": fits,
        "skipped": skipped,
        "summary": summary(runs),
        "runs": runs,
    }


def warm_up(root: Path) -> int:
    """Merge tiny models, two and three, so that the kernels are compiled and cached; return a merge's workers.

    Compiling takes twice the memory of a merge: it would be measured in place of the first model with a start.
    """
    job = Job("tiny", root / "warm-up", 0, Path())
    make_models(job.size, job.folder, start=True)
    for contender in ("imm-merge", "imm-merge --start"):
        _, printed = measured(command(contender, job))
        shutil.rmtree(job.out)
    return int(json.loads(printed)["workers"])


def file_name(today: date) -> str:
    """Name of the result file: date and processor."""
    words = re.sub(r"\b(processor|cpu|\d+-core)\b", "", cpu_name().lower())
    return f"{today:%Y-%m-%d}-{'-'.join(re.findall('[a-z0-9]+', words))}.json"


def measure_all(arguments: argparse.Namespace, root: Path, path: Path) -> dict[str, Any]:
    """Measure what was asked for; the result file is written after every part."""
    peers = [name for name in arguments.peers if name in PEERS]
    results: dict[str, Any] = {
        "format": "mergekit_imm benchmark",
        "version": 1,
        "date": f"{date.today():%Y-%m-%d}",
        "machine": machine(root),
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "git": git_version(HERE),
            **versions(sys.executable, ["mergekit-imm", "numba", "llvmlite", "numpy"]),
        },
        "peer_versions": {},
        "settings": {"alpha": ALPHA, "drop": DROP, "workers": warm_up(root)},
        "sizes": {},
    }
    if peers and arguments.peer_sizes:
        packages = ["mergekit", "sd-mecha", "torch", "transformers", "safetensors"]
        results["peer_versions"] = versions(arguments.peers_python, packages)
    if arguments.add and path.exists():
        before = json.loads(path.read_text())
        if before["versions"] != results["versions"]:
            raise SystemExit(f"error: {path.name} was measured with other versions; run without --add")
        results = {**before, **results, "sizes": before["sizes"]}
        results["peer_versions"] = results["peer_versions"] or before["peer_versions"]
    if "startup" in arguments.parts:
        say("help, dry run, first merge")
        results["startup"] = startup.measure(root / "startup", 5)
    if "plans" in arguments.parts:
        say(f"a model of {plans.NUMBER} tensors")
        results["plans"] = plans.measure(root / "plans")
    if "kernel" in arguments.parts:
        say("kernel")
        results["kernel"] = kernel_times({})
        if "AVX-512" in results["machine"]["vector"]:  # many machines have no more than AVX2
            older = kernel_times(AVX2, "--only", "bf16", "--only", "f16")
            results["kernel"] |= {f"{name}, AVX2 alone": it for name, it in older.items()}
    if "forms" in arguments.parts:
        say("other forms of input, and sparsifiers")
        results["forms"] = forms.against_plain(forms.measure(forms.SIZE, root / "forms", arguments.runs))
        shutil.rmtree(root / "forms")
    if "live" in arguments.parts:
        say("models in memory")
        results["live"] = in_memory.measure(in_memory.SIZE, root / "live", arguments.runs)
        shutil.rmtree(root / "live")
    for size in arguments.sizes if "sizes" in arguments.parts else []:
        here = peers if size in arguments.peer_sizes else []
        measured_size = measure_size(size, root, here, results["settings"]["workers"], arguments)
        if measured_size:
            found = {**results["sizes"], size: measured_size}
            results["sizes"] = {each: found[each] for each in SIZES if each in found}
        write(results, path)
    write(results, path)
    return results


AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+f16c"}


def kernel_times(environment: Mapping[str, str], *options: str) -> dict[str, Any]:
    """Run kernel.py; return the times of each case."""
    command = [sys.executable, str(HERE / "kernel.py"), "--json", "--seconds", "2", *options]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def write(results: dict[str, Any], path: Path) -> None:
    """Write the result file, with what the results say about the goals."""
    results["goals"] = goals(results)
    path.write_text(json.dumps(results, indent=1) + "\n")


def show(results: Mapping[str, Any]) -> None:
    """Print the medians."""
    for size, entry in results["sizes"].items():
        for contender, caches in entry["summary"].items():
            for cache, it in caches.items():
                wall = it["wall"]
                spread = f"({wall['min']:.2f}-{wall['max']:.2f}, n={wall['n']})"
                peak = it["peak"]["median"] / 1e6
                print(f"{size:<14}{contender:<18}{cache:<6}{wall['median']:8.2f} s {spread:<24}{peak:8.0f} MB")
    for goal in results["goals"]:
        verdict = {True: "met", False: "NOT met", None: "-"}[goal["met"]]
        print(
            f"{verdict:<8}{goal['goal']} [{goal['where']}]: {goal['value']:g} {goal['unit']}"
            + (f" (asked: {goal['asked']})" if goal["asked"] else "")
        )


def names(text: str) -> list[str]:
    """Split a list of names at commas or blanks."""
    return [name for name in re.split(r"[,\s]+", text) if name]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=names, default=["qwen2.5-0.5b"], help=f"of {', '.join(SIZES)}")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--peer-sizes", type=names, help="sizes that peers merge too (default: all)")
    parser.add_argument("--peers-python", type=Path, default=HERE.parent / ".venv-peers" / "bin" / "python")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--add", action="store_true", help="to what today's result file holds, keep the rest of it")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    arguments = parser.parse_args()
    if arguments.peer_sizes is None:
        arguments.peer_sizes = arguments.sizes
    for given, known in (
        (arguments.sizes + arguments.peer_sizes, SIZES),
        (arguments.peers, PEERS),
        (arguments.parts, PARTS),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    arguments.peers_python = arguments.peers_python.absolute()
    if arguments.peers and arguments.peer_sizes and not arguments.peers_python.exists():
        parser.error("there is no environment of the peers: `make .venv-peers/ready` makes it, or give --peers ''")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / file_name(date.today())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes then, too
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        results = measure_all(arguments, Path(folder).absolute(), path)
    show(results)
    say(f"written: {path.name}")


if __name__ == "__main__":
    main()
