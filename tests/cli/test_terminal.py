"""`imm-merge` on a terminal, and interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints import files_of
from commands import (
    HUNG,
    HUNG_READ,
    SLOW,
    Ended,
    held_until,
    on_a_terminal,
    subprocess_of,
)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_merge_that_the_same_command_finishes(
    large: Path, number: signal.Signals, status: int, word: str
) -> None:
    inputs = {role: files_of(large / role) for role in ("base", "sft")}
    out, partial = large / f"out{number}", large / f"out{number}.partial"
    arguments = ["merge", "base", "sft", "-o", out.name, "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", held_until("closed.is_set() or stopping()"), *arguments],
        cwd=large,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (partial / "model.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        ended = Ended(process.wait(HUNG), *process.communicate())
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.strip() == f"error: {ended.error}"
    assert word in ended.error
    assert "run the same command again to resume" in ended.error
    assert not out.exists()
    assert partial.is_dir()
    assert subprocess_of(*arguments, cwd=large).status == 0
    assert files_of(out) == files_of(large / "whole")
    assert not partial.exists()
    assert {role: files_of(large / role) for role in ("base", "sft")} == inputs


@pytest.mark.parametrize(
    ("first", "second", "status", "word"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143, "terminated"),
        (signal.SIGINT, signal.SIGINT, 130, "interrupted"),
        (signal.SIGINT, signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_second_signal_ends_a_merge_whose_read_hangs(
    large: Path, first: signal.Signals, second: signal.Signals, status: int, word: str
) -> None:
    """As on a network filesystem whose server is gone: a worker can be waited for without end."""
    out = f"hung{first}{second}"
    arguments = ["merge", "base", "sft", "-o", out, "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", HUNG_READ, *arguments],
        cwd=large,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for number in (first, second):
            assert process.stdout.readline() == "now\n"
            process.send_signal(number)
        ended = Ended(process.wait(HUNG), *process.communicate())
    assert ended.status == status
    assert ended.err == (
        f"error: {word} twice; ended without waiting for work in progress; what was written is kept; run the"
        " same command again to resume\n"
    )
    assert not (large / out).exists()
    assert (large / f"{out}.partial").is_dir()
    assert subprocess_of(*arguments, cwd=large).status == 0
    assert files_of(large / out) == files_of(large / "whole")


IN_A_CALLBACK = """
import ctypes
calls = []
callback = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGTERM))
def first(*arguments):
    if not calls:
        calls.append(1)
        callback()  # what is raised in there goes no further
    held(*arguments)
cpu.merge_span = first
main()
"""


INTERRUPTED = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[-1]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from mergekit_imm import __main__
__main__.imm_merge()
"""


@pytest.mark.parametrize("module", ["cli.main", "cli.merge", "options.options"])
def test_an_interrupt_while_the_command_loads_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, f"mergekit_imm.{module}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted; nothing was started\n")


def test_a_signal_in_a_callback_of_a_library_is_not_lost(large: Path) -> None:
    """As when it comes while numba loads the kernel: no traceback, and the merge stops all the same."""
    code = held_until("stopping()").replace("\nmain()\n", IN_A_CALLBACK)
    ended = subprocess_of("merge", "base", "sft", "-o", "out-c", cwd=large, code=code)
    assert ended.status == 143
    assert ended.err.strip() == f"error: {ended.error}"
    assert not (large / "out-c").exists()
    assert subprocess_of("merge", "base", "sft", "-o", "out-c", cwd=large).status == 0


def test_a_terminal_shows_a_bar_with_speed_and_time_left(here: Path) -> None:
    printed = on_a_terminal("merge", "base", "sft", "-o", "out", cwd=here)
    assert "merging" in printed
    assert "GB/s" in printed
    assert "100%" in printed
    assert len({word for word in printed.split() if word.endswith("%")}) > 3
    assert max(map(len, printed.replace("\r", "\n").splitlines())) < 120


def test_quiet_shows_no_bar_on_a_terminal(here: Path) -> None:
    assert on_a_terminal("merge", "base", "sft", "-o", "out", "--quiet", cwd=here) == ""


def test_a_pipe_shows_no_bar(here: Path) -> None:
    ended = subprocess_of("merge", "base", "sft", "-o", "out", cwd=here, code=SLOW)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count("\n") == 1
