"""Progress where there is no terminal, and what is said on a first run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import HUNG, write_pair
from mergekit_imm.cli import progress
from mergekit_imm.cli.progress import LogLines, progress_bar
from mergekit_imm.numerics.native import COMPILING


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(f"{progress.__name__}.time.perf_counter", moved)
    return moved


def test_a_log_gets_a_line_for_a_tenth(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging", shown=True, rate=lambda x: f"{x:.1f} B/s") as update:
        assert update is not False
        for done in range(0, 1001, 5):  # 5 in 10 seconds
            update(done, 1000)
            clock.now += 10
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "merging: 10 %, 0.5 B/s, 0:30:00 left"
    assert [line.split()[1] for line in lines] == [str(tenth) for tenth in range(10, 100, 10)]
    assert "\r" not in err


def test_a_short_run_logs_nothing_and_a_fast_one_is_not_noisy(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    for seconds, expected in ((0.25, []), (1.0, ["30", "60", "90"])):
        with progress_bar("merging", shown=True) as update:
            assert update is not False
            for done in range(101):
                update(done, 100)
                clock.now += seconds
        assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == expected


def test_nothing_is_shown_if_not_asked() -> None:
    with progress_bar("merging", shown=False) as update:
        assert update is False


def test_a_resumed_run_counts_from_where_it_begins(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging", shown=True, rate=lambda x: f"{x:.0f} B/s") as update:
        assert update is not False
        update(900, 1000)
        clock.now += 40
        update(940, 1000)
        assert capfd.readouterr().err == ""  # the same tenth
    with progress_bar("merging", shown=True, rate=lambda x: f"{x:.0f} B/s") as update:
        assert update is not False
        update(500, 1000)
        clock.now += 40
        update(620, 1000)
    assert capfd.readouterr().err == "merging: 62 %, 3 B/s, 0:02:07 left\n"


BAR = b"\r 10%|#    | 1/10\r 50%|##   | 5/10\r100%|#####| 10/10\n"


@pytest.mark.parametrize(
    ("output", "logged"),
    [
        (b"one\ntwo\r\n\nthree", b"one\ntwo\n\nthree\n"),
        (b"begins\n" + BAR + b"ends\n", b"begins\n100%|#####| 10/10\nends\n"),
        (b"\r50%\r100%\r    \rdone\n", b"done\n"),  # a bar that removes itself
        (b"", b""),
    ],
)
@given(data=st.data())
def test_of_a_line_that_overwrites_itself_the_last_state_is_logged(
    output: bytes, logged: bytes, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=6)))
    written: list[bytes] = []
    lines = LogLines(written.append)
    for first, last in zip([0, *cuts], [*cuts, len(output)], strict=True):
        lines(output[first:last])
    lines.flush()
    assert b"".join(written) == logged


def test_a_long_bar_is_logged_now_and_then(clock: Clock) -> None:
    written: list[bytes] = []
    lines = LogLines(written.append)
    for step in range(100):
        clock.now += 1
        lines(b"\r%d of 100" % (step + 1))
    lines(b"\n")
    assert b"".join(written) == b"30 of 100\n60 of 100\n90 of 100\n100 of 100\n"


TRAIN = """
import shutil, sys
for step in range(5):
    print(f"\\r{step + 1} of 5", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)
shutil.copytree(sys.argv[1], sys.argv[2])
print("trained", end="")
"""


def test_the_commands_of_a_loop_leave_no_carriage_returns_in_a_log(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    train = f"{sys.executable} train.py {{model}} {{output}}"
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "mergekit_imm", "loop", "base", "--rounds", "1", "-o", "run", "--train", train],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=HUNG,
            check=True,
        )
    lines = (tmp_path / "log").read_bytes().decode().split("\n")
    assert lines[1:3] == ["5 of 5", "trained"]
    assert lines[3].startswith("round 0: merge")
    assert not any("\r" in line for line in lines)
    assert b"\r1 of 5\r2 of 5" in (tmp_path / "run/round-0/train.log").read_bytes()  # all of it


def test_a_first_run_says_that_it_compiles_unless_it_is_quiet(tmp_path: Path) -> None:
    write_pair(tmp_path)
    program = [sys.executable, "-m", "mergekit_imm", "merge", "base", "sft", "-o"]
    for options, said in (([], f"{COMPILING}\n"), (["-q"], ""), (["-qo", "again"], "")):
        cache = {"NUMBA_CACHE_DIR": str(tmp_path / f"cache{len(options)}")}
        ran = subprocess.run(
            [*program, f"out{len(options)}", *options],
            cwd=tmp_path,
            env={**os.environ, **cache},
            capture_output=True,
            text=True,
            timeout=HUNG,
            check=True,
        )
        assert ran.stderr == said
        assert bool(ran.stdout) == (options == [])
