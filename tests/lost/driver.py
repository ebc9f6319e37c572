"""Cut merges off again and again, in forks of a process that has loaded everything once.

    python -m lost.driver FOLDER SCENARIO WHAT [--every N] [--first N] [--seeds N]

WHAT is `calls` (kill before every N-th call that changes a file) or `power` (the power fails there, and the disk loses
any part of what was not synced). Prints JSON: how many were tried, and what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergekit_imm import __main__, merge_checkpoints
from mergekit_imm.cli import main as main  # here, and not in each fork
from mergekit_imm.cli import merge as merge_command  # noqa: F401
from mergekit_imm.engine import stream
from mergekit_imm.errors import MergeError
from mergekit_imm.output import direct_io
from mergekit_imm.output import publish as swap

from . import power
from .tracing import Call, traced

SHAPES = {f"model.layers.{i}.w{j}": (40, 96 + 32 * j) for i in range(3) for j in range(3)}
SIDE = {"tokenizer.json": '{"a": 1}\n', "templates/chat.jinja": "{{ x }}"}
WINDOW = 1 << 14  # bytes between records of the journal: small, to have several

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """Return every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_pair(folder: Path) -> None:
    """Write base (two files) and sft (one file)."""
    for seed, role in enumerate(("base", "sft")):
        draw = np.random.default_rng(seed)
        state: dict[str, Any] = {n: draw.normal(0, 0.02, shape).astype(np.float16) for n, shape in SHAPES.items()}
        state["steps"] = np.arange(3)
        (folder / role / "templates").mkdir(parents=True)
        for path, content in SIDE.items():
            (folder / role / path).write_text(content)
        if role == "sft":
            save_file(state, folder / role / "model.safetensors")
            continue
        weight_map: dict[str, str] = {}
        for number in (1, 2):
            file = f"model-{number:05}-of-00002.safetensors"
            part = {name: tensor for place, (name, tensor) in enumerate(state.items()) if place % 2 == number - 1}
            save_file(part, folder / role / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / role / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@dataclass(frozen=True)
class Scenario:
    """A merge to cut off: its initial state, options, and expected outputs."""

    options: tuple[str, ...] = ()
    old: bool = False  # OUT holds another merge
    stale: str = ""  # OUT.partial is an unfinished merge with this alpha, plus a user's files
    status: int = 0
    outs: tuple[str, ...] = ("out",)
    patches: Mapping[str, Any] = field(default_factory=dict)  # of `swap`


SCENARIOS = {
    "plain": Scenario(),
    "overwrite": Scenario(("--overwrite",), old=True),
    "no-exchange": Scenario(("--overwrite",), old=True, patches={"_exchange": lambda *_: False}),
    "restart": Scenario(("--restart",), stale="0.7"),
    "resume": Scenario(stale="0.5"),
    "verify": Scenario(("--verify",)),
    "refused": Scenario(status=1, outs=()),
    "sweep": Scenario(("--alpha", "0.3,0.5"), outs=("out-0.3", "out-0.5")),
}


class Bench:
    """Fresh copies of an initial state, and the expected outputs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.scenario = folder, SCENARIOS[name]
        self.may_start_over = name in ("restart", "refused")  # they empty OUT.partial
        self.start, self.case = folder / "start", folder / "case"
        out = "out" if name != "sweep" else "out-{alpha}"
        self.arguments = ["base", "sft", "-o", out, "--workers", "1", *self.scenario.options]
        write_pair(self.start)
        os.chdir(self.start)
        for each, alpha in zip(self.scenario.outs, (0.3, 0.5) if name == "sweep" else (0.5,), strict=False):
            merge_checkpoints("base", "sft", folder / "whole" / each, alpha=alpha)
        self.whole = {each: files_of(folder / "whole" / each) for each in self.scenario.outs}
        self.old: Files = {}
        if self.scenario.old:
            merge_checkpoints("base", "sft", "out", alpha=0.25)
            (self.start / "out" / "notes.txt").write_text("mine")
            self.old = files_of(self.start / "out")
        if name == "refused":
            _spoil(self.start / "sft" / "model.safetensors")
            with suppress(MergeError):  # compiles the search for the value
                merge_checkpoints("base", "sft", folder / "refused")
        self.inputs = {role: files_of(self.start / role) for role in ("base", "sft")}
        for patched, value in self.scenario.patches.items():
            setattr(swap, patched, value)
        stream.SYNC_BYTES = WINDOW
        if self.scenario.stale:
            unfinished = self.start / "out.partial"
            given = ["base", "sft", "-o", "out", "--workers", "1", "--alpha", self.scenario.stale]
            traced(lambda: self.run(*given), self.start, stop_at=30)
            assert (unfinished / ".imm_journal").exists()
            # Leftovers of an interrupted copy, and things nobody should put there.
            (unfinished / "vocab.txt").write_text("the beginn")
            (unfinished / "templates").mkdir()
            (unfinished / "templates" / "old.jinja").write_text("x")
            (unfinished / "tokenizer.json").symlink_to("../base/tokenizer.json")

    def run(self, *arguments: str) -> None:
        """Run the command in this process, a fork that ends with it."""
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["imm-merge", *(arguments or self.arguments)]
        __main__.imm_merge()

    def again(self) -> str:
        """Run the same command to its end; return what is wrong with the result."""
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                self.run()
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output = (self.folder / "log").read_text().strip()
        if status != self.scenario.status or "Traceback" in output:
            return f"the second run ended with {status}: {output[-300:]}"
        if "starting over" in output and not self.may_start_over:
            return "the second run started over: what was recorded is lost"
        names = {path.name for path in self.case.iterdir()}
        if names != {"base", "sft", *self.scenario.outs}:
            return f"the second run left {sorted(names)}"
        wrong = [each for each, files in self.whole.items() if files_of(self.case / each) != files]
        return f"{wrong[0]} differs from an undisturbed merge" if wrong else self.inputs_changed()

    def inputs_changed(self) -> str:
        """Return which input has changed."""
        wrong = [role for role, files in self.inputs.items() if files_of(self.case / role) != files]
        return f"{wrong[0]} was changed" if wrong else ""

    def after_the_end(self) -> str:
        """Return what is wrong with the folders right after the cut."""
        for each in self.scenario.outs or ("out",):
            path = self.case / each
            found = files_of(path) if path.exists() else None
            old = files_of(self.case / "out.old") if (self.case / "out.old").exists() else None
            if found is None and (not self.scenario.old or old == self.old):
                continue
            if found is None or (found != self.whole.get(each) and found != (self.old or None)):
                return f"{each} is neither absent nor the old nor the new one: {sorted(found or ())}"
        return self.inputs_changed()

    def not_there(self) -> str:
        """Return what a merge that ended with status 0 lost."""
        wrong = [each for each, files in self.whole.items() if files_of(self.case / each) != files]
        return f"it ended well, and {wrong[0]} is lost" if wrong else ""

    def prepared(self) -> Path:
        """Make a fresh copy of the initial state the current folder."""
        os.chdir(self.folder)
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.start, self.case)
        os.chdir(self.case)
        return self.case


def _spoil(path: Path) -> None:
    """Make the last value of a file of float16 infinite, so that the merge finds it late."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = 8 + length + max(e["data_offsets"][1] for n, e in header.items() if e["dtype"] == "F16")
    content[end - 2 : end] = b"\x00\x7c"
    path.write_bytes(content)


def _end_of(calls: Sequence[Call]) -> int:
    """Index of a call shortly before the first that publishes or removes a folder."""
    ends = [number for number, call in enumerate(calls) if call.kind == "remove" and call.name == ".imm_journal"]
    return max(0, (ends or [len(calls)])[-1] - 8)


def _chosen(count: int, end: int, every: int, first: int) -> list[int]:
    """Every n-th call, and every call from `end` on."""
    return sorted({*range(first % every, count, every), *range(end, count)})


def kill_at_calls(bench: Bench, every: int, first: int, _: int = 1) -> dict[str, Any]:
    """Kill the command before its n-th call and run it again; then the same with a second kill midway."""
    bench.prepared()
    status, calls = traced(bench.run, bench.case)
    assert status == bench.scenario.status, (bench.folder / "log").read_text()
    failures, tried = [], 0
    for number in _chosen(len(calls), _end_of(calls), every, first):
        for twice in (False, True):
            killed = _kill(bench, number)
            where = f"killed before call {killed} of {len(calls)} ({calls[killed]} in the first run)"
            if twice:
                second = random.Random(number).randrange(len(calls))
                where += f", and again before call {second} of the second run"
                traced(bench.run, bench.case, stop_at=second)
            wrong = bench.after_the_end() or bench.again()
            tried += 1
            if wrong:
                failures.append(f"{where}: {wrong}")
    return {"calls": len(calls), "tried": tried, "failures": failures}


def _kill(bench: Bench, number: int) -> int:
    """Kill the command before its n-th call, and return n.

    Before an earlier one if it made fewer this time: how many depends on what a sync finds in memory, and so on timing.
    """
    for n in range(number, -1, -1):
        bench.prepared()
        if traced(bench.run, bench.case, stop_at=n)[0] is None:
            return n
    raise AssertionError("the command ends before its first call")


def fail_power(bench: Bench, every: int, first: int, seeds: int = 1) -> dict[str, Any]:
    """Fail the power after every n-th call, and run the command again on what the disk may hold."""
    bench.prepared()
    nodes: power.Nodes = {}
    root = power.read(bench.case, nodes)
    status, calls = traced(bench.run, bench.case)
    assert status == bench.scenario.status, (bench.folder / "log").read_text()
    failures, tried, unsynced = [], 0, 0
    last = _end_of(calls)
    for end in _chosen(len(calls) + 1, last, every, first):
        certain = power.durable(calls, end)
        unsynced = max(unsynced, certain.count(False))
        draws = seeds if end >= last else 1  # there little is pending: try nearly every part of it
        for kind, kept in (each for seed in range(draws) for each in power.choices(certain, 1000 * seed + end)):
            left = power.after(nodes, calls[:end], kept)
            os.chdir(bench.folder)
            shutil.rmtree(bench.case, ignore_errors=True)
            inodes = power.write(left, root, bench.case)
            for marker in bench.case.rglob("*.replacing"):  # it records an inode, and those of the copy differ
                with suppress(ValueError):  # lost or torn
                    about = json.loads(marker.read_bytes())
                    marker.write_text(json.dumps(about | {"inode": inodes.get(about["inode"], 0)}) + "\n")
            os.chdir(bench.case)
            wrong = bench.after_the_end()
            if end == len(calls) and not wrong:
                wrong = bench.not_there()
            wrong = wrong or bench.again()
            tried += 1
            if wrong:
                call = f" ({calls[end - 1]})" if end else ""
                failures.append(f"power fails after call {end} of {len(calls)}{call}, {kind} is kept: {wrong}")
    return {"calls": len(calls), "tried": tried, "most_unsynced": unsynced, "failures": failures}


WHAT: dict[str, Callable[[Bench, int, int, int], dict[str, Any]]] = {"calls": kill_at_calls, "power": fail_power}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="draws of what is lost, at calls that publish folders")
    parser.add_argument("--without-sync", action="store_true", help="skip all syncs; the test must fail")
    given = parser.parse_args()
    if given.without_sync:
        for name in ("sync", "sync_folder"):
            setattr(direct_io, name, lambda _: None)
        os.fsync = lambda _: None  # type: ignore[assignment]
    bench = Bench(given.folder.resolve(), given.scenario)
    print(json.dumps(WHAT[given.what](bench, given.every, given.first, given.seeds)))
