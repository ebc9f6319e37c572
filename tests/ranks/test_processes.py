"""Ranks as processes: torchrun, Slurm, by hand; killed and resumed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from checkpoints import files_of
from commands import HUNG
from mergekit_imm import merge_checkpoints
from mergekit_imm.options.options import MergeOptions
from mergekit_imm.output.journal import Journal
from mergekit_imm.plan.make_plan import make_plans
from mergekit_imm.plan.open_inputs import open_inputs
from mergekit_imm.plan.plan import segments
from mergekit_imm.ranks import ledger
from merging_ranks import free_port, merged_by

SLOW = """
import itertools, os, signal, sys, threading, time
from mergekit_imm.cli.main import main
from mergekit_imm.engine import stream
from mergekit_imm.numerics import cpu
stream.SYNC_BYTES, stream.SYNC_SECONDS = 1, 0
merge_span, count, stay = cpu.merge_span, itertools.count(), threading.Event()
def slowly(*arguments):
    time.sleep(0.1)
    merge_span(*arguments)
    if os.environ["RANK"] in os.environ.get("STAY", "") and threading.current_thread() is not threading.main_thread():
        next(count) < 4 or stay.wait(900)
cpu.merge_span = slowly
rank, moment = os.environ.get("KILL", ":").split(":")
if rank == os.environ["RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    begin = stream._write_share
    def doomed(*arguments, **options):
        threading.Timer(float(moment), os.kill, (os.getpid(), signal.SIGKILL)).start()
        begin(*arguments, **options)
        stay.wait(900)
    stream._write_share = doomed
main()
"""
MERGE = ["merge", "base", "sft", "--drop", "0.9", "-o", "out"]


def torchrun(size: int, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    with TemporaryDirectory() as logs:  # torchrun does not remove them
        return subprocess.run(
            [*command, *arguments],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": logs} | environment,
            capture_output=True,
            text=True,
            timeout=HUNG,
        )


def by_hand(
    size: int,
    *arguments: str,
    folders: Mapping[int, Path] | None = None,
    code: str | None = None,
    **environment: str,
) -> list[subprocess.Popen[str]]:
    """Start ranks with torchrun's variables but without a supervisor."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = ["-m", "mergekit_imm"] if code is None else ["-c", code]
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, "--ranks", "torchrun"],
            cwd=(folders or {}).get(rank),
            env=os.environ | common | environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=HUNG) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, outputs, strict=True)]


def test_torchrun(pair: Path, case: Path) -> None:
    """The plain command."""
    ended = torchrun(2, "-m", "mergekit_imm", *MERGE, "--json", cwd=case)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"status": "merged"') == 1
    assert "error" not in ended.stderr
    assert files_of(case / "out") == files_of(pair / "one")
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]


def test_torchrun_and_an_option_that_torchrun_takes_for_its_own(pair: Path, case: Path) -> None:
    """torchrun takes --start for an abbreviated --start-method; a -- before it helps."""
    later = [*MERGE, "--start", "one", "--alpha", "0.25"]
    (case / "one").symlink_to(pair / "one")
    refused = torchrun(2, "-m", "mergekit_imm", *later, cwd=case)
    assert (refused.returncode, (case / "out").exists()) == (2, False)
    assert "ambiguous option: --start could match --start-method" in refused.stderr
    ended = torchrun(2, "-m", "mergekit_imm", "--", *later, "--json", cwd=case)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"status": "merged"') == 1
    merge_checkpoints("base", "sft", "alone", start="one", drop=0.9, alpha=0.25)
    assert files_of(case / "out") == files_of(case / "alone")
    assert sorted(path.name for path in case.iterdir()) == ["alone", "base", "one", "out", "sft"]


def test_torchrun_finishes_what_a_dead_rank_left(pair: Path, case: Path) -> None:
    """Three ranks; one is killed at a random moment."""
    (case / "slow.py").write_text(SLOW)
    victim, moment = random.randrange(3), random.uniform(0, 0.5)
    ended = torchrun(
        3,
        "--max-restarts",
        "2",
        "--monitor-interval",
        "0.1",
        "slow.py",
        *MERGE,
        "--ranks",
        "torchrun",
        cwd=case,
        KILL=f"{victim}:{moment}",
    )
    assert ended.returncode == 0, ended.stderr
    assert f"failed (exitcode: -9) local_rank: {victim}" in ended.stderr, moment
    assert ended.stdout.count("merged 12 tensors") == 1
    assert files_of(case / "out") == files_of(pair / "one")
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft", "slow.py"]


TRAINING = """
import os, subprocess, sys, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    import mergekit_imm
    mergekit_imm.merge_checkpoints("base", "sft", "callback", drop=0.9)
    command = [sys.executable, "-m", "mergekit_imm", "merge", "base", "sft", "--drop", "0.9", "-q", "-o"]
    subprocess.run([*command, "module"], check=True)
    script = "import sys; from mergekit_imm.__main__ import imm_merge; imm_merge()"
    subprocess.run([sys.executable, "-c", script, *command[4:], "script"], check=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_merge_that_a_training_job_starts_waits_for_nobody(pair: Path, case: Path) -> None:
    (case / "train.py").write_text(TRAINING)
    ended = torchrun(2, "train.py", cwd=case)
    assert ended.returncode == 0, ended.stderr
    for out in ("callback", "module", "script"):
        assert files_of(case / out) == files_of(pair / "one")


def until_recorded(partial: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until each rank has a record in its journal."""
    paths = [ledger.journal_of(partial, rank) for rank in range(len(processes))]
    while not all(path.exists() and len(path.read_bytes().partition(b"\n")[2]) for path in paths):
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.01)


def recorded_bytes(partial: Path) -> int:
    """Return how many bytes of the output the journals of dead processes hold."""
    (plan,) = make_plans(open_inputs({"base": "base", "sft": "sft"}, [MergeOptions(drop=0.9)]))
    paths = [ledger.journal_of(partial, rank) for rank in range(2)]
    with ExitStack() as stack:
        journals = [stack.enter_context(closing(Journal(path, b"{}", 0))) for path in paths]
    found = {int(index) for journal in journals for index in journal.entries["segment"]}
    there = [segment for segment in segments(plan) if segment.index in found]
    return sum(plan.items[segment.item].bytes_written(segment.count) for segment in there)


def test_a_job_that_was_killed_goes_on(pair: Path, case: Path) -> None:
    processes = by_hand(2, *MERGE, code=SLOW, STAY="01")
    until_recorded(case / "out.partial", processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [status for status, *_ in ends(processes)] == [-9] * 2
    assert not (case / "out").exists()
    certain = recorded_bytes(case / "out.partial")
    written = merged_by(3)[0].bytes_written
    whole = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    assert 0 < certain <= whole - written
    assert files_of(case / "out") == files_of(pair / "one")


def test_one_line_from_rank_0(case: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One rank runs in a folder without a base."""
    away = tmp_path_factory.mktemp("away")
    first, *others = ends(by_hand(2, *MERGE, folders={1: away}))
    assert first[:2] == (1, "")
    assert re.fullmatch(r"error: rank 1 of 2: base base[^\n]*\n", first[2])
    assert others == [(1, "", "")]
    assert sorted(path.name for path in case.iterdir()) == ["base", "sft"]
    assert not list(away.iterdir())


def test_a_rank_that_ends_is_missed(case: Path) -> None:
    """Without a supervisor, the remaining rank must fail rather than wait forever."""
    processes = by_hand(2, *MERGE, code=SLOW, STAY="1")
    until_recorded(case / "out.partial", processes)
    processes[1].kill()
    (status, out, err), _ = ends(processes)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: rank 0 of 2 has lost the others \([^\n]*start the same job again[^\n]*\n", err)
    assert (case / "out.partial").exists()


def test_slurm(pair: Path, case: Path) -> None:
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "localhost"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mergekit_imm", *MERGE, "--ranks", "slurm"],
            env=os.environ | common | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    other, (status, out, err) = ends(processes)
    assert other == (0, "", "")
    assert (status, err) == (0, "")
    assert out.startswith("merged 12 tensors")
    assert files_of(case / "out") == files_of(pair / "one")
