"""Foreign files where a merge writes, and closed standard streams: nothing is touched, nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import files_of, random_state, write_model
from commands import LATE, subprocess_of
from mergekit_imm import ChangedError, OutputError, VerifyError, merge_checkpoints, verify
from mergekit_imm.output import direct_io, journal
from mergekit_imm.output import publish as swap
from thorough import others


def killed(folder: Path, share: float = 0.5) -> None:
    """Leave an unfinished merge."""
    arguments = ["merge", "base", "sft", "-o", "out"]
    ended = subprocess.run([sys.executable, "-c", LATE.replace("SHARE", str(share)), *arguments], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert (folder / "out.partial" / journal.JOURNAL).exists()


def test_strangers_in_an_unfinished_merge_do_not_get_into_the_output(large: Path) -> None:
    """Leftovers of a copy and links to other files are neither followed nor kept."""
    killed(large)
    victim = large / "victim"
    victim.write_text("mine")
    partial = large / "out.partial"
    (partial / "vocab.txt").write_text("the beginn")
    (partial / "tokenizer.json").symlink_to(victim)
    (partial / "sub").mkdir()
    (partial / "sub" / "link").symlink_to(large / "base")
    assert merge_checkpoints("base", "sft", "out", verify=True).verified
    merge_checkpoints("base", "sft", "whole")
    assert files_of(large / "out") == files_of(large / "whole")
    assert not any(path.is_symlink() for path in (large / "out").rglob("*"))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("how", ["symbolic", *others("hard")])
def test_an_input_is_not_written_through_a_link(large: Path, how: str) -> None:
    killed(large)
    path, target = large / "out.partial" / "model.safetensors", large / "base" / "model.safetensors"
    path.unlink()
    before = target.read_bytes()
    path.symlink_to(target) if how == "symbolic" else path.hardlink_to(target)
    report = merge_checkpoints("base", "sft", "out")
    assert any("starting over" in note for note in report.notes)
    assert target.read_bytes() == before
    merge_checkpoints("base", "sft", "whole")
    assert files_of(large / "out") == files_of(large / "whole")


@pytest.mark.parametrize("when", ["before it is copied", "after"])
def test_a_small_file_that_changes_meanwhile_is_refused(pair: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    copy_file = direct_io.copy_file

    def change(source: Path, target: Path) -> None:
        if when == "after":
            copy_file(source, target)
        (pair / "sft" / "tokenizer.json").write_text('{"trunc')
        if when != "after":
            copy_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(direct_io, "copy_file", change)
        with pytest.raises(ChangedError, match=r"tokenizer\.json was written or removed during the merge"):
            merge_checkpoints("base", "sft", "out", verify=True)
    assert sorted(path.name for path in pair.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize(
    ("file", "inside"),
    [
        ("base/templates2", "sft/templates2/chat.jinja"),
        ("", "sft/README.md/x"),
        ("", "sft/imm_report.json/x"),
        ("", "base/model.safetensors.old/x"),
    ],
)
def test_a_file_and_a_folder_of_one_name_are_refused_from_names_alone(pair: Path, file: str, inside: str) -> None:
    if file:
        (pair / file).write_text("x")
    (pair / inside).parent.mkdir(parents=True)
    (pair / inside).write_text("y")
    ended = subprocess_of("merge", "base", "sft", "-o", "out", "--dry-run")
    if "old" in inside:
        assert ended.status == 0
        return
    assert ended.status == 1
    assert ", but a folder in '" in ended.error
    assert ended.error.endswith("; rename or remove one of them")


@pytest.mark.parametrize("content", [*others("", "20260101\n", "link", "folder"), "mine", "pipe"])
@pytest.mark.parametrize("overwrite", [*others([]), ["--overwrite"]])
def test_a_file_of_others_with_the_name_of_a_marker_stays(pair: Path, content: str, overwrite: list[str]) -> None:
    merge_checkpoints("base", "sft", "out", alpha=0.25)
    marker = pair / "out.replacing"
    if content == "link":
        marker.symlink_to(pair / "elsewhere")
    elif content == "folder":
        marker.mkdir()
    elif content == "pipe":
        os.mkfifo(marker)
    else:
        marker.write_text(content)
    before = marker.lstat()
    for dry_run in ([], ["--dry-run"]):
        ended = subprocess_of("merge", "base", "sft", "-o", "out", *overwrite, *dry_run)
        assert ended.status == 1
        assert "out.replacing is in the way" in ended.error
    assert (marker.lstat().st_ino, marker.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (pair / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "an input"])
def test_a_folder_of_others_in_the_place_of_the_old_one_stays(
    pair: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Without an atomic exchange, OUT moves to OUT.old meanwhile; the cure in the message works."""
    merge_checkpoints("base", "sft", "out", alpha=0.25)
    base = "base"
    if kind == "folder":
        (pair / "out.old").mkdir()
        (pair / "out.old" / "notes.txt").write_text("mine")
    elif kind == "file":
        (pair / "out.old").write_text("mine")
    else:
        (pair / "base").rename(pair / "out.old")
        base = "out.old"
    monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    with pytest.raises(
        OutputError, match=r"out\.old is in the way: .*the merge is complete in out\.partial: move out\.old away"
    ):
        merge_checkpoints(base, "sft", "out", overwrite=True)
    assert (pair / "out.old").exists()
    assert not (pair / "out.replacing").exists()
    if kind != "an input":
        (pair / "out.old").rename(pair / "mine")
        assert merge_checkpoints(base, "sft", "out", overwrite=True).bytes_written == 0


def test_a_folder_that_has_got_the_inode_of_an_old_one_stays(pair: Path) -> None:
    """The merge was killed between removing the old folder and the marker; then a user made a folder."""
    merge_checkpoints("base", "sft", "out", alpha=0.25)
    (pair / "out.old").mkdir()
    (pair / "out.old" / "notes.txt").write_text("mine")
    about = {"format": "mergekit_imm exchange", "inode": (pair / "out.old").stat().st_ino, "names": ["config.json"]}
    (pair / "out.replacing").write_text(json.dumps(about))
    assert merge_checkpoints("base", "sft", "out", alpha=0.25).status == "already merged"
    assert files_of(pair / "out.old") == {"notes.txt": b"mine"}
    assert not (pair / "out.replacing").exists()


@pytest.mark.parametrize("out", ["x.partial", "x.replacing", "a/../out", "loop", "loop/x"])
def test_outputs_that_would_be_trouble_are_refused(pair: Path, out: str) -> None:
    (pair / "loop").symlink_to("loop")
    for _ in range(2):
        ended = subprocess_of("merge", "base", "sft", "-o", out)
        assert ended.status == 1
        assert out in ended.error
    assert not (pair / "a").exists()


def test_a_linked_folder_that_is_left_out_is_reported(pair: Path) -> None:
    (pair / "real").mkdir()
    (pair / "real" / "chat.jinja").write_text("x")
    (pair / "sft" / "more").symlink_to(pair / "real")
    ended = subprocess_of("merge", "base", "sft", "-o", "out")
    assert ended.err == "note: left out, because they are links to folders: sft sft/more/\n"


def test_a_journal_that_lost_its_end_of_line_is_no_traceback(large: Path) -> None:
    killed(large)
    path = large / "out.partial" / journal.JOURNAL
    path.write_bytes(path.read_bytes().split(b"\n")[0])
    ended = subprocess_of("merge", "base", "sft", "-o", "out")
    assert ended.status == 1
    assert "is not an unfinished merge; move it away, or --restart, which empties it" in ended.error
    assert subprocess_of("merge", "base", "sft", "-o", "out", "--restart").status == 0


@pytest.mark.parametrize("place", ["out/imm_recipe.json", "out.partial/.imm_journal"])
def test_a_pipe_in_an_output_is_no_trap(pair: Path, place: str) -> None:
    (pair / place).parent.mkdir()
    os.mkfifo(pair / place)
    ended = subprocess_of("merge", "base", "sft", "-o", "out")
    assert ended.status == 1


@pytest.mark.parametrize("name", ["model.safetensors", *others("README.md", "imm_recipe.json", "tokenizer.json")])
def test_a_pipe_in_a_merge_that_is_verified_is_no_trap(pair: Path, name: str) -> None:
    merge_checkpoints("base", "sft", "out")
    (pair / "out" / name).unlink()
    os.mkfifo(pair / "out" / name)
    assert subprocess_of("verify", "out").status == 1


def test_verifying_twice_reads_twice(pair: Path) -> None:
    merge_checkpoints("base", "sft", "out")
    verify("out")
    path = pair / "out" / "tokenizer.json"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=times)
    with pytest.raises(VerifyError, match=r"tokenizer\.json"):
        verify("out")


# --- standard streams


@pytest.mark.parametrize("closed", [*others([1], [2]), [0, 1, 2]])
def test_standard_streams_may_be_closed(pair: Path, closed: list[int]) -> None:
    shell = " ".join([sys.executable, "-m", "mergekit_imm", "merge", "base", "sft", "-o", "out", "--workers", "1"])
    redirected = " ".join(f"{number}>&-" for number in closed)
    ended = subprocess.run(f"exec {shell} {redirected}", shell=True, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    merge_checkpoints("base", "sft", "whole")
    assert files_of(pair / "out") == files_of(pair / "whole")


def test_errors_that_cannot_be_printed_keep_their_status(pair: Path) -> None:
    command = [sys.executable, "-m", "mergekit_imm", "merge", "base", "base", "-o", "out"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert subprocess.run(command, stderr=full, stdout=subprocess.DEVNULL).returncode == 0
        assert subprocess.run([*command, "--alpha", "7"], stderr=full).returncode == 2
        ended = subprocess.run([*command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: standard output cannot be written: No space left on device\n"


def test_names_do_not_speak_to_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("base", "sft")):
        state = random_state({"evil\x1b[31m\nerror: x": (2, 2)}, seed=seed)
        write_model(tmp_path / role, state, side={"name\x1b[31m.txt": "x"})
    for arguments in (["--dry-run"], []):
        ended = subprocess_of("merge", "base", "sft", "-o", "out\x1b", *arguments)
        assert ended.status == 0
        assert (ended.out + ended.err).replace("\n", "").isprintable()
        assert not any(line.startswith("error") for line in ended.out.splitlines())
