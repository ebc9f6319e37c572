"""One merge by many processes: the same bytes, whoever ends when."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from threading import Condition, Event, current_thread
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import files_of, random_state, write_model
from mergekit_imm import MergeReport, Ranks, execute, launch, merge_checkpoints, stream
from mergekit_imm.checkpoint import disk, journal
from mergekit_imm.errors import ArgumentError, MismatchError, NonFiniteError, OutputError, RankError
from mergekit_imm.plan import RECORD

SHAPES = {
    "model.embed_tokens.weight": (1000, 900),
    **{f"model.layers.{i}.w": (700, 1500 + 100 * i) for i in range(7)},
    "model.norm": (17,), "empty": (0, 3), "lm_head.weight": (1000, 900),
}  # fmt: skip
SHARDS = [list(SHAPES)[:3], list(SHAPES)[3:]]
CONFIG = {"architectures": ["Tiny"], "model_type": "tiny"}

Run = Callable[..., Any]


def write_pair(folder: Path, *, tied: bool = False) -> Path:
    """Write base, of two files, and sft, of one: 21 MB each."""
    for seed, role in enumerate(("base", "sft")):
        state = random_state(SHAPES, seed=seed)
        state["steps"] = torch.arange(3)
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        shards = [SHARDS[0], [*SHARDS[1], "steps"]] if role == "base" else None
        config = CONFIG | {"tie_word_embeddings": tied}
        write_model(folder / role, state, shards=shards, config=config, side={"tokenizer.json": "{}"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, sft, and what one process makes of them, `one`."""
    folder = write_pair(tmp_path_factory.mktemp("pair"))
    # With the paths that the commands are given, since they stand in the recipe.
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        merge_checkpoints("base", "sft", "one", drop=0.9)
    return folder


@pytest.fixture
def case(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own, with links to base and sft."""
    for role in ("base", "sft"):
        (tmp_path / role).symlink_to(pair / role)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- ranks that are threads


def by_threads(size: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """What a call returns, or raises, on each of some ranks."""
    rounds: defaultdict[int, dict[int, Any]] = defaultdict(dict)
    told, ended = Condition(), Event()

    def ranks(rank: int) -> Ranks:
        numbers = count()

        def gather(value: Any) -> list[Any]:
            given = rounds[next(numbers)]
            with told:
                given[rank] = value
                told.notify_all()
                assert told.wait_for(lambda: len(given) == size or ended.is_set(), timeout=60)
            if len(given) < size:
                raise RankError("one has ended")
            return [given[each] for each in range(size)]

        return Ranks(rank, size, gather)

    def caught(rank: int) -> Any:
        current_thread().name = f"rank-{rank}"
        try:
            return call(ranks(rank))
        except BaseException as error:
            ended.set()
            with told:
                told.notify_all()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(caught, range(size)))


def merged_by(size: int, out: str = "out", **options: Any) -> list[Any]:
    return by_threads(size, lambda ranks: merge_checkpoints("base", "sft", out, drop=0.9, ranks=ranks, **options))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_any_number_of_ranks_makes_the_same_bytes(pair: Path, case: Path, size: int) -> None:
    reports = merged_by(size, verify=size == 3)
    assert [report.status for report in reports] == ["merged"] * size
    assert files_of(case / "out") == files_of(pair / "one")
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]
    total = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    assert reports[0].bytes_written == total
    # What lies across a cut is read twice.
    assert 2 * 0.99 * total < reports[0].bytes_read < 2 * total + size * 2 * 2 * 4 * RECORD
    assert [report.status for report in merged_by(size, verify=True)] == ["already merged"] * size


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 300_000, 524_289])), min_size=1, max_size=5),
    size=st.integers(2, 6),
    files=st.integers(1, 3),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32]), min_size=5, max_size=5),
    tied=st.booleans(),
)
def test_no_two_ranks_write_into_one_mib(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, size: int, files: int, dtypes: Any, tied: bool
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    shapes = {"model.embed_tokens.weight": (5, 200_000)} if tied else {}
    shapes |= {f"w{number}": each for number, each in enumerate(rows)}
    for seed, role in enumerate(("base", "sft")):
        state = random_state(shapes, seed=seed)
        state = {n: t.to(dtypes[number % 5]) for number, (n, t) in enumerate(state.items())}
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        names = list(state)
        shards = [names[number::files] for number in range(files)] if files <= len(names) else None
        config = CONFIG | {"tie_word_embeddings": tied}
        write_model(folder / role, state, shards=shards, config=config)
    owners: dict[tuple[str, int], set[str]] = {}
    covered: dict[str, list[tuple[int, int]]] = {}
    write_at = disk.write_at

    def noted(handle: disk.Handle, content: memoryview, offset: int) -> None:
        thread = current_thread().name
        covered.setdefault(handle.path.name, []).append((offset, offset + len(content)))
        if not thread.startswith("rank-"):  # heads are written before the others begin
            for block in range(offset >> 20, (offset + len(content) - 1 >> 20) + 1):
                owners.setdefault((handle.path.name, block), set()).add(thread)
        write_at(handle, content, offset)

    def begin(plans: Any, todo: Any, sink: Any, **options: Any) -> Any:
        """The worker, one for each rank, is named after its rank."""
        name = current_thread().name.replace("rank", "of")

        def named(*given: Any) -> None:
            current_thread().name = name
            sink(*given)

        return run(plans, todo, named, **options)

    run = execute.run
    with patch.object(disk, "write_at", noted), patch.object(stream, "run", begin):
        paths = folder / "base", folder / "sft", folder / "out"
        results = by_threads(size, lambda ranks: merge_checkpoints(*paths, ranks=ranks, workers=1))
    assert not [each for each in results if isinstance(each, BaseException)]
    assert not {block: ranks for block, ranks in owners.items() if len(ranks) > 1}
    for path in (folder / "out").glob("*.safetensors"):
        ends = sorted(covered[path.name])
        assert ends[0][0] == 0
        assert sum(last - first for first, last in ends) == path.stat().st_size
        assert all(one[1] == other[0] for one, other in pairwise(ends))
    merge_checkpoints(*paths[:2], folder / "one")
    assert files_of(folder / "out") == files_of(folder / "one")
    shutil.rmtree(folder)


def test_shares_are_of_one_size(case: Path) -> None:
    reports = merged_by(3)
    own = [report.bytes_written for report in reports[1:]]
    third = reports[0].bytes_written / 3
    assert all(abs(each - third) < 3 << 20 for each in own), own


def test_a_sweep_by_ranks(pair: Path, case: Path) -> None:
    merged_by(2, "out-{alpha}", alpha=[0.2, 0.5], verify=True)
    assert files_of(case / "out-0.5") == files_of(pair / "one")
    merge_checkpoints("base", "sft", "alone", alpha=0.2, drop=0.9)
    assert files_of(case / "out-0.2") == files_of(case / "alone")


def test_a_tied_model_by_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, tied=True)
    monkeypatch.chdir(tmp_path)
    merge_checkpoints("base", "sft", "one", drop=0.9)
    merged_by(3)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def stopped_after(count: int) -> Run:
    """`run`, which ends after so many segments, as if the process did."""
    run = execute.run

    def stopped(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, result in enumerate(each for each in run(*arguments, **options) if each is not None):
            if number == count:
                raise KeyboardInterrupt
            yield result

    return stopped


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (3, 2), (2, 5)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_number_of_ranks_goes_on(pair: Path, case: Path, sizes: tuple[int, int]) -> None:
    with patch("mergekit_imm.stream.SYNC_BYTES", 1), patch("mergekit_imm.stream.run", stopped_after(2)):
        stopped = merged_by(sizes[0], workers=1)
    assert all(isinstance(each, KeyboardInterrupt) for each in stopped)
    assert {path.name for path in (case / "out.partial").glob(".imm_journal*")} == {
        journal.name_of(rank) for rank in range(sizes[0])
    }
    report, *_ = merged_by(sizes[1])
    assert isinstance(report, MergeReport)
    whole = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    # Each recorded at least one of its two; what lies across a cut is not.
    assert report.bytes_written <= whole - sizes[0] * (1 << 20)
    assert files_of(case / "out") == files_of(pair / "one")
    assert not report.notes


def test_a_piece_is_recorded_only_when_all_ranks_have_written_their_part(pair: Path, case: Path) -> None:
    """Rank 1 begins in the middle of a piece, and rank 0 ends before it writes anything."""
    stopped = stopped_after(2)

    def run(*arguments: Any, **options: Any) -> Iterator[Any]:
        if current_thread().name == "rank-0":
            raise KeyboardInterrupt
        yield from stopped(*arguments, **options)

    with patch("mergekit_imm.stream.SYNC_BYTES", 1), patch("mergekit_imm.stream.run", run):
        merged_by(2, workers=1)
    merge_checkpoints("base", "sft", "out", drop=0.9)
    assert files_of(case / "out") == files_of(pair / "one")


def test_journals_of_other_merges_are_not_believed(pair: Path, case: Path) -> None:
    with patch("mergekit_imm.stream.SYNC_BYTES", 1), patch("mergekit_imm.stream.run", stopped_after(2)):
        merged_by(2, workers=1, alpha=0.25)
        strange = (case / "out.partial" / ".imm_journal-1").read_bytes()
        merged_by(2, workers=1, restart=True)
    partial = case / "out.partial"
    (partial / ".imm_journal-1").write_bytes(strange)
    (partial / ".imm_journal-2").write_bytes((partial / ".imm_journal").read_bytes()[:-3])
    (partial / ".imm_journal-3").symlink_to(case / "base" / "config.json")
    (partial / ".imm_journal-x").write_text("x")
    os.mkfifo(partial / ".imm_journal-4")
    (partial / ".imm_journal-5").mkdir()
    merge_checkpoints("base", "sft", "out", drop=0.9)
    assert files_of(case / "out") == files_of(pair / "one")
    assert (case / "base" / "config.json").stat().st_size > 0


def test_a_lost_journal_is_found(case: Path) -> None:
    end = stream._end

    def lost(written: Any, *arguments: Any) -> None:
        (case / "out.partial" / ".imm_journal-1").unlink()
        end(written, *arguments)

    with patch("mergekit_imm.stream._end", lost):
        failed = merged_by(2)
    assert all(isinstance(each, OutputError) for each in failed)
    assert re.search(r"\d+ of the \d+ pieces of out.partial are in no rank's journal; run the same", str(failed[0]))
    assert not (case / "out").exists()
    assert [report.status for report in merged_by(2)] == ["merged"] * 2


def test_a_refusal_is_that_of_all(case: Path) -> None:
    failed = merged_by(3, keep=["nothing"])
    assert {str(each) for each in failed} == {str(failed[0])}
    assert all(isinstance(each, ArgumentError) for each in failed)
    (case / "out").mkdir()
    (case / "out" / "file").touch()
    failed = merged_by(3)
    assert {str(each) for each in failed} == {"output out is there and not empty; give another, or --overwrite it"}
    assert all(isinstance(each, OutputError) for each in failed)
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]


def test_ranks_must_see_one_model(case: Path) -> None:
    (case / "other").mkdir()
    write_model(case / "other" / "sft", random_state(SHAPES, seed=3) | {"steps": torch.arange(3)}, config=CONFIG)

    def call(ranks: Ranks) -> Any:
        sft = case / "other" / "sft" if ranks.rank == 2 else case / "sft"
        return merge_checkpoints("base", sft, "out", ranks=ranks)

    failed = by_threads(3, call)
    assert all(isinstance(each, MismatchError) for each in failed)
    assert "rank 2 of 3 would make another merge than rank 0 (inputs.sft.path: " in str(failed[0])
    assert {str(each) for each in failed} == {str(failed[0])}
    assert not (case / "out.partial").exists()


def test_all_stop_when_one_meets_an_infinite_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_pair(tmp_path))
    state = random_state(SHAPES, seed=1) | {"steps": torch.arange(3)}
    state["lm_head.weight"][-1, -1] = torch.inf
    write_model(tmp_path / "sft", state, config=CONFIG)
    run, slow = execute.run, 0.0

    def slowed(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal slow
        for result in run(*arguments, **options):
            if current_thread().name == "rank-0":
                time.sleep(1.2)
                slow += 1.2
            yield result

    with patch("mergekit_imm.stream.run", slowed):
        failed = merged_by(3, workers=1)
    assert all(isinstance(each, NonFiniteError) for each in failed)
    # Two ranks may compute the piece, which lies across a cut.
    told = r"rank [12] of 3: tensor 'lm_head.weight' of sft sft has 1 NaN or infinite of 900000 elements"
    assert re.match(told, str(failed[0]))
    assert slow < 4  # of six and more, had it gone on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOSYS])
def test_a_filesystem_without_locks(case: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    report, other = merged_by(2)
    assert report.notes == ["note: the filesystem of out has no locks: see to it that nothing else is merged there"]
    assert not other.notes


# --- ranks that are processes


SLOW = """
import os, signal, sys, threading, time
from mergekit_imm import cli, kernel, stream
stream.SYNC_BYTES, stream.SYNC_SECONDS = 1, 0
merge_span = kernel.merge_span
def slowly(*arguments):
    time.sleep(0.1)
    merge_span(*arguments)
kernel.merge_span = slowly
rank, moment = os.environ.get("KILL", ":").split(":")
if rank == os.environ["RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    begin = stream._work
    def doomed(*arguments, **options):
        threading.Timer(float(moment), os.kill, (os.getpid(), signal.SIGKILL)).start()
        begin(*arguments, **options)
    stream._work = doomed
cli.main()
"""
MERGE = ["merge", "base", "sft", "--drop", "0.9", "-o", "out"]


def torchrun(size: int, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def by_hand(
    size: int,
    *arguments: str,
    folders: Mapping[int, Path] | None = None,
    code: str | None = None,
) -> list[subprocess.Popen[str]]:
    """Start ranks with the variables that torchrun sets, but without anyone who looks after them."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = ["-m", "mergekit_imm"] if code is None else ["-c", code]
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, "--ranks", "torchrun"],
            cwd=(folders or {}).get(rank), env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    told = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, told, strict=True)]


def test_torchrun(pair: Path, case: Path) -> None:
    """The plain command."""
    ended = torchrun(2, "-m", "mergekit_imm", *MERGE, "--json", cwd=case)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"status": "merged"') == 1
    assert "error" not in ended.stderr
    assert files_of(case / "out") == files_of(pair / "one")
    assert sorted(path.name for path in case.iterdir()) == ["base", "out", "sft"]


def test_torchrun_finishes_what_a_dead_rank_left(pair: Path, case: Path) -> None:
    """Three ranks, of which one is killed at a random moment."""
    (case / "slow.py").write_text(SLOW)
    victim, moment = random.randrange(3), random.uniform(0, 0.5)
    ended = torchrun(
        3, "--max-restarts", "2", "--monitor-interval", "0.1", "slow.py", *MERGE, "--ranks", "torchrun", cwd=case,
        KILL=f"{victim}:{moment}",
    )  # fmt: skip
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
    subprocess.run([*command, "module"], check=True, timeout=60)
    script = "import sys; from mergekit_imm.__main__ import imm_merge; imm_merge()"
    subprocess.run([sys.executable, "-c", script, *command[4:], "script"], check=True, timeout=60)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_merge_that_a_training_job_starts_waits_for_nobody(pair: Path, case: Path) -> None:
    (case / "train.py").write_text(TRAINING)
    ended = torchrun(2, "train.py", cwd=case)
    assert ended.returncode == 0, ended.stderr
    for out in ("callback", "module", "script"):
        assert files_of(case / out) == files_of(pair / "one")


def recorded(partial: Path, ranks: int) -> bool:
    """Whether each rank has recorded something."""
    paths = [partial / journal.name_of(rank) for rank in range(ranks)]
    return all(path.exists() and len(path.read_bytes().partition(b"\n")[2]) for path in paths)


def test_a_job_that_was_killed_goes_on(pair: Path, case: Path) -> None:
    processes = by_hand(2, *MERGE, code=SLOW)
    until = time.monotonic() + 60
    while not recorded(case / "out.partial", 2) and time.monotonic() < until:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [status for status, *_ in ends(processes)] == [-9] * 2
    assert not (case / "out").exists()
    written = merged_by(3)[0].bytes_written
    whole = sum(path.stat().st_size for path in (case / "out").glob("*.safetensors"))
    assert written < whole - (2 << 20)
    assert files_of(case / "out") == files_of(pair / "one")


def test_one_line_from_rank_0(case: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One rank stands where there is no base."""
    away = tmp_path_factory.mktemp("away")
    first, *others = ends(by_hand(2, *MERGE, folders={1: away}))
    assert first[:2] == (1, "")
    assert re.fullmatch(r"error: rank 1 of 2: base base[^\n]*\n", first[2])
    assert others == [(1, "", "")]
    assert sorted(path.name for path in case.iterdir()) == ["base", "sft"]
    assert not list(away.iterdir())


def test_a_rank_that_ends_is_missed(case: Path) -> None:
    """Nobody looks after these; the one that is left must say so, and not wait for ever."""
    processes = by_hand(2, *MERGE, code=SLOW)
    until = time.monotonic() + 60
    while not recorded(case / "out.partial", 2) and time.monotonic() < until:
        time.sleep(0.01)
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
            env=os.environ | common | {"SLURM_PROCID": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    other, (status, out, err) = ends(processes)
    assert other == (0, "", "")
    assert (status, err) == (0, "")
    assert out.startswith("merged 12 tensors")
    assert files_of(case / "out") == files_of(pair / "one")


# --- where a rank stands


def test_variables_alone_mean_nothing(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not torchrun's child, whatever it has inherited."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "4")
    assert not launch.is_started_by_torchrun()
    with launch.joined(None) as ranks:
        assert ranks is None
    assert merge_checkpoints("base", "sft", "out").status == "merged"


def test_a_single_rank_needs_no_torch() -> None:
    code = (
        "import os, sys; from mergekit_imm.launch import joined\n"
        "os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='x', MASTER_PORT='1')\n"
        "with joined('torchrun') as ranks: assert ranks is None and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[07-09],m1"}


def test_places() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert launch.place_of(None, SLURM | torchrun, started=False) is None
    assert launch.place_of(None, torchrun, started=True) == launch.Place(1, 2, "host", 29500)
    assert launch.place_of("torchrun", torchrun, started=False) == launch.Place(1, 2, "host", 29500)
    assert launch.place_of("slurm", SLURM, started=False) == launch.Place(3, 4, "n07", 20000 + 123456 % 12000)
    given = SLURM | {"MASTER_ADDR": "m1", "MASTER_PORT": "99", "SLURM_STEP_NODELIST": "m1"}
    assert launch.place_of("slurm", given, started=False) == launch.Place(3, 4, "m1", 99)


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        ("torchrun", {}, "--ranks torchrun is given, but RANK is not set; start this command by torchrun"),
        ("slurm", {}, "--ranks slurm is given, but SLURM_PROCID is not set; start this command by srun"),
        ("slurm", SLURM | {"SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS is '4\(x2\)', which is not a number"),
        ("slurm", SLURM | {"SLURM_JOB_NODELIST": ""}, "finds no SLURM_JOB_NODELIST"),
    ],
)
def test_places_that_are_not_there(kind: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        launch.place_of(kind, environment, started=False)


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COME", timedelta(seconds=1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match=r"rank 1 of 2 does not meet the others at 127.0.0.1:\d+ \("):  # noqa: SIM117
        with launch.joined("torchrun"):
            pass
