"""The command's output, exit status and `--json` agree with what is on the disk."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import files_of
from commands import HUNG, LATE, Ended, held_until, subprocess_of
from mergekit_imm import (
    ChangedError,
    CheckpointError,
    MergeError,
    OutputError,
    VerifyError,
    merge_checkpoints,
)
from mergekit_imm.engine import stream
from mergekit_imm.output import direct_io, journal, paths
from thorough import others


def json_of(*arguments: str, status: int = 0) -> dict[str, Any]:
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--json", *arguments)
    assert ended.status == status, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_status_and_json_tell_what_is_there(pair: Path) -> None:
    assert json_of("--dry-run")["status"] == "dry run"
    assert not (pair / "out").exists()
    report = json_of()
    assert report["status"] == "merged"
    assert sum((pair / "out" / name).stat().st_size for name in report["files"]) == report["bytes_written"]
    before = files_of(pair / "out")
    assert json_of()["status"] == json_of("--dry-run")["status"] == "already merged"
    for arguments in ([], ["--quiet"], ["--overwrite"], ["--restart"]):
        ended = subprocess_of("merge", "base", "sft", "-o", "out", *arguments)
        assert ended.status == 0
        assert ended.out == ("" if arguments == ["--quiet"] else "out already merged: it holds exactly this merge\n")
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--alpha", "0.1", "--json")
    assert (ended.status, ended.out) == (1, "")
    assert files_of(pair / "out") == before
    assert json_of("--alpha", "0.1", "--overwrite")["status"] == "merged"
    assert files_of(pair / "out") != before


# --- verified before it appears


def test_a_verified_merge_says_so(pair: Path) -> None:
    report = json_of("--verify")
    assert report["verified"] is True
    assert set(report["seconds"]) == {"plan", "stream", "verify", "total"}
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--verify")
    assert ended.out == "out already merged: it holds exactly this merge, every byte compared\n"
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--verify", "--overwrite", "--alpha", "0.2")
    assert ended.out.endswith(", every byte compared\n")
    assert json_of("--alpha", "0.2")["verified"] is False
    seen: list[tuple[int, int]] = []
    merge_checkpoints(
        "base", "sft", "o-{alpha}", alpha=[0.2, 0.3], verify=True, progress=lambda *each: seen.append(each)
    )
    assert seen[-1][0] == seen[-1][1] == max(seen)[0]
    assert [each for each, _ in seen] == sorted(each for each, _ in seen)


def corrupted(target: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A disk that flips one bit."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        write_at, write_file = direct_io.write_at, direct_io.write_file

        def write_wrong(handle: direct_io.Handle, content: memoryview, offset: int) -> None:
            if (offset == 0) == (target == "header") and len(content) > 20:
                wrong = bytearray(content)
                wrong[-9] ^= 4
                content = memoryview(wrong)
            write_at(handle, content, offset)

        def write_wrong_file(path: Path, content: bytes) -> None:
            write_file(path, content.replace(b"0", b"1", 1) if path.name == target else content)

        patch.setattr(
            direct_io,
            "write_at" if target in ("header", "tensor") else "write_file",
            write_wrong if target in ("header", "tensor") else write_wrong_file,
        )

    return apply


@pytest.mark.parametrize("target", ["header", "tensor", "imm_report.json", "README.md"])
def test_a_disk_that_changes_bits_is_found_out(pair: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--verify` finds it, nothing is published, and the cure in the message works."""
    with monkeypatch.context() as patch:
        corrupted(target)(patch)
        with pytest.raises(MergeError) as caught:
            merge_checkpoints("base", "sft", "out", verify=True)
    assert str(caught.value).isprintable()
    assert not (pair / "out").exists()
    if target != "header":  # the read-back after writing finds it first
        assert isinstance(caught.value, VerifyError)
        assert "merge again with restart=True" in str(caught.value)
        if target == "tensor":
            with pytest.raises(VerifyError, match=r"differs .*element"):
                merge_checkpoints("base", "sft", "out", verify=True)
    assert merge_checkpoints("base", "sft", "out", verify=True, restart=True).status == "merged"


def test_a_finished_output_can_be_verified_too(pair: Path) -> None:
    merge_checkpoints("base", "sft", "out")
    path = pair / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert merge_checkpoints("base", "sft", "out").status == "already merged"
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--verify")
    assert ended.status == 1
    assert ended.error.endswith("of the file); remove the folder and merge again")


@pytest.mark.parametrize("how", ["header", "name", "shape", "shorter", "gone"])
def test_what_was_written_is_read_back(pair: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = journal.Journal.append

    def damage(self: journal.Journal, entries: Any) -> None:
        sync(self, entries)
        path = self.path.with_name("model.safetensors")
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        elif how == "shorter":
            path.write_bytes(content[:-2])
        else:
            old, new = {"header": (b"BF16", b"F16 "), "name": (b"norm", b"norn"), "shape": (b"[8,8]", b"[4,16]"[:5])}[
                how
            ]
            path.write_bytes(content.replace(old, new, 1))

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", damage)
        with pytest.raises(MergeError, match=r"model\.safetensors"):
            merge_checkpoints("base", "sft", "out")
    assert not (pair / "out").exists()


# --- inputs that change


@pytest.mark.parametrize("how", ["written", "replaced", "removed", "shortened"])
def test_an_input_that_changes_meanwhile_is_refused(large: Path, how: str) -> None:
    """As when a trainer saves into the folder again: no mixture of two models is left."""
    path = large / "sft" / "model.safetensors"
    content = path.read_bytes()
    done: list[bool] = []

    def change(*_: int) -> None:
        if not done:
            done.append(True)
            if how == "replaced":
                (large / "other").write_bytes(content)
                (large / "other").rename(path)
            elif how == "removed":
                path.unlink()
            elif how == "shortened":
                os.truncate(path, len(content) // 2)
            else:
                with path.open("r+b") as file:
                    file.seek(-2, os.SEEK_END)
                    file.write(b"\0\0")

    with pytest.raises(ChangedError) as caught:
        merge_checkpoints("base", "sft", "out", progress=change, workers=1)
    assert isinstance(caught.value, CheckpointError)
    assert "model.safetensors" in str(caught.value)
    assert {each.name for each in large.iterdir()} <= {"base", "sft"}
    path.write_bytes(content)
    assert merge_checkpoints("base", "sft", "out").status == "merged"


# --- two at once


def test_two_commands_at_once(large: Path) -> None:
    arguments = ["merge", "base", "sft", "-o", "out", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", held_until("closed.is_set()"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        while not (large / "out.partial" / journal.JOURNAL).exists():
            assert first.poll() is None
            time.sleep(0.01)
        for options in ([], ["--restart"], ["--overwrite"]):
            second = subprocess_of(*arguments, *options)
            assert second.status == 1
            assert "out.partial is being written by another merge; wait for it, or give another" in second.error
        other = subprocess_of(*arguments, "--alpha", "0.9")
        assert other.status == 1
        assert "unfinished merge of another recipe (parameters.alpha: 0.5, now 0.9)" in other.error
        output, _ = first.communicate(timeout=HUNG)
        assert output.startswith("merged")
    assert subprocess_of(*arguments).out.startswith("out already merged")


def test_an_output_that_appears_meanwhile_is_not_replaced(pair: Path) -> None:
    """Another merge, or a user, was faster: without --overwrite theirs stays, and ours is not lost."""

    def appear(done: int, total: int) -> None:
        (pair / "out").mkdir(exist_ok=True)
        (pair / "out" / "notes.txt").write_text("mine")

    with pytest.raises(
        OutputError, match=r"was not there when the merge began, and now it is; the merge is complete in"
    ):
        merge_checkpoints("base", "sft", "out", progress=appear)
    assert files_of(pair / "out") == {"notes.txt": b"mine"}
    assert merge_checkpoints("base", "sft", "out", overwrite=True).bytes_written == 0
    merge_checkpoints("base", "sft", "whole")
    assert files_of(pair / "out") == files_of(pair / "whole")


def test_a_merge_that_was_planned_while_another_finished_begins_nothing(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another merge finishes between the plan and the first byte: noticed under the lock."""
    make_folder = direct_io.make_folder

    def faster(path: Path) -> list[Path]:
        monkeypatch.setattr(direct_io, "make_folder", make_folder)
        merge_checkpoints("base", "sft", "out", alpha=0.9)
        return make_folder(path)

    monkeypatch.setattr(direct_io, "make_folder", faster)
    with pytest.raises(OutputError, match="was not there when the merge began, and now it is"):
        merge_checkpoints("base", "sft", "out")
    assert merge_checkpoints("base", "sft", "out", alpha=0.9).status == "already merged"
    assert not (pair / "out.partial").exists()


def test_a_journal_that_another_recipe_left_meanwhile_is_not_taken_up(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder = direct_io.make_folder

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    def other(path: Path) -> list[Path]:
        monkeypatch.setattr(direct_io, "make_folder", make_folder)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints("base", "sft", "out", alpha=0.9, progress=interrupt)
        return make_folder(path)

    monkeypatch.setattr(direct_io, "make_folder", other)
    with pytest.raises(OutputError, match="unfinished merge of another recipe"):
        merge_checkpoints("base", "sft", "out")


def test_a_lock_holds_for_the_folder_that_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was opened, then published by another process: the one there now is not ours."""
    folder = tmp_path / "out.partial"
    folder.mkdir()
    flock = fcntl.flock

    def moved(descriptor: int, flags: int) -> None:
        flock(descriptor, flags)
        folder.rename(tmp_path / "out")
        folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", moved)
    with pytest.raises(OutputError, match="being written by another merge"), paths.locked(folder):
        raise AssertionError("not reached")


def test_an_exchange_under_way_is_left_to_whoever_makes_it(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one merge removes the old folder, another does not resume it."""
    merge_checkpoints("base", "sft", "out", alpha=0.25)
    found: list[Ended] = []
    rmtree = shutil.rmtree

    def removing(folder: Path) -> None:
        found.append(subprocess_of("merge", "base", "sft", "-o", "out", "--alpha", "0.1", "--overwrite"))
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", removing)
    assert merge_checkpoints("base", "sft", "out", overwrite=True).status == "merged"
    assert [each.status for each in found] == [1]
    assert "being written by another merge" in found[0].error
    assert sorted(path.name for path in pair.iterdir()) == ["base", "out", "sft"]


def test_an_old_folder_that_cannot_be_removed_is_reported(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_checkpoints("base", "sft", "out", alpha=0.25)

    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OutputError, match=r"out is in place, but the folder it replaced, now out\.partial"):
            merge_checkpoints("base", "sft", "out", overwrite=True)
    assert merge_checkpoints("base", "sft", "out").status == "already merged"
    assert sorted(path.name for path in pair.iterdir()) == ["base", "out", "sft"]


# --- finished work is not repeated


@pytest.mark.parametrize("share", [*others(0.5, 0.97), 0.9])
@pytest.mark.parametrize("workers", [*others(1), 4])
def test_a_late_kill_costs_no_more_than_a_window(large: Path, share: float, workers: int) -> None:
    arguments = ["merge", "base", "sft", "-o", "out", "--workers", str(workers), "--json"]
    killed = subprocess.run([sys.executable, "-c", LATE.replace("SHARE", str(share)), *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    ended = subprocess_of(*arguments)
    assert ended.status == 0
    report = json.loads(ended.out)
    total = sum((large / "out" / name).stat().st_size for name in report["files"])
    window, segment = 2 << 20, 2 << 20
    assert report["bytes_written"] <= (1 - share) * total + window + segment
    assert report["bytes_read"] <= 2 * report["bytes_written"]
    merge_checkpoints("base", "sft", "whole")
    assert files_of(large / "out") == files_of(large / "whole")


def test_many_interrupts_end_a_merge_in_one_line(large: Path) -> None:
    """However often Ctrl-C is pressed while workers write."""
    process = subprocess.Popen(
        [sys.executable, "-c", held_until("closed.is_set() and stopping()"), "merge", "base", "sft", "-o", "out"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while not (large / "out.partial" / "model.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.003)
        _, printed = process.communicate(timeout=HUNG)
    assert process.returncode == 130
    assert re.fullmatch("error: interrupted( twice)?; .*run the same command again to resume\n", printed)
    assert merge_checkpoints("base", "sft", "out").status == "merged"


def test_threads_are_gone_when_a_merge_ends(pair: Path) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints("base", "sft", "out", progress=_interrupt)
    assert threading.active_count() == before
    assert stream.SYNC_BYTES == 512 << 20
    assert stream.SYNC_SECONDS == 5


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt
